"""`verify` and `inspect` for images: decode every row; sizes, labels and a contact sheet."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, to_rgb, upright
from d2v2ds.data.codecs.pixels import examine, opened
from d2v2ds.data.schema import INDEX_NAME, Index
from d2v2ds.errors import MissingExtraError, ShardError
from d2v2ds.modalities.image.shards import ImageShards, pixel_limit
from preprocessing.driver.report_lines import distinct_line, fault, percentiles, sampled_labels, spread

_SHEET = (4, 8)
"""Rows and columns of the contact sheet."""
_THUMBNAIL = 160


def batch_faults(batch: pa.RecordBatch, index: Index, name: str, first: int) -> Iterator[str]:
    """Rows whose image does not decode, or is not what the columns say."""
    columns = ("format", "width", "height", "orientation")
    stated = list(zip(*(batch.column(column).to_pylist() for column in columns), strict=True))
    try:
        limit = pixel_limit(index)
    except ShardError as error:
        yield f"{INDEX_NAME}: {error}"
        return
    for row, image in enumerate(batch.column("image")):
        where = f"{name} row {first + row}"
        try:
            facts = examine(image.as_py(), limit)
        except DecodeError as error:
            yield fault(where, "image", f"a whole {stated[row][0]} file", error)
            continue
        found = (facts.format, facts.width, facts.height, facts.orientation)
        if found != stated[row]:
            yield fault(where, ", ".join(columns), stated[row], found)


def headline(index: Index) -> str:
    """Say whether images were re-encoded."""
    side, quality = index.format["shorter_side"], index.format["quality"]
    return f"re-encoded where the shorter side exceeded {side}, JPEG quality {quality}" if side else "encoded as found"


def lines(shards: ImageShards) -> list[str]:
    """Pixels, bytes, labels."""
    totals = shards.index.totals
    pixels, encoded = totals.get("pixels", 0), totals.get("bytes", 0)
    found = [f"images    {pixels / 1e6:,.1f} megapixels, {encoded / (1 << 20):,.1f} MiB encoded"]
    if len(shards):
        side = np.sqrt(shards.sizes)
        found.append("side      " + percentiles(side, "smallest", "largest", 0) + " (square root of pixels)")
        rows, of = sampled_labels(shards)
        found.append(distinct_line(rows, "label", of))
        common = Counter(row.label for row in rows if row.label is not None).most_common(5)
        if common:
            found.append("most      " + ", ".join(f"{label} {count:,}" for label, count in common) + of)
    return found


def thumbnail(shards: ImageShards, row: int) -> Image.Image:
    """A row as it is displayed, at most 160 pixels wide and high.

    Raises:
        DecodeError: if it does not decode.
    """
    stored = shards.read_image(row)
    with opened(bytes(stored.data)) as image:
        image.draft(image.mode, (_THUMBNAIL, _THUMBNAIL))
        image.load()
        picture = upright(to_rgb(image), stored.orientation)
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def plot(shards: ImageShards, path: Path) -> None:
    """Sizes of all images, and a contact sheet of some, evenly over the folder.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("--plot needs matplotlib", "eval") from error
    figure = Figure(figsize=(13, 10), layout="constrained")
    grid = figure.add_gridspec(_SHEET[0] + 2, _SHEET[1])
    sizes: Any = figure.add_subplot(grid[:2, :])
    sizes.hist(np.sqrt(shards.sizes), bins=80)
    sizes.set(title=f"{len(shards):,} images", xlabel="square root of the number of pixels", ylabel="images")
    for place, row in enumerate(spread(len(shards), _SHEET[0] * _SHEET[1])):
        axis: Any = figure.add_subplot(grid[2 + place // _SHEET[1], place % _SHEET[1]])
        axis.set_axis_off()
        try:
            axis.imshow(np.asarray(thumbnail(shards, row)))
            title = shards.read_labels(row).label or ""
        except DecodeError as error:
            title = str(error)
        axis.set_title(title[:20], fontsize=8)
    figure.savefig(path, dpi=100)
