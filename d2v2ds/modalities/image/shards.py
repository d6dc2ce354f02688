"""Rows of packed images: columns of their shards, and memory-mapped access. No torch."""

from dataclasses import dataclass

import pyarrow as pa

from d2v2ds.data.schema import Layout, column
from d2v2ds.data.shards import Shards

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


class ImageShards(Shards):
    """Rows of a folder that `preprocessing.pack_images` has finished, by number."""

    layout = IMAGE_LAYOUT
    labels = ImageLabels

    def read_image(self, index: int) -> EncodedImage:
        """The encoded image of row `index`; nothing is decoded or copied."""
        batch, row = self.locate(index)
        data = batch.payload(row).data
        orientation, width, height = (batch.number(row, name) for name in ("orientation", "width", "height"))
        self.check_size(index, width * height)
        return EncodedImage(data=data, orientation=orientation, width=width, height=height)
