"""Turn an audio file into stored samples: decode, mix to mono, resample, cut at quiet points, count. NumPy only.

Stored samples are int16. A mono 16-bit file of the right rate is decoded straight to them, FLAC the fast way
(`d2v2ds/data/codecs/flac.py`); anything else passes through float32 block by block, so that besides the int16 result
only one block is in memory.
"""

import os
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from d2v2ds.data.codecs.flac import decode_mono16
from d2v2ds.modalities.audio.shards import SAMPLE_SCALE
from preprocessing.driver.input_files import unreadable

Samples = NDArray[np.int16]

_EXACT_SUBTYPES = frozenset({"PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW"})
"""Sample formats that libsndfile turns into int16 without loss; others lose bits or clip and are rounded here."""
_BLOCK_FRAMES = 1 << 18
_LARGEST_PIECE = 1 << 26
"""Samples that are read at a time where a header may promise more than there is."""
_UNKNOWN_LENGTH = 1 << 62
_PLAUSIBLE_RATIO = 64
"""Samples per byte of file up to which memory is taken for as many as a header promises."""
_STREAMED_WAV_BYTES = 0x7FFFF000
"""Sizes from this one on stand in headers whose writer did not know the length."""
_WHOLE_FILE_BYTES = 32 << 20
"""FLAC files below this size, about half an hour, are decoded from memory."""
_STATS_BLOCK = 1 << 15
"""Samples that stay, as float64, in the processor's second cache together with the recording they come from."""
_STATS_ROW = 1 << 12
_HOP_SECONDS = 0.01
_QUIET_HOPS = 10


class BadAudioError(Exception):
    """A file cannot be packed; the text is the reason that goes to ``skipped.tsv``."""


class Decoder:
    """Decodes files one after another into one buffer that is kept, because fresh memory costs page faults.

    Args:
        sample_rate_hz: rate of the result; files of another rate are resampled.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._buffer: Samples = np.empty(0, dtype=np.int16)

    def decode(self, path: str) -> Samples:
        """The whole file as (S,) int16, mono: read-only, or a view that the next call overwrites.

        Raises:
            BadAudioError: if the file cannot be decoded to its end or holds NaN or infinity.
        """
        samples = self._read_flac(path) if path[-5:].lower() == ".flac" else None
        return self._read(path) if samples is None else samples

    def _read_flac(self, path: str) -> Samples | None:
        """A mono 16-bit FLAC file of the right rate; None if the other way has to try."""
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123  (a Path per file costs more than opening it)
                data = file.read(_WHOLE_FILE_BYTES)
                return decode_mono16(data, self._sample_rate_hz) if len(data) < _WHOLE_FILE_BYTES else None
        except OSError:  # said by the other way, which meets it again
            return None

    def _read(self, path: str) -> Samples:
        try:
            size = os.stat(path).st_size  # noqa: PTH116
            if path[-4:].lower() == ".wav":
                _check_wav(path, size)
            with soundfile.SoundFile(path) as file:
                if file.frames >= _UNKNOWN_LENGTH:  # soundfile would seek to the end, which then fails
                    file.seekable = lambda: False
                elif file.frames <= size * _PLAUSIBLE_RATIO:  # in one piece: growing would take twice the memory
                    self._reserve(0, file.frames)
                if file.samplerate == self._sample_rate_hz and file.channels == 1 and file.subtype in _EXACT_SUBTYPES:
                    samples = self._read_exact(file)
                else:
                    samples = self._read_float(file)
        except soundfile.LibsndfileError as error:
            said = error.error_string
            raise BadAudioError(f"damaged or cut off: does not decode (libsndfile: {said})") from error
        except OSError as error:
            raise BadAudioError(unreadable(path, error)) from error
        if not len(samples):
            raise BadAudioError("no samples")
        return samples

    def _read_exact(self, file: soundfile.SoundFile) -> Samples:
        """A header's length is right or an upper bound, except that of an unfinished stream: then grow."""
        length = 0
        wanted = min(file.frames, _LARGEST_PIECE)
        while True:
            got: int = len(file.read(out=self._reserve(length, wanted)))
            length += got
            if got < wanted or length == file.frames:
                break
        _check_length(file, length)
        return self._buffer[:length]

    def _read_float(self, file: soundfile.SoundFile) -> Samples:
        length = 0
        for block in _resampled(_mono_blocks(file), file.samplerate, self._sample_rate_hz):
            part = self._reserve(length, len(block))
            part[:] = to_int16(block)
            length += len(block)
        return self._buffer[:length]

    def _reserve(self, start: int, count: int) -> Samples:
        """Room for `count` samples from `start` on; what stands before is kept."""
        if len(self._buffer) < start + count:
            grown: Samples = np.empty(max(start + count, 2 * len(self._buffer)), dtype=np.int16)
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        return self._buffer[start : start + count]


