"""Small synthetic images for the tests of the image packer."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth gradient with noise; all four corners differ."""
    rng = np.random.default_rng(seed)
    x, y = np.linspace(0, 200, width), np.linspace(0, 120, height)[:, None]
    channels = np.stack([x + 0 * y, y + 0 * x, 220 - x - 0.5 * y], axis=-1) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    """EXIF data that say nothing else."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file with these members, in order."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def class_folders(folder: Path, count: int = 36) -> Path:
    """`count` photos in three class folders, JPEG but every sixth, which is a PNG."""
    for number in range(count):
        path = folder / ("ape", "bee", "cow")[number % 3] / f"{number:03d}.{'png' if number % 6 == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(40 + number, 60, seed=number)
        path.write_bytes(encoded(image, "PNG" if path.suffix == ".png" else "JPEG"))
    return folder
