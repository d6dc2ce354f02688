"""Sound files that are read block by block: their statistics in one pass, stretches of samples in a second one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError
from d2v2ds.modalities.audio.sound_bytes import BadAudioError

Waveform = NDArray[np.float32]

_KEPT_SAMPLES = 1 << 22
"""Samples of a recording up to which the second pass reads memory and not the file: 262 s at 16 kHz, 16 MiB."""


@contextmanager
def decoded(
    encoded: str | os.PathLike[str] | bytes, wanted_hz: int, place: str
) -> Iterator[tuple[int, Iterator[Waveform]]]:
    """Open a sound file, or its content: the rate that it has, and blocks (S,) of one channel at the wanted rate.

    Raises:
        ValueError: it is absent, damaged, or no recording; also while the blocks are read.
        MachineError: the machine is at fault.
        MissingExtraError: soundfile or soxr is not installed.
    """
    try:
        from d2v2ds.modalities.audio.sound_file import most_samples, open_sound, resampled
    except ImportError as error:
        raise MissingExtraError("sound files need soundfile and soxr", "audio") from error
    name = f"a file of {len(encoded):,} bytes" if isinstance(encoded, bytes) else os.fspath(encoded)

    def bounded(blocks: Iterator[Waveform], most: int) -> Iterator[Waveform]:
        length = 0
        for block in blocks:
            length += len(block)
            if length > most:
                raise BadAudioError(f"more than {length:,} samples, which no recording of its bytes has")
            yield block

    try:
        with open_sound(encoded) as sound:
            blocks = resampled(sound.blocks(), sound.rate, wanted_hz)
            yield sound.rate, bounded(blocks, most_samples(sound.bytes))
    except BadAudioError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ValueError(f"{place}: no file {name}") from None
        where = place if place == name else f"{place}: {name}"
        raise ValueError(f"{where} cannot be decoded: {str(error).removeprefix(f'{name}: ')}") from error


class Moments:
    """Mean and biased variance of samples that come in blocks (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean; 0 without samples."""
        return self._squares / max(self.count, 1)

    def add(self, block: Waveform) -> None:
        """Add a block (S,)."""
        if not len(block):
            return
        wide = block.astype(np.float64)
        mean, total = float(wide.mean()), self.count + len(wide)
        apart = mean - self.mean
        self._squares += float(((wide - mean) ** 2).sum()) + apart * apart * self.count * len(wide) / total
        self.mean += apart * len(wide) / total
        self.count = total


class LongSound:
    """A sound file whose length and moments are known."""

    def __init__(self, path: str | os.PathLike[str], wanted_hz: int, place: str) -> None:
        """Read the file once.

        Args:
            path: of the file.
            wanted_hz: rate of the samples.
            place: how messages call the input.

        Raises:
            ValueError, MachineError, MissingExtraError: as `decoded`.
        """
        self._path, self._wanted_hz, self._place = path, wanted_hz, place
        self.moments = Moments()
        kept: list[Waveform] | None = []
        with decoded(path, wanted_hz, place) as (_, blocks):
            for block in blocks:
                self.moments.add(block)
                if kept is not None:
                    kept.append(block)
                if self.moments.count > _KEPT_SAMPLES:
                    kept = None
        self._kept = kept

    @property
    def samples(self) -> int:
        """Number of samples at the wanted rate."""
        return self.moments.count

    def ranges(self, bounds: Sequence[tuple[int, int]]) -> Iterator[Waveform]:
        """Yield samples between bounds (start, stop), whose starts ascend; they may overlap.

        Raises:
            ValueError: the file became shorter since its first pass, or cannot be read any more.
        """
        if self._kept is not None:
            yield from _ranges(iter(self._kept), bounds, self._place)
            return
        with decoded(self._path, self._wanted_hz, self._place) as (_, blocks):
            yield from _ranges(blocks, bounds, self._place)


def _ranges(blocks: Iterator[Waveform], bounds: Sequence[tuple[int, int]], place: str) -> Iterator[Waveform]:
    held, begin = np.empty(0, dtype=np.float32), 0
    for start, stop in bounds:
        parts, end = [held[max(0, start - begin) :]], begin + len(held)
        begin = max(begin, min(start, end))
        while end < stop:
            block = next(blocks, None)
            if block is None:
                raise ValueError(f"{place}: expected {stop} samples as when it was first read, found {end}")
            parts.append(block[max(0, start - end) :])
            begin = max(begin, min(start, end + len(block)))
            end += len(block)
        held = np.concatenate(parts)
        yield held[start - begin : stop - begin]
