"""Round waveforms to stored samples, and measure what that loses: samples beyond full scale, levels near one bit."""

import numpy as np
from numpy.typing import NDArray

from d2v2ds.modalities.audio.extent import Remark
from d2v2ds.modalities.audio.shards import SAMPLE_SCALE
from d2v2ds.modalities.audio.sound_bytes import BadAudioError

_MOST_CLIPPED = 0.1
"""Share of clipped samples above which a recording is skipped: nothing like it would be left."""
_QUIET_STEPS = 64
"""Range in steps of 16 bits below which a recording may be too quiet for them."""
_MOST_NOISE = 0.01
"""Share of a recording's power that rounding may change without a note: 20 dB."""


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Round [-1, 1) to int16; what lies outside is clipped."""
    stored: NDArray[np.int16] = np.clip(
        np.rint(samples * np.float32(SAMPLE_SCALE)), -SAMPLE_SCALE, SAMPLE_SCALE - 1
    ).astype(np.int16)
    return stored


class Levels:
    """Rounds one recording block by block, and knows afterwards what was lost."""

    def __init__(self) -> None:
        self._length = 0
        self._clipped = 0
        self._lowest, self._highest = np.inf, -np.inf
        self._offset = 0.0
        self._sum = self._power = self._noise = 0.0
        """In steps of 16 bits, without blocks that are loud."""

    def store(self, block: NDArray[np.float32], out: NDArray[np.int16]) -> None:
        """Round a block (S,) into `out`, (S,) int16.

        Raises:
            BadAudioError: it is not finite.
        """
        if not len(block):
            return
        lowest, highest = float(block.min()), float(block.max())
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise BadAudioError("NaN or infinite samples")
        out[:] = to_int16(block)
        if max(-lowest, highest) > 1:  # a value of 1 has no int16, but is no overload
            self._clipped += int(np.count_nonzero(np.abs(np.rint(block * np.float32(SAMPLE_SCALE))) > SAMPLE_SCALE))
        if not self._length:
            self._offset = float(block[0]) * SAMPLE_SCALE
        self._length += len(block)
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        if self._is_narrow():
            wide = block.astype(np.float64) * SAMPLE_SCALE
            noise, wide = wide - out, wide - self._offset
            self._noise += float(np.dot(noise, noise))
            self._sum += float(wide.sum())
            self._power += float(np.dot(wide, wide))

    def remarks(self) -> list[Remark]:
        """Return what the recording lost.

        Raises:
            BadAudioError: nothing like it is left.
        """
        if not self._length:
            return []
        return [*self._overload(), *(self._quietness() if self._is_narrow() else [])]

    def _is_narrow(self) -> bool:
        return (self._highest - self._lowest) * SAMPLE_SCALE < _QUIET_STEPS

    def _overload(self) -> list[Remark]:
        if not self._clipped:
            return []
        share, peak = self._clipped / self._length, max(-self._lowest, self._highest)
        detail = f"{self._clipped} of {self._length} samples lie beyond full scale, peak {peak:.4g}"
        if share > _MOST_CLIPPED:
            raise BadAudioError(f"clipped: {detail}; floating point samples lie in [-1, 1]: scale the recording")
        return [Remark(kind="clipped", detail=detail, lost=share)]

    def _quietness(self) -> list[Remark]:
        power = max(0.0, self._power - self._sum * self._sum / self._length)
        if self._highest == self._lowest or self._noise <= _MOST_NOISE * power:
            return []
        steps = (self._highest - self._lowest) * SAMPLE_SCALE
        detail = f"its range is {steps:.3g} steps of 16 bits, peak {max(-self._lowest, self._highest):.4g}"
        if np.rint(self._lowest * SAMPLE_SCALE) == np.rint(self._highest * SAMPLE_SCALE):
            raise BadAudioError(f"too quiet: {detail}; scale the recording")
        return [Remark(kind="quiet", detail=detail, lost=min(1.0, self._noise / power))]
