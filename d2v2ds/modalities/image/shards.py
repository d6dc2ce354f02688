"""Rows of packed images: columns of their shards, and memory-mapped access. No torch."""

from dataclasses import dataclass

import pyarrow as pa

from d2v2ds.data.schema import Index, Layout, column
from d2v2ds.data.shards import Shards
from d2v2ds.errors import ShardError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
)
"""Suffixes of image files in folders; the content decides the format."""

IMAGE_LAYOUT = Layout(
    name="image",
    fields=(
        column("id", pa.large_string()),  # unique in the folder
        column("image", pa.large_binary()),  # an encoded image file
        column("width", pa.int32()),  # as displayed: after `orientation`
        column("height", pa.int32()),
        column("orientation", pa.int8()),  # EXIF: 1 to 8; what a reader still has to apply
        column("format", pa.large_string()),  # jpeg, png, ...
        column("label", pa.large_string(), nullable=True),
        column("source", pa.large_string()),  # path below the input; members of archives: ARCHIVE/MEMBER
    ),
    payload="image",
    size=("width", "height"),
    total="pixels",
    format=frozenset({"shorter_side", "quality", "alpha_over"}),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLabels:
    """Annotations of a row, without its image."""

    id: str
    label: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """The bytes of one image file and what decoding needs beside them."""

    data: memoryview
    """The file: a read-only view of the mapped shard."""
    orientation: int
    """EXIF orientation still to be applied, 1 to 8; 1 is upright."""
    width: int
    """Pixels, after `orientation`."""
    height: int


def pixel_limit(index: Index) -> int:
    """Return the most pixels of an image of a folder: its packer skipped larger ones.

    Raises:
        ShardError: the folder does not say it.
    """
    limit = index.settings.get("max_pixels")
    if type(limit) is not int or limit < 1:
        raise ShardError(f"expected a number of pixels as 'max_pixels' in 'settings' of the index, found {limit!r:.40}")
    return limit


class ImageShards(Shards):
    """Rows of a folder that `preprocessing.pack_images` has finished, by number."""

    layout = IMAGE_LAYOUT
    labels = ImageLabels

    def read_image(self, index: int) -> EncodedImage:
        """The encoded image of row `index`; nothing is decoded or copied.

        Raises:
            ShardError: the row is damaged, or it states what no packer writes.
        """
        batch, row = self.locate(index)
        data = batch.payload(row).data
        orientation, width, height = (batch.number(row, name) for name in ("orientation", "width", "height"))
        self.check_size(index, width * height)
        limit = pixel_limit(self.index)
        if not (1 <= orientation <= 8 and min(width, height) >= 1 and width * height <= limit):
            raise ShardError(
                f"{batch.where(row)}: expected an orientation of 1 to 8 and at most {limit:,} pixels, found "
                f"{orientation} and {width} x {height}; pack the folder again"
            )
        return EncodedImage(data=data, orientation=orientation, width=width, height=height)
