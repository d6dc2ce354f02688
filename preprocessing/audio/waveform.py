"""Turn an audio file into stored samples: decode, mix to mono, resample, cut at quiet points, count. NumPy only.

Stored samples are int16. A mono 16-bit file of the right rate is decoded straight to them, FLAC the fast way
(`d2v2ds/data/codecs/flac.py`); anything else passes through float32 block by block, so that besides the int16 result
only one block is in memory.
"""

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.codecs.flac import decode_mono16
from d2v2ds.io.machine_faults import retried
from d2v2ds.modalities.audio.extent import Remark
from d2v2ds.modalities.audio.shards import SAMPLE_SCALE
from d2v2ds.modalities.audio.sound_bytes import BadAudioError, open_bytes
from d2v2ds.modalities.audio.sound_file import Sound, most_samples, open_sound, resampled
from preprocessing.audio.levels import Levels

Samples = NDArray[np.int16]

_EXACT_SUBTYPES = frozenset({"PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW"})
"""Sample formats that libsndfile turns into int16 without loss; others lose bits or clip and are rounded here."""
_LARGEST_PIECE = 1 << 26
"""Samples that are read at a time where a header may promise more than there is."""
_PLAUSIBLE_RATIO = 64
"""Samples per byte of file up to which memory is taken for as many as a header promises."""
_WHOLE_FILE_BYTES = 32 << 20
"""FLAC files below this size, about half an hour, are decoded from memory."""
_STATS_BLOCK = 1 << 15
"""Samples that stay, as float64, in the processor's second cache together with the recording they come from."""
_STATS_ROW = 1 << 12
_HOP_SECONDS = 0.01
_QUIET_HOPS = 10


class Decoder:
    """Decodes files one after another into one buffer that is kept, because fresh memory costs page faults.

    Args:
        sample_rate_hz: rate of the result; files of another rate are resampled.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self._sample_rate_hz = sample_rate_hz
        self._buffer: Samples = np.empty(0, dtype=np.int16)
        self._most = 0
        self.remarks: list[Remark] = []
        """Losses of the last recording, and its differences from its header."""

    def decode(self, path: str) -> Samples:
        """The whole file as (S,) int16, mono: read-only, or a view that the next call overwrites.

        Raises:
            BadAudioError: if the file cannot be decoded to its end, holds NaN or infinity, or if nothing like it
                would be left: it is clipped, its channels cancel each other, or it is weaker than one bit.
            MachineError: the machine is at fault.
        """
        return retried(lambda: self._decode(path))

    def _decode(self, path: str) -> Samples:
        self.remarks = []
        samples = self._read_flac(path) if path[-5:].lower() == ".flac" else None
        return self._read(path) if samples is None else samples

    def _read_flac(self, path: str) -> Samples | None:
        """A mono 16-bit FLAC file of the right rate; None if the other way has to try."""
        with open_bytes(path) as data:
            if data.size >= _WHOLE_FILE_BYTES:
                return None
            return decode_mono16(data.read_at(0, _WHOLE_FILE_BYTES), self._sample_rate_hz)

    def _read(self, path: str) -> Samples:
        with open_sound(path) as sound:
            self._most = most_samples(sound.bytes)
            if sound.frames <= sound.bytes * _PLAUSIBLE_RATIO:  # in one piece: growing would take twice the memory
                self._reserve(0, sound.frames)
            is_exact = sound.rate == self._sample_rate_hz and sound.channels == 1
            if is_exact and sound.file.subtype in _EXACT_SUBTYPES:
                samples = self._read_exact(sound)
            else:
                samples = self._read_float(sound)
            self.remarks = sound.remarks
        if not len(samples):
            raise BadAudioError("no samples")
        return samples

    def _read_exact(self, sound: Sound) -> Samples:
        """A header's length is right or an upper bound, except that of an unfinished stream: then grow."""
        length, one = 0, np.empty(1, dtype=np.int16)
        while True:
            wanted = max(1, min(sound.frames, _LARGEST_PIECE, self._most - length))
            got = sound.read_exact(self._reserve(length, wanted))
            length += got
            if got < wanted or (length >= sound.frames and not sound.read_exact(one)):
                break
            if length >= sound.frames:
                self._reserve(length, 1)[:] = one
                length += 1
        sound.finish(length)
        return self._buffer[:length]

    def _read_float(self, sound: Sound) -> Samples:
        length, levels = 0, Levels()
        for block in resampled(sound.blocks(), sound.rate, self._sample_rate_hz):
            levels.store(block, self._reserve(length, len(block)))
            length += len(block)
        sound.remarks += levels.remarks()
        return self._buffer[:length]

    def _reserve(self, start: int, count: int) -> Samples:
        """Room for `count` samples from `start` on; what stands before is kept."""
        if start + count > self._most:
            raise BadAudioError(f"more than {self._most:,} samples, which no recording of its bytes has")
        if len(self._buffer) < start + count:
            grown: Samples = np.empty(max(start + count, 2 * len(self._buffer)), dtype=np.int16)
            grown[:start] = self._buffer[:start]
            self._buffer = grown
        return self._buffer[start : start + count]


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
