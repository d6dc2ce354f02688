"""`SENSORS`: everything that d2v2ds asks of multi-channel time series, as one object."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.data.reader import DataSettings
from d2v2ds.data.schema import Index, read_index
from d2v2ds.modalities.inference import GraphInput
from d2v2ds.modalities.modality import Baseline, Modality, ProbeDefaults
from d2v2ds.shapes import shortest_input
from sensors.inference import SensorsInference
from sensors.network import SensorNetwork
from sensors.reader import SECONDS, SensorDataConfig, SensorReader
from sensors.shards import SensorShards

_EDGES = np.geomspace(1 / 64, 1, 17)
"""Edges of 16 bands of equal ratio, as fractions of half the sample rate."""


def band_powers(recordings: Iterable[Tensor]) -> NDArray[np.float32]:
    """Log power of every channel in the same bands for recordings of any length: (N, C * bands)."""
    found = []
    for samples in recordings:
        power = torch.fft.rfft(samples).abs().square()[:, 1:]  # (C, F)
        edges = (_EDGES * power.shape[1]).astype(int).tolist()
        pairs = zip(edges[:-1], edges[1:], strict=True)
        bands = [power[:, first : max(last, first + 1)].mean(1) for first, last in pairs]
        found.append(torch.stack(bands).clamp(min=1e-12).log().flatten().numpy())
    return np.stack(found)


class Sensors(Modality):
    """Multi-channel time series, cropped; amounts in seconds of recording time."""

    name = "sensors"
    shards = SensorShards
    must_be_equal = ("channels", "sample_rate_hz")
    packer = "python -m sensors.pack"
    network = SensorNetwork
    data = SensorDataConfig
    reader = SensorReader
    unit = SECONDS
    probe = ProbeDefaults(c=0.1, neighbours=5, uses_middle_block=True)
    baseline = Baseline("band powers", band_powers)
    hub = None  # transformers has no name for such inputs
    graph = GraphInput(
        axes=("batch", None, "samples"),
        padding=0.0,
        sizes=lambda network, tokens: [shortest_input(n, network.conv_layers) + i for i, n in enumerate(tokens)],
        draw=lambda network, rows, size, generator: torch.randn(rows, network.num_channels, size, generator=generator),
    )

    def run_length(self, run: Any) -> float | None:
        """Seconds of `run.hours`."""
        return None if run.hours is None else run.hours * 3600

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Data settings for evaluation; batches are not made of them."""
        return SensorDataConfig(shards=folder, global_batch_seconds=10, micro_batch_seconds=10)

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """Sample rate and names of the channels."""
        names = [str(number) for number in range(network.num_channels)]
        channels = names if index is None else list(index.format["channels"])
        return {"sample_rate_hz": network.sample_rate_hz, "channels": channels}

    def packed_faults(self, model_folder: Path, preprocessing: Mapping[str, Any], shards: Path) -> list[str]:
        """Return a message if the shards have other channels, or the same in another order."""
        found, expected = list(read_index(shards).format["channels"]), list(preprocessing["channels"])
        if found == expected:
            return []
        return [f"{shards}: expected channels {', '.join(expected)}, found {', '.join(found)}; repack with --channels"]

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> SensorsInference:
        """Files and arrays."""
        return SensorsInference(network, preprocessing)


SENSORS = Sensors()
