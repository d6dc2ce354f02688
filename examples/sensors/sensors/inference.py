"""Files and arrays of any sample rate -> what an exported model reads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v2ds.modalities.inference import CONTEXT_SHARE, InputOptions, Piece, windows
from d2v2ds.shapes import shortest_input
from sensors.network import SensorNetwork
from sensors.recordings import BadRecordingError, checked, mean_and_variance, normalised, read_recording, resample


class SensorsInference:
    """Raw recordings for one exported model; an `Inference` of d2v2ds."""

    fill = 0.0

    def __init__(self, network: SensorNetwork, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `sample_rate_hz` and `channels` of the export.
        """
        self._network = network
        self._rate: float = preprocessing["sample_rate_hz"]
        self._channels: list[str] = preprocessing["channels"]

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Read a file, or an array (C, S) or (S, C): the model's channels and rate, zero mean and unit variance.

        Returns:
            (C, S) float32.

        Raises:
            ValueError: the input is no recording of the model's channels, or its rate is not given.
            MissingExtraError: the rate is another one and soxr is not installed.
        """
        if options.sample_rate is None:
            raise ValueError(f"{place}: expected sample_rate= of the recording; the model reads {self._rate:g} Hz")
        try:
            if isinstance(item, str | Path):
                samples = read_recording(Path(item), self._channels)
            else:
                given = item.float().numpy(force=True) if isinstance(item, Tensor) else np.asarray(item)
                samples = checked(given, self._channels)
        except BadRecordingError as error:
            raise ValueError(f"{place}: {error}") from error
        if (seconds := samples.shape[1] / options.sample_rate) < options.min_seconds:
            raise ValueError(f"{place}: {seconds:.3f} s, expected {options.min_seconds:g} s or more; see min_seconds=")
        samples = resample(samples, options.sample_rate, self._rate)
        return torch.from_numpy(normalised(samples, *mean_and_variance(samples)))

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide a long recording into overlapping windows."""
        layers, size = self._network.conv_layers, source.shape[1]
        total = self._network.num_tokens(size)
        if total < 1:
            raise ValueError(
                f"input {index}: {size} samples make no token; expected {shortest_input(1, layers)} samples"
            )
        hop = math.prod(stride for _, _, stride in layers)
        longest = max(2 * CONTEXT_SHARE, int(options.window_seconds * self._rate) // hop)
        if total <= longest:
            return [Piece(index, source, 0, total, 0)]
        samples = shortest_input(longest, layers)
        return [
            Piece(index, source[:, start * hop : start * hop + samples], first - start, last - start, first)
            for start, first, last in windows(total, longest)
        ]
