"""Bounds of sampling rates, and how channels become one: what samples in files and in arrays share. NumPy only."""

import numpy as np
from numpy.typing import NDArray

from d2v2ds.modalities.audio.extent import Remark
from d2v2ds.modalities.audio.sound_bytes import BadAudioError

Waveform = NDArray[np.float32]

LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 1_000, 768_000
"""Sampling rates that are believed: resampling one of 1 Hz would take gigabytes for a small file."""
_CANCELLED = 1e-3
"""Share of its channels' power below which a mixture is refused: 30 dB."""
_MEASURABLE = 1e-4
"""Share of the power that must not be a constant offset, to be told from rounding."""
_ROW = 1 << 12
_WEAKENED = 0.2
"""The same, of the power that independent channels would leave, below which it is noted."""


def rate_fault(rate: float) -> str:
    """Return why a sampling rate is not believed, empty if it is."""
    bounds = f"{LOWEST_RATE_HZ:,} to {HIGHEST_RATE_HZ:,} Hz"
    return "" if LOWEST_RATE_HZ <= rate <= HIGHEST_RATE_HZ else f"sampling rate {rate:,} Hz: expected {bounds}"


class Mixer:
    """Mixes channels to one, and measures what that loses.

    Args:
        channels: of the recording.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._frames = 0
        self._sums = np.zeros(channels)
        self._apart = self._mixed = 0.0
        """Power of all channels, and of their mean."""

    def mix(self, block: Waveform) -> Waveform:
        """Average a block (S, C) to (S,).

        Raises:
            BadAudioError: it holds NaN or infinity.
        """
        with np.errstate(over="ignore"):
            mono: Waveform = block.mean(axis=1, dtype=np.float32) if self._channels > 1 else block[:, 0]
        if not np.isfinite(mono).all():  # as soon as one channel is not
            raise BadAudioError("NaN or infinite samples")
        if self._channels > 1:
            self._frames += len(block)
            self._sums += _row_sums(block)
            self._apart += _power(block.reshape(-1))
            self._mixed += _power(mono)
        return mono

    def remarks(self) -> list[Remark]:
        """Return what mixing lost.

        Raises:
            BadAudioError: next to nothing is left of the channels.
        """
        if self._channels < 2 or not self._frames:
            return []
        means = self._sums / self._frames
        power = self._apart / self._frames / self._channels
        apart = power - float((means * means).mean())
        mixed = max(0.0, self._mixed / self._frames - float(means.mean()) ** 2)
        if apart <= _MEASURABLE * power or mixed * self._channels >= _WEAKENED * apart:
            return []
        level = f"their mean is {10 * np.log10(apart / mixed):.0f} dB weaker" if mixed else "their mean is silence"
        detail = f"{self._channels} channels cancel each other: {level}"
        if mixed < _CANCELLED * apart:
            raise BadAudioError(f"{detail}; pack one of them, or turn one")
        return [Remark(kind="cancelled", detail=detail, lost=1 - mixed * self._channels / apart)]


def _power(samples: Waveform) -> float:
    """Sum of squares of (S,); rows are short enough that float32 does, and that BLAS starts no threads."""
    whole = len(samples) - len(samples) % _ROW
    rows, rest = samples[:whole].reshape(-1, _ROW), samples[whole:]
    return float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.vecdot(rest, rest))


def _row_sums(block: Waveform) -> NDArray[np.float64]:
    """Sums over time of (S, C), as (C,)."""
    whole = len(block) - len(block) % _ROW
    rows = np.ones(_ROW, dtype=np.float32) @ block[:whole].reshape(-1, _ROW, block.shape[1])
    sums: NDArray[np.float64] = rows.sum(axis=0, dtype=np.float64) + block[whole:].sum(axis=0, dtype=np.float64)
    return sums
