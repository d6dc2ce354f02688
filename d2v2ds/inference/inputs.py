"""What a user holds in hand -> what a model reads: recordings, pictures and texts outside of any shard.

The same preprocessing as training sees through the shards, with the settings that travel with the weights. A
`ValueError` says which input is wrong and what was expected.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import MissingExtraError
from d2v2ds.modalities.image.reader import resize, whole_view
from d2v2ds.modalities.text.tokenizers import BOS, EOS, Tokenizer

_MOST_CHANNELS = 32


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
    """(S,) with zero mean and unit variance over the whole recording, as in training (spec section 14)."""
    wide = samples.astype(np.float64)
    scale = 1.0 / np.sqrt(wide.var() + variance_eps)
    return torch.from_numpy(((wide - wide.mean()) * scale).astype(np.float32))


def read_picture(given: Any, side: int, place: str) -> Tensor:
    """The middle of a picture.

    Args:
        given: path of an image file, or a `PIL.Image.Image`; its EXIF orientation is applied.
        side: of the square that the model reads (pixels).
        place: how messages call the input.

    Returns:
        (3, side, side) uint8.

    Raises:
        ValueError: it is no picture, a damaged one, or one that packing would skip.
        MissingExtraError: Pillow is not installed.
    """
    from d2v2ds.data.codecs.imagefile import DecodeError, read_rgb  # here, so that other modalities need no Pillow

    try:
        rgb = read_rgb(given)
    except DecodeError as error:
        raise ValueError(f"{place}: cannot be decoded as a picture: {error}") from error
    view = whole_view(rgb.width, rgb.height, side)
    return view.middle(resize(np.array(rgb.crop(view.box)), *view.size), side)


def token_ids(text: str, tokenizer: Tokenizer, place: str) -> Tensor:
    """(S,) int64 ids of a text, <s> in front and </s> at its end.

    Raises:
        ValueError: nothing is left of it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: expected text, found half a character of UTF-16: {error}") from error
    ids, _ = tokenizer.encode([text])
    if not len(ids):
        raise ValueError(f"{place}: expected text, found {text!r}, of which the tokenizer makes no token")
    return torch.from_numpy(np.concatenate(([BOS], ids, [EOS])).astype(np.int64))


def given_ids(given: Any, vocab_size: int, place: str) -> Tensor:
    """(S,) int64 ids that the user has made, with <s> and </s>, as they are.

    Args:
        given: array or tensor (S,) of whole numbers.
        vocab_size: of the model.
        place: how messages call the input.

    Raises:
        ValueError: it is something else, or an id is not one of the model's.
    """
    ids = np.asarray(given.numpy(force=True) if isinstance(given, Tensor) else given)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{place}: expected a string, or ids (S,) as array or tensor, found {type(given).__name__} "
            f"of {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{place}: ids from {ids.min()} to {ids.max()}, the model has 0 to {vocab_size - 1}")
    return torch.from_numpy(ids.astype(np.int64))
