"""Images, as one object."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.data.reader import DataSettings
from d2v2ds.data.schema import Index
from d2v2ds.modalities.demo import Prepared
from d2v2ds.modalities.image.demo import prepare
from d2v2ds.modalities.image.inference import ImageInference
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.image.reader import IMAGES, ImageDataConfig, ImageReader
from d2v2ds.modalities.image.shards import ImageShards
from d2v2ds.modalities.inference import GraphInput, HubInput
from d2v2ds.modalities.modality import Baseline, Modality, ProbeDefaults
from d2v2ds.model.local import IMAGE_MEAN, IMAGE_STD
from d2v2ds.shapes import resized_side

PIXEL_SIDE = 16
"""The baseline averages images down to this many pixels a side."""


def pixels(images: Iterable[Tensor]) -> NDArray[np.float32]:
    """Averaged pixels, (N, 3 * side * side)."""
    found = []
    for image in images:
        small = min(PIXEL_SIDE, image.shape[-1])
        found.append(torch.nn.functional.adaptive_avg_pool2d(image[None].float(), small).flatten().numpy())
    return np.stack(found)


def _hub_files(preprocessing: dict[str, Any]) -> dict[str, dict[str, Any]]:
    side = preprocessing["side"]
    return {
        "image_processor": {
            "auto_map": {"AutoImageProcessor": "image_processing_d2v2ds.D2V2DSImageProcessor"},
            "image_processor_type": "D2V2DSImageProcessor",
            "size": {"shortest_edge": preprocessing["shorter_side"]},
            "crop_size": {"height": side, "width": side},
            "image_mean": list(preprocessing["mean"]),
            "image_std": list(preprocessing["std"]),
        }
    }


class Image(Modality):
    """Images: random resized crops; amounts in images."""

    name = "image"
    shards = ImageShards
    packer = "python -m preprocessing.pack_images"
    network = ImageNetwork
    data = ImageDataConfig
    reader = ImageReader
    unit = IMAGES
    probe = ProbeDefaults(c=0.1, neighbours=10)
    baseline = Baseline("pixels", pixels)
    hub = HubInput(
        argument="pixel_values",
        classifier="ImageClassification",
        example='features = extractor(["photo.jpg"])',
        is_padded=False,
        modules=lambda preprocessing: ["image_processing_d2v2ds"],
        files=_hub_files,
    )
    graph = GraphInput(
        axes=("batch",),
        padding=None,
        sizes=lambda network, tokens: [network.image_size],
        draw=lambda network, rows, size, generator: torch.randn(rows, 3, size, size, generator=generator),
    )

    def run_length(self, run: Any) -> float | None:
        """Images of `run.epochs` passes over `run.epoch_images`."""
        return None if run.epochs is None or run.epoch_images is None else run.epochs * run.epoch_images

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Images of any size."""
        return ImageDataConfig(shards=folder, global_batch_images=1, micro_batch_images=1)

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """RGB, the shorter side resized to `shorter_side`, the square of `side` in the middle, `mean` and `std`."""
        side = network.image_size
        return {"side": side, "shorter_side": resized_side(side), "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)}

    def prepare_demo(self, runs: Path, data: Path | None) -> Prepared:
        """Pack a sample, or the user's own data."""
        return prepare(runs, data)

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> ImageInference:
        """Image files and PIL images."""
        return ImageInference(network, preprocessing)


IMAGE = Image()
