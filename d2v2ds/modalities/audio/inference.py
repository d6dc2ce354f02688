"""Recordings of any rate and channel count -> waveforms that a speech encoder reads."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import MissingExtraError
from d2v2ds.modalities.audio.long_sound import LongSound, decoded
from d2v2ds.modalities.audio.mixing import Mixer, rate_fault
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.audio.shards import AUDIO_SUFFIXES
from d2v2ds.modalities.audio.sound_bytes import BadAudioError
from d2v2ds.modalities.inference import CONTEXT_SHARE, InputOptions, Piece, windows
from d2v2ds.shapes import shortest_input

MOST_CHANNELS = 8
"""Channels of samples that are given as an array."""
_MOST_RATIO = 32
"""Samples for each channel from which on it is plain which axis is which."""


class AudioInference:
    """Raw recordings for one exported model; an `Inference`."""

    fill = 0.0
    suffixes = AUDIO_SUFFIXES

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
        samples = read_waveform(item, options.sample_rate, self._rate, place, options.in_list)
        if len(samples) < options.min_seconds * self._rate:
            raise ValueError(
                f"{place}: a recording of {len(samples) / self._rate:.3f} s, expected {options.min_seconds:g} s or "
                "more; min_seconds= lowers it, features of so short a sound mean little"
            )
        return normalised(samples, self._variance_eps)

    @property
    def token_seconds(self) -> float:
        """Time from one token to the next (seconds)."""
        return self._hop / self._rate

    @property
    def _hop(self) -> int:
        """Samples from one token to the next."""
        return math.prod(stride for _, _, stride in self._network.conv_layers)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide a long recording into overlapping windows."""
        extents = self._extents(len(source), options, f"input {index}")
        return [Piece(index, source[start:stop], *place) for start, stop, *place in extents]

    def _extents(self, samples: int, options: InputOptions, place: str) -> list[tuple[int, int, int, int, int]]:
        """First and last sample of every window, then `first`, `last` and `place` of its `Piece`.

        Raises:
            ValueError: the recording is too short for a token, or the context leaves nothing of a window.
        """
        layers, hop = self._network.conv_layers, self._hop
        total = self._network.num_tokens(samples)
        if total < 1:
            raise ValueError(
                f"{place}: {samples} samples make no token; the front end needs {shortest_input(1, layers)}"
            )
        size = max(2 * CONTEXT_SHARE, int(options.window_seconds * self._rate) // hop)
        if total <= size:
            return [(0, samples, 0, total, 0)]
        wanted = options.context_seconds
        context = None if wanted is None else int(wanted * self._rate) // hop
        if context is not None and not 0 <= 2 * context < size:
            raise ValueError(
                f"context of {wanted:g} s: expected less than half of a window of {size * hop / self._rate:g} s"
            )
        length = shortest_input(size, layers)
        return [
            (start * hop, start * hop + length, first - start, last - start, first)
            for start, first, last in windows(total, size, context)
        ]

    def inputs(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the file itself."""
        yield str(path), path

    def pieces(self, index: int, item: Any, options: InputOptions, place: str) -> Iterator[Piece]:
        """Yield the windows of a sound file, normalised by mean and variance of the whole recording.

        The file is read block by block: once for its statistics, and if it is long once more. Other inputs are
        recordings in memory.
        """
        if not isinstance(item, str | os.PathLike):
            yield from self.cut(index, self.read(item, options, place), options)
            return
        sound = LongSound(item, self._rate, place)
        extents = self._extents(sound.samples, options, place)
        scale = 1.0 / np.sqrt(sound.moments.variance + self._variance_eps)
        for samples, (_, _, *where) in zip(sound.ranges([extent[:2] for extent in extents]), extents, strict=True):
            wide = (samples.astype(np.float64) - sound.moments.mean) * scale
            yield Piece(index, torch.from_numpy(wide.astype(np.float32)), *where)


def read_waveform(
    given: Any, sample_rate_hz: float | None, wanted_hz: int, place: str, in_list: bool = True
) -> NDArray[np.float32]:
    """A recording, mixed to one channel and brought to the model's rate.

    Args:
        given: path of a sound file; its content as bytes or file object; samples as array or tensor (S,), (C, S) or
            (S, C), floating in [-1, 1] or int16; a dict of `datasets` with `array` and `sampling_rate`, or with
            `bytes` or `path`.
        sample_rate_hz: of samples; of a file or dict it is read there.
        wanted_hz: the model's.
        place: how messages call the input.
        in_list: False if an array (C, S) may be several recordings instead.

    Returns:
        (S,) float32 at `wanted_hz`.

    Raises:
        ValueError: the input is empty, not finite, of no known rate, or no sound at all.
        MachineError: a file cannot be read, for the machine is at fault.
        MissingExtraError: soundfile or soxr is not installed.
    """
    said = None
    if isinstance(given, Mapping):
        given, said = _from_dict(given, place)
    if hasattr(given, "read"):
        given = given.read()
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview):
        encoded = given if isinstance(given, str | os.PathLike) else bytes(given)
        samples, said = _read_sound(encoded, wanted_hz, place)
        _one_rate(said, sample_rate_hz, place)
        return _not_empty(samples, place)
    rate = _one_rate(said, sample_rate_hz, place)
    if isinstance(given, Tensor):  # NumPy has no bfloat16
        given = (given.float() if given.is_floating_point() else given).numpy(force=True)
    samples = _not_empty(_one_channel(_as_array(given, place), place, in_list), place)
    if rate is None:
        raise ValueError(f"{place}: samples without a rate; give sample_rate=, the model is made for {wanted_hz} Hz")
    return samples if rate == wanted_hz else _soxr().resample(samples, rate, wanted_hz)


def _from_dict(given: Mapping[Any, Any], place: str) -> tuple[Any, Any]:
    """Take samples and rate, or a file, out of a dict as the library `datasets` makes them."""
    if given.get("array") is not None and given.get("sampling_rate") is not None:
        return given["array"], given["sampling_rate"]
    for name in ("bytes", "path"):
        if given.get("array") is None and given.get(name) is not None:
            return given[name], None
    raise ValueError(f"{place}: expected a dict with 'array' and 'sampling_rate', found {sorted(map(str, given))}")


def _one_rate(said: Any, asked: Any, place: str) -> float | None:
    """Return the rate of a recording: what it says itself, else what the caller says.

    Raises:
        ValueError: they differ, or it is no rate.
    """
    if said is not None and asked is not None and said != asked:
        raise ValueError(f"{place}: the file says {said} Hz, sample_rate is {asked}; leave sample_rate out")
    rate = asked if said is None else said
    if rate is None:
        return None
    is_number = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(rate, bool)
    if not is_number or (fault := rate_fault(rate)):
        raise ValueError(f"{place}: expected sample_rate in Hz, found {rate!r}" + (f"; {fault}" if is_number else ""))
    return float(rate)


def _as_array(given: Any, place: str) -> NDArray[Any]:
    try:
        array = np.asarray(given)
    except ValueError as error:  # a list of lists of several lengths
        raise ValueError(f"{place}: expected samples of one recording, found {error}") from None
    if array.dtype == object:
        raise ValueError(
            f"{place}: expected a path, samples, a dict with 'array' and 'sampling_rate', or a sound file as bytes, "
            f"found {type(given).__name__}"
        )
    return array


def _one_channel(samples: NDArray[Any], place: str, in_list: bool) -> NDArray[np.float32]:
    """Mix samples of any type and order of axes to (S,) float32."""
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"{place}: expected floating samples in [-1, 1] or int16, found {samples.dtype}")
    if not np.isfinite(samples).all():
        raise ValueError(f"{place}: expected finite samples, found NaN or infinity")
    if samples.ndim == 1:
        return samples.astype(np.float32, copy=False)
    channels, length = sorted(samples.shape)[:2] if samples.ndim == 2 else (0, 0)
    if not 0 < channels <= MOST_CHANNELS or channels * _MOST_RATIO > length:
        raise ValueError(
            f"{place}: expected samples (S,), or (C, S) or (S, C) of up to {MOST_CHANNELS} channels, found "
            f"{samples.shape}; give list(x) for several recordings"
        )
    if not in_list and 1 < channels == samples.shape[0]:
        raise ValueError(
            f"{place}: an array {samples.shape} may be {channels} recordings, or one of {channels} channels; give "
            "list(x) for several recordings, [x] for one"
        )
    mixer = Mixer(channels)
    try:
        mono = mixer.mix(np.ascontiguousarray(samples.T if channels == samples.shape[0] else samples, dtype=np.float32))
        mixer.remarks()
    except BadAudioError as error:
        raise ValueError(f"{place}: {error}") from None
    return mono


def _read_sound(encoded: str | os.PathLike[str] | bytes, wanted_hz: int, place: str) -> tuple[NDArray[np.float32], int]:
    """Decode a sound file, or its content, and resample it: (S,) and the rate that it had."""
    with decoded(encoded, wanted_hz, place) as (rate, blocks):
        return np.concatenate([np.empty(0, dtype=np.float32), *blocks]), rate


def _not_empty(samples: NDArray[np.float32], place: str) -> NDArray[np.float32]:
    if not len(samples):
        raise ValueError(f"{place}: expected samples, found none")
    return samples


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
