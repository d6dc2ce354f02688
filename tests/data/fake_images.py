"""Images made of noise with the spectrum of photographs, and a small dataset with the interface of `ImageShards`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2v2ds.data.codecs.pixels import SWAPS_SIDES
from d2v2ds.modalities.image.shards import EncodedImage


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(Y, X, 3) uint8: amplitudes fall with 1 / frequency, colours vary less and more slowly than brightness."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def field(steepness: float) -> np.ndarray:
        noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**steepness, (height, width))
        return noise / max(noise.std(), 1e-9)

    brightness = 128 + 50 * field(1.1)
    return np.stack([brightness + 20 * field(1.3) for _ in range(3)], axis=-1).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """An image file; JPEGs are of quality 87 with colours at half resolution unless told otherwise."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **({"quality": 87} | options if format == "JPEG" else options))
    return file.getvalue()


class FakeImages:
    """Encoded images in memory."""

    def __init__(self, files: Sequence[bytes], orientations: Sequence[int] | None = None) -> None:
        self.folder = Path("fake-images")
        self.files = list(files)
        self.orientations = list(orientations or [1] * len(files))
        sizes = [Image.open(io.BytesIO(data)).size for data in files]
        self.displayed = [
            size[::-1] if turn in SWAPS_SIDES else size for size, turn in zip(sizes, self.orientations, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def read_image(self, index: int) -> EncodedImage:
        width, height = self.displayed[index]
        return EncodedImage(
            data=memoryview(self.files[index]), orientation=self.orientations[index], width=width, height=height
        )