def to_int16(samples: NDArray[np.float32]) -> Samples:
    """Round [-1, 1) to int16; what lies outside is clipped."""
    stored: Samples = np.clip(np.rint(samples * np.float32(SAMPLE_SCALE)), -SAMPLE_SCALE, SAMPLE_SCALE - 1).astype(
        np.int16
    )
    return stored


def mean_and_variance(samples: Samples) -> tuple[float, float]:
    """Mean and biased variance of (S,) int16 samples / 32768, correctly rounded functions of the integers.

    The sums are exact: every partial sum in float64 is an integer below 2**53. They run over rows short enough that
    BLAS does not start threads, which on shared cores cost far more than they save.
    """
    total = squares = 0
    space = np.empty(min(_STATS_BLOCK, len(samples)))
    for start in range(0, len(samples), _STATS_BLOCK):
        part = samples[start : start + _STATS_BLOCK]
        block = space[: len(part)]
        block[:] = part
        whole = len(block) - len(block) % _STATS_ROW
        rows, rest = block[:whole].reshape(-1, _STATS_ROW), block[whole:]
        total += int(block.sum())
        squares += int(np.vecdot(rows, rows).sum()) + int(np.vecdot(rest, rest))
    count = len(samples)
    # Python divides whole numbers of any size with one rounding
    return total / (count * SAMPLE_SCALE), (squares * count - total * total) / (count * SAMPLE_SCALE) ** 2


def cut_points(samples: Samples, max_samples: int, min_samples: int, sample_rate_hz: int) -> list[int]:
    """Points at which a recording is cut: the quietest ones that leave no piece longer than `max_samples`.

    A piece ends in the second half of the allowed length, in the middle of the 100 ms with the least energy (the
    latest of equals, on a grid of 10 ms), and never so late that less than `min_samples` would be left over.

    Args:
        samples: (S,) int16.
        max_samples: longest piece, at least twice `min_samples`.
        min_samples: shortest last piece.
        sample_rate_hz: for the 10 ms.

    Returns:
        Ascending bounds [0, ..., S]; pieces lie between neighbours.
    """
    bounds = [0]
    hop = max(1, round(_HOP_SECONDS * sample_rate_hz))
    while len(samples) - bounds[-1] > max_samples:
        start = bounds[-1]
        first = start + max_samples // 2
        last = min(start + max_samples, len(samples) - min_samples)
        bounds.append(_quietest(samples, first, last, hop))
    return [*bounds, len(samples)]


def _quietest(samples: Samples, first: int, last: int, hop: int) -> int:
    """The hop bound in (first, last] with the least energy around it; `last` if the window is too short."""
    hops = (last - first) // hop
    if hops <= _QUIET_HOPS:
        return last
    window = samples[last - hops * hop : last].astype(np.int64).reshape(hops, hop)
    energy = np.concatenate([[0], np.cumsum((window * window).sum(axis=1))])
    around = energy[_QUIET_HOPS:] - energy[:-_QUIET_HOPS]
    latest = len(around) - 1 - int(np.argmin(around[::-1]))
    return last - hops * hop + (latest + _QUIET_HOPS // 2) * hop


def _mono_blocks(file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    length = 0
    while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise BadAudioError("NaN or infinite samples")
        length += len(block)
        yield block.mean(axis=1, dtype=np.float32) if file.channels > 1 else block[:, 0]
    _check_length(file, length)


def _resampled(blocks: Iterator[NDArray[np.float32]], rate: int, target: int) -> Iterator[NDArray[np.float32]]:
    if rate == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)


def _check_length(file: soundfile.SoundFile, found: int) -> None:
    """A file that ends early was cut off. MP3 lengths are estimates, and unfinished streams have none."""
    if found < file.frames and file.format != "MP3" and file.frames < _UNKNOWN_LENGTH:
        raise BadAudioError(f"cut off: its header says {file.frames} samples, found {found}")


def _check_wav(path: str, size: int) -> None:
    """Raise a `BadAudioError` if a RIFF file is shorter than its own header says; libsndfile takes what is there."""
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(12)
        if start[:4] != b"RIFF" or start[8:] != b"WAVE":
            return
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] != b"data":
                file.seek(length + length % 2, os.SEEK_CUR)
                continue
            found = size - file.tell()
            if found < length < _STREAMED_WAV_BYTES:
                raise BadAudioError(f"cut off: its header says {length} bytes of samples, found {found}")
            return
