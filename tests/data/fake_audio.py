"""A small in-memory dataset with the interface of `ArrowShards` that decoding uses."""

import numpy as np

RATE = 1000
CONV_LAYERS = ((4, 10, 5), (4, 3, 2))
"""A small front end: stride 10, receptive field 20."""


class FakeAudio:
    """Clips of 0.2 to 3 s at 1 kHz, with an offset and a level of their own."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.clips = [
            np.round(rng.normal(rng.uniform(-500, 500), rng.uniform(10, 5000), n)).clip(-32768, 32767).astype(np.int16)
            for n in rng.integers(RATE // 5, 3 * RATE, num_rows)
        ]

    @property
    def num_samples(self) -> np.ndarray:
        return np.array([len(clip) for clip in self.clips])

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.clips[index][start:stop]

    def read_stats(self, index: int) -> tuple[float, float]:
        unit = self.clips[index] / 32768
        return float(unit.mean()), float(unit.var())
