"""Recordings in files -> waveforms of one channel, for packing and for feature extraction alike. No torch.

Numbers from headers are bounded before they size anything, channels that cancel each other are found, and what
libsndfile leaves out without an error is. Whatever a library raises becomes a `BadAudioError`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from d2v2ds.data.codecs.flac import LARGEST_RATIO, STREAMINFO_BYTES, parse_streaminfo
from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.modalities.audio.extent import Remark, check_extent
from d2v2ds.modalities.audio.mixing import Mixer, Waveform, rate_fault
from d2v2ds.modalities.audio.sound_bytes import BadAudioError, SoundBytes, open_bytes

_PLAUSIBLE_RATIO = 64
"""Samples per byte of file up to which a recording may have any length."""
_MOST_SILENCE = 1 << 27
"""Samples of a recording that exceeds `_PLAUSIBLE_RATIO`."""
_BLOCK_FRAMES = 1 << 18
_BLOCK_SAMPLES = 1 << 21
"""Samples of a block, all channels together."""
_UNKNOWN_LENGTH = 1 << 62
_MP3_FRAME = 1152
_MOST_UNREAD = 1 << 10
"""Bytes of tags that a decoder may leave unread at the end of a file."""
_NO_MEMORY = 17
"""libsndfile's code for a failed allocation."""


def most_samples(file_bytes: int) -> int:
    """Return the most samples that a file of a size may give."""
    return max(_MOST_SILENCE, _PLAUSIBLE_RATIO * file_bytes)


class Sound:
    """An open recording, read once from its beginning to its end.

    Args:
        data: bytes of the file.
        file: the same, opened by libsndfile.
        remarks: of the header.
    """

    def __init__(self, data: SoundBytes, file: soundfile.SoundFile, remarks: list[Remark]) -> None:
        self.bytes = data.size
        self.file = file
        self.rate: int = file.samplerate
        self.channels: int = file.channels
        self.remarks = remarks
        """Findings so far; complete after the last sample was read."""
        self._data = data
        info = parse_streaminfo(data.read_at(0, STREAMINFO_BYTES))
        self._stated: int | None = info.frames if info else file.frames
        if file.format == "MP3" and not _has_xing(data):
            self._stated = None  # an estimate
        elif self._stated is not None and self._stated >= _UNKNOWN_LENGTH:
            self._stated = None
        guess: int = file.frames if file.frames < _UNKNOWN_LENGTH else data.size
        self.frames = guess if self._stated is None else self._stated
        """Length by the header, or a guess."""
        if self.frames > data.size * LARGEST_RATIO:
            self.frames = data.size
        if file.frames >= _UNKNOWN_LENGTH:
            file.seekable = lambda: False  # soundfile would seek to the end, which then fails
        data.furthest = data.tell()  # opening may have looked at the end

    def read_exact(self, out: NDArray[np.int16]) -> int:
        """Read the next int16 samples into `out`, (S,) or (S, C), and return their number; fewer at the end."""
        count = len(self.file.read(out=out))
        self._data.check()
        return count

    def blocks(self) -> Iterator[Waveform]:
        """Yield the recording in blocks (S,), mixed to one channel.

        Raises:
            BadAudioError: it is damaged, cut off, not finite, or its channels cancel each other.
        """
        length, mixer = 0, Mixer(self.channels)
        frames = max(1, min(_BLOCK_FRAMES, _BLOCK_SAMPLES // self.channels))
        while len(block := self.file.read(frames, dtype="float32", always_2d=True)):
            self._data.check()
            length += len(block)
            yield mixer.mix(block)
        self.finish(length)
        self.remarks += mixer.remarks()

    def finish(self, length: int) -> None:
        """Compare the number of samples that were read with the header, and with the bytes of the file.

        Raises:
            BadAudioError: the recording was cut off.
        """
        self._data.check()
        stated = self._stated
        slack = 2 * _MP3_FRAME if self.file.format == "MP3" else 0
        if stated is not None and length + slack < stated:
            raise BadAudioError(f"cut off: its header says {stated} samples, found {length}")
        if stated is not None and self.file.format == "FLAC" and length > stated:
            detail = f"its header says {stated} samples, found {length}"
            self.remarks.append(Remark(kind="streamed", detail=detail, lost=0.0))
        unread = self._data.size - _tag_bytes(self._data) - self._data.furthest
        if self.file.format in ("MP3", "OGG", "FLAC") and unread > _MOST_UNREAD:
            detail = f"the last {unread} of {self._data.size} bytes are behind the end that its header says"
            self.remarks.append(Remark(kind="goes on", detail=detail, lost=unread / self._data.size))


@contextmanager
def open_sound(path: str | os.PathLike[str] | bytes) -> Iterator[Sound]:
    """Open a recording, a file or its content; whatever goes wrong until it is closed is one of two errors.

    Raises:
        BadAudioError: the file is no recording, damaged, or cut off.
        MachineError: the machine is at fault.
    """
    with open_bytes(path) as data:
        doing = "not audio that libsndfile can read, or its beginning is damaged"
        try:
            remarks = check_extent(data)
            if parse_streaminfo(data.read_at(0, STREAMINFO_BYTES)):
                data.patch(21, bytes([data.read_at(21, 1)[0] & 0xF0, 0, 0, 0, 0]))  # libsndfile would stop there
            with soundfile.SoundFile(data) as file:
                if fault := rate_fault(file.samplerate):
                    raise BadAudioError(fault)
                doing = "damaged or cut off: does not decode"
                yield Sound(data, file, remarks)
            data.check()
        except (D2V2Error, OSError):
            raise
        except MemoryError as error:
            raise _no_memory(data.path) from error
        except soundfile.LibsndfileError as error:
            data.check()
            if error.code == _NO_MEMORY:
                raise _no_memory(data.path) from error
            raise BadAudioError(f"{doing} (libsndfile: {error.error_string})") from error
        except Exception as error:  # of a library: one recording, not the packing
            data.check()
            raise BadAudioError(f"{doing} ({type(error).__name__}: {error})") from error


def resampled(blocks: Iterator[Waveform], rate: int, target: int) -> Iterator[Waveform]:
    """Yield blocks (S,) at another rate; one block at a time is in memory."""
    if rate == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)


def _has_xing(data: SoundBytes) -> bool:
    """True if an MP3 file states its length (tag Xing, Info or VBRI in its first frame)."""
    start, head = 0, data.read_at(0, 10)
    while head[:3] == b"ID3" and len(head) == 10:
        start += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
        head = data.read_at(start, 10)
    frame = data.read_at(start, 256)
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def _tag_bytes(data: SoundBytes) -> int:
    """Return the size of the tags ID3v1 and APE at the end of an MP3 file."""
    tags = 128 if data.read_at(data.size - 128, 3) == b"TAG" else 0
    footer = data.read_at(max(0, data.size - tags - 32), 32)
    if footer[:8] == b"APETAGEX":
        tags += int.from_bytes(footer[12:16], "little") + 32 * (footer[23] >> 7)
    return min(tags, data.size)


def _no_memory(path: str) -> MachineError:
    return MachineError(f"{path}: no memory left to decode it; use fewer workers, or a larger memory limit")
