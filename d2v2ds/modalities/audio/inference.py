"""Recordings of any rate and channel count -> waveforms that a speech encoder reads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import MissingExtraError
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.inference import CONTEXT_SHARE, InputOptions, Piece, windows
from d2v2ds.shapes import shortest_input

_MOST_CHANNELS = 32


class AudioInference:
    """Raw recordings for one exported model; an `Inference`."""

    fill = 0.0

    def __init__(self, network: AudioNetwork, preprocessing: Mapping[str, Any]) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `sample_rate_hz` and `variance_eps` of the export.
        """
        self._network = network
        self._rate: int = preprocessing["sample_rate_hz"]
        self._variance_eps: float = preprocessing["variance_eps"]

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Read a sound file or samples: mono, at the model's rate, zero mean and unit variance."""
        samples = read_waveform(item, options.sample_rate, self._rate, place)
        if len(samples) < options.min_seconds * self._rate:
            raise ValueError(
                f"{place}: a recording of {len(samples) / self._rate:.3f} s, expected {options.min_seconds:g} s or "
                "more; min_seconds= lowers it, features of so short a sound mean little"
            )
        return normalised(samples, self._variance_eps)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide a long recording into overlapping windows."""
        layers = self._network.conv_layers
        total = self._network.num_tokens(len(source))
        if total < 1:
            needed = shortest_input(1, layers)
            raise ValueError(f"input {index}: {len(source)} samples make no token; the front end needs {needed}")
        hop = math.prod(stride for _, _, stride in layers)
        size = max(2 * CONTEXT_SHARE, int(options.window_seconds * self._rate) // hop)
        if total <= size:
            return [Piece(index, source, 0, total, 0)]
        samples = shortest_input(size, layers)
        return [
            Piece(index, source[start * hop : start * hop + samples], first - start, last - start, first)
            for start, first, last in windows(total, size)
        ]


def read_waveform(given: Any, sample_rate_hz: int | None, wanted_hz: int, place: str) -> NDArray[np.float32]:
    """A recording, mixed to one channel and brought to the model's rate.

    Args:
        given: path of a sound file; or samples as array or tensor (S,), (C, S) or (S, C), floating in [-1, 1] or int16.
        sample_rate_hz: of samples; of a file it is read there.
        wanted_hz: the model's.
        place: how messages call the input.

    Returns:
        (S,) float32 at `wanted_hz`.

    Raises:
        ValueError: the input is empty, not finite, of no known rate, or no sound at all.
        MissingExtraError: soundfile or soxr is not installed.
    """
    if isinstance(given, str | Path):
        samples, rate = _read_sound_file(Path(given), place)
        if sample_rate_hz not in (None, rate):
            raise ValueError(
                f"{place}: the file says {rate} Hz, sample_rate is {sample_rate_hz}; leave sample_rate out"
            )
    else:
        if isinstance(given, Tensor):  # NumPy has no bfloat16
            given = (given.float() if given.is_floating_point() else given).numpy(force=True)
        samples = _one_channel(np.asarray(given), place)
        if sample_rate_hz is None:
            raise ValueError(
                f"{place}: samples without a rate; give sample_rate=, the model is made for {wanted_hz} Hz"
            )
        if not isinstance(sample_rate_hz, int | float | np.integer | np.floating) or not 0 < sample_rate_hz < np.inf:
            raise ValueError(f"{place}: expected sample_rate in Hz, found {sample_rate_hz!r}")
        rate = sample_rate_hz
    if not len(samples):
        raise ValueError(f"{place}: expected samples, found none")
    if not np.isfinite(samples).all():
        raise ValueError(f"{place}: expected finite samples, found NaN or infinity")
    return samples if rate == wanted_hz else _soxr().resample(samples, rate, wanted_hz)


def _one_channel(samples: NDArray[Any], place: str) -> NDArray[np.float32]:
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"{place}: expected floating samples in [-1, 1] or int16, found {samples.dtype}")
    if samples.ndim == 2 and min(samples.shape) <= _MOST_CHANNELS:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise ValueError(f"{place}: expected samples (S,), (C, S) or (S, C), found {samples.shape}")
    return samples.astype(np.float32, copy=False)


def _read_sound_file(path: Path, place: str) -> tuple[NDArray[np.float32], int]:
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("sound files need soundfile", "audio") from error
    if not path.is_file():
        raise ValueError(f"{place}: no file {path}")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, C)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{place}: {path} cannot be decoded: {error.error_string}") from error
    return samples.mean(axis=1), rate


def _soxr() -> Any:
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("resampling needs soxr", "audio") from error
    return soxr


def normalised(samples: NDArray[np.float32], variance_eps: float) -> Tensor:
    """(S,) with zero mean and unit variance over the whole recording, as in training."""
    wide = samples.astype(np.float64)
    scale = 1.0 / np.sqrt(wide.var() + variance_eps)
    return torch.from_numpy(((wide - wide.mean()) * scale).astype(np.float32))
