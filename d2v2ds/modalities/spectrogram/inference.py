"""Recordings of any rate and channel count -> spectrograms that an encoder reads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.io.read import validate
from d2v2ds.modalities.audio.inference import read_waveform
from d2v2ds.modalities.audio.shards import AUDIO_SUFFIXES
from d2v2ds.modalities.inference import CONTEXT_SHARE, InputOptions, Piece, windows
from d2v2ds.modalities.spectrogram.features import HOP, SAMPLE_RATE_HZ, DecibelFeatures, FbankFeatures, Features
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.modalities.spectrogram.reader import padded

_KINDS: dict[str, type[FbankFeatures] | type[DecibelFeatures]] = {"fbank": FbankFeatures, "decibel": DecibelFeatures}


def written(features: Features) -> dict[str, Any]:
    """Convert settings of features to plain values."""
    values: dict[str, Any] = TypeAdapter(type(features)).dump_python(features, mode="json")
    return values


def features_of(preprocessing: Mapping[str, Any]) -> Features:
    """Settings of features of an export.

    Raises:
        CheckpointError: they are none.
    """
    values = preprocessing.get("features")
    kind = _KINDS.get(str(values.get("kind"))) if isinstance(values, Mapping) else None
    if kind is None:
        raise CheckpointError(
            f"preprocessing: expected features of kind {' or '.join(_KINDS)}, found {values!r:.100}; export again"
        )
    found: Features = validate(kind, values, "preprocessing.features", CheckpointError)
    return found


class SpectrogramInference:
    """Raw recordings for one exported model; an `Inference`."""

    suffixes = AUDIO_SUFFIXES
    token_seconds = None
    """Eight patches share one time, so that tokens have no fixed distance in time."""

    def __init__(self, network: SpectrogramNetwork, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `features` of the export.

        Raises:
            CheckpointError: they are none that this project knows.
        """
        self._network = network
        self._features = features_of(preprocessing)
        self.fill = self._features.fill

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Read a sound file or samples: (F, S) features up to a whole number of patches."""
        samples = read_waveform(item, options.sample_rate, SAMPLE_RATE_HZ, place, options.in_list)
        least = max(round(options.min_seconds * SAMPLE_RATE_HZ), self._features.num_samples(1))
        if len(samples) < least:
            raise ValueError(
                f"{place}: a recording of {len(samples) / SAMPLE_RATE_HZ:.3f} s, expected {least / SAMPLE_RATE_HZ:g} s "
                "or more; min_seconds= lowers it, features of so short a sound mean little"
            )
        waveform = torch.from_numpy(samples)
        found = self._features.compute(waveform, float(waveform.double().mean()), self._network.mel_bins)
        return padded(found, self._network, self._features)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide a long recording into overlapping windows, or into chunks of the one length that the model takes."""
        network, patch = self._network, self._network.patch_size
        columns, total = network.grid_columns, source.shape[1] // patch
        if network.has_fixed_length:
            rows = network.target_length // patch
            return [
                Piece(index, self._filled(source[:, start * patch : (start + rows) * patch]), *place)
                for start in range(0, total, rows)
                for place in [(0, min(rows, total - start) * columns, start * columns)]
            ]
        most = min(int(options.window_seconds * SAMPLE_RATE_HZ) // HOP // patch, network.max_rows)
        rows = min(max(2 * CONTEXT_SHARE, most), network.max_rows)
        return [
            Piece(
                index,
                source[:, start * patch : (start + rows) * patch],
                (first - start) * columns,
                (last - start) * columns,
                first * columns,
            )
            for start, first, last in windows(total, rows)
        ]

    def _filled(self, source: Tensor) -> Tensor:
        lacking = self._network.target_length - source.shape[1]
        return torch.nn.functional.pad(source, (0, lacking), value=self.fill)

    def inputs(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the file itself."""
        yield str(path), path

    def pieces(self, index: int, item: Any, options: InputOptions, place: str) -> Iterator[Piece]:
        """Yield the windows of a recording, which is whole in memory."""
        yield from self.cut(index, self.read(item, options, place), options)
