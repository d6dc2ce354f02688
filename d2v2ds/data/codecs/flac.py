"""Plain FLAC the fast way: what its first bytes tell, and mono 16-bit samples in one call. No torch.

miniaudio's decoder takes two thirds of the time of libsndfile, which spends a third of its own on moving samples one by
one. It leaves a damaged frame out without a word, so its result counts only if it is as long as the header says. Every
other file, and every file where miniaudio has no wheel, is for libsndfile, which also says what is wrong.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

try:
    import miniaudio
except ImportError:  # no wheel for this machine
    miniaudio = None

DECODER = "libsndfile" if miniaudio is None else f"miniaudio {miniaudio.__version__}"
"""What decodes plain FLAC files here."""
STREAMINFO_BYTES = 42
"""How much of a file `parse_streaminfo` wants to see."""
_MOST_SAMPLES = 1 << 26
"""What is decoded at once, 70 minutes: it is in memory twice, and a header may promise anything."""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a FLAC file says of itself."""

    frames: int
    sample_rate_hz: int
    channels: int
    bits: int


def parse_streaminfo(start: bytes) -> StreamInfo | None:
    """Read the first `STREAMINFO_BYTES` of a FLAC file (RFC 9639, section 8.2).

    Three times as fast as opening the file through libsndfile, which counts when a corpus has 300,000 of them.

    Returns:
        None if this is no FLAC file that begins with its length; libsndfile then has to find out.
    """
    if len(start) < STREAMINFO_BYTES or start[:4] != b"fLaC" or start[4] & 0x7F:
        return None
    packed = int.from_bytes(start[18:26], "big")  # 20 bits rate, 3 channels - 1, 5 sample size - 1, 36 frames
    frames, rate = packed & ((1 << 36) - 1), packed >> 44
    if not frames or not rate:
        return None
    return StreamInfo(frames, rate, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1)


def decode_mono16(data: bytes, sample_rate_hz: int) -> NDArray[np.int16] | None:
    """All samples of a FLAC file, (S,), read-only; or None if it is for libsndfile to decode or to refuse.

    Args:
        data: the whole file.
        sample_rate_hz: the rate it must have.
    """
    info = parse_streaminfo(data[:STREAMINFO_BYTES])
    if miniaudio is None or info is None or (info.sample_rate_hz, info.channels, info.bits) != (sample_rate_hz, 1, 16):
        return None
    if info.frames > _MOST_SAMPLES:
        return None
    try:
        samples = np.frombuffer(miniaudio.flac_read_s16(data).samples, dtype=np.int16)
    except miniaudio.DecodeError:
        return None
    return samples if len(samples) == info.frames else None
