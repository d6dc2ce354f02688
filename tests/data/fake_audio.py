"""A small in-memory dataset with the interface of `AudioShards` that decoding uses."""

from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.data.folders import JoinedShards
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.reader import AudioDataConfig, AudioReader
from d2v2ds.shapes import conv_output_length

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

    sample_rate_hz = RATE

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(clip) for clip in self.clips])

    def read_audio(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.clips[index][start:stop]

    def read_stats(self, index: int) -> tuple[float, float]:
        unit = self.clips[index] / 32768
        return float(unit.mean()), float(unit.var())


class FakeNetwork:
    """Settings of the network that a reader asks for."""

    def num_tokens(self, size: int) -> int:
        return conv_output_length(size, CONV_LAYERS)


def fake_config(**changes: Any) -> AudioDataConfig:
    """Settings for `FakeAudio`."""
    limits: dict[str, Any] = {"min_seconds": 0.5, "max_seconds": 2.0, "sample_rate_hz": RATE}
    batches = {"global_batch_seconds": 20.0, "micro_batch_seconds": 4.0}
    return AudioDataConfig(shards=Path("fake"), **(limits | batches | changes))


def fake_reader(source: FakeAudio, mask: MaskConfig | None, **changes: Any) -> AudioReader:
    """A reader of it."""
    return AudioReader(JoinedShards([source]), fake_config(**changes), FakeNetwork(), mask)
