"""What has to happen to an input before a model reads it, as plain values that travel with the weights."""

from collections.abc import Callable
from typing import Any

from d2v2ds.model.local import IMAGE_MEAN, IMAGE_STD
from d2v2ds.model.trunk import ModelConfig
from d2v2ds.shapes import AUDIO_NORM_EPS, resized_side

Preprocessing = dict[str, dict[str, Any]]
"""Modality -> its settings; every one of them is read by `d2v2ds.api` and by the hub files."""


def _audio(config: Any) -> dict[str, Any]:
    return {"sample_rate_hz": 16000, "variance_eps": AUDIO_NORM_EPS}


def _image(config: Any) -> dict[str, Any]:
    side = config.image_size
    return {"side": side, "shorter_side": resized_side(side), "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)}


def _text(config: Any) -> dict[str, Any]:
    return {"tokenizer": None, "file": None, "max_tokens": config.max_tokens}


DESCRIBED_BY: dict[str, Callable[[Any], dict[str, Any]]] = {"audio": _audio, "image": _image, "text": _text}


def published_preprocessing(model: ModelConfig) -> Preprocessing:
    """The published one of each modality of a model (spec section 14); text still lacks its tokenizer.

    audio: mono at `sample_rate_hz`, zero mean and unit variance over the recording. image: RGB, the shorter side
    resized to `shorter_side` (bicubic), the square of `side` in the middle, then `mean` and `std`. text: `file` holds
    the tokenizer, whose kind is `tokenizer`; <s> in front, </s> at the end.
    """
    return {name: DESCRIBED_BY[name](config) for name, config in model.modalities.active().items()}
