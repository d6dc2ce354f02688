"""Fast reading of plain FLAC: header fields from the first bytes, mono 16-bit samples in one call. No torch.

miniaudio decodes faster than libsndfile but silently skips damaged frames, so its result is used only if it is as long
as the header states. libsndfile reads all other files, and all files if miniaudio is absent; it reports errors.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

try:
    import miniaudio
except ImportError:  # no wheel for this machine
    miniaudio = None

DECODER = "libsndfile" if miniaudio is None else f"miniaudio {miniaudio.__version__}"
"""Decoder of plain FLAC files on this machine."""
STREAMINFO_BYTES = 42
"""Bytes of a file that `parse_streaminfo` reads."""
LARGEST_RATIO = 1 << 13
"""Samples per byte of file that not even silence reaches: above it a header's length is not believed."""
_MOST_SAMPLES = 1 << 26
"""Most samples decoded in one call, 70 minutes: they are in memory twice, and a header may be wrong."""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Header fields of a FLAC file."""

    frames: int
    sample_rate_hz: int
    channels: int
    bits: int


def parse_streaminfo(start: bytes) -> StreamInfo | None:
    """Parse the first `STREAMINFO_BYTES` of a FLAC file (RFC 9639, section 8.2), faster than libsndfile opens it.

    Returns:
        None if this is not a FLAC file whose header states its length; libsndfile then reads it.
    """
    if len(start) < STREAMINFO_BYTES or start[:4] != b"fLaC" or start[4] & 0x7F:
        return None
    packed = int.from_bytes(start[18:26], "big")  # 20 bits rate, 3 channels - 1, 5 sample size - 1, 36 frames
    frames, rate = packed & ((1 << 36) - 1), packed >> 44
    if not frames or not rate:
        return None
    return StreamInfo(frames, rate, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1)


def decode_mono16(data: bytes, sample_rate_hz: int) -> NDArray[np.int16] | None:
    """Decode all samples of a FLAC file, (S,), read-only; return None if libsndfile must read the file.

    Args:
        data: the whole file.
        sample_rate_hz: the rate it must have.
    """
    info = parse_streaminfo(data[:STREAMINFO_BYTES])
    if miniaudio is None or info is None or (info.sample_rate_hz, info.channels, info.bits) != (sample_rate_hz, 1, 16):
        return None
    if info.frames > min(_MOST_SAMPLES, LARGEST_RATIO * len(data)):
        return None
    try:
        samples = np.frombuffer(miniaudio.flac_read_s16(data).samples, dtype=np.int16)
    except (miniaudio.MiniaudioError, ValueError, MemoryError):
        return None
    return samples if len(samples) == info.frames else None
