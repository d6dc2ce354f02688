"""Turn units of images into rows: read the encoded bytes, decode them, re-encode large ones, annotate."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, to_rgb, upright
from d2v2ds.data.codecs.pixels import ImageFacts, examine, facts_of, opened
from d2v2ds.errors import ConfigError
from preprocessing.driver.input_files import unreadable, utf8
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Skipped
from preprocessing.image.find import (
    LABEL_SUFFIXES,
    FileRun,
    ImageUnit,
    RowGroup,
    TarRun,
    class_names,
    folder_label,
    is_image_member,
    json_label,
    member_key,
    tar_members,
)

PILLOW_MAX_PIXELS = 89_478_485
"""Pixels from which on Pillow warns of decompression bombs: a quarter of a GiB in RGB."""
_DRAFT_FACTOR = 2
"""A JPEG is decoded at a reduced scale that leaves so many times the wanted side: the rest is filtered away."""
_TABLE_BATCH_ROWS = 64
_TABLE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The options that change the bytes of a shard folder."""

    shorter_side: int | None = None
    """Pixels; images whose shorter side is larger are re-encoded to it. None keeps all as they are."""
    quality: int = 90
    """JPEG quality of re-encoded images, 1 to 100."""
    max_pixels: int = PILLOW_MAX_PIXELS
    """Larger images are skipped."""
    shard_bytes: int = 256 << 20
    """Planned size of a shard, before re-encoding."""
    label_column: str = "label"
    """Column of manifests and parquet tables, or key in JSON members of tar files, stored as label."""
    image_column: str = "image"
    """Column of parquet tables."""

    def check(self) -> None:
        """Raise a `ConfigError` that names every setting that cannot work."""
        faults = []
        if self.shorter_side is not None and self.shorter_side < 1:
            faults.append(f"--shorter-side {self.shorter_side} must be positive")
        if not 1 <= self.quality <= 100:
            faults.append(f"--quality {self.quality} must be 1 to 100")
        if self.max_pixels < 1:
            faults.append(f"--max-pixels {self.max_pixels} must be positive")
        if self.shard_bytes < 1:
            faults.append(f"--shard-bytes {self.shard_bytes} must be positive")
        if faults:
            raise ConfigError("\n".join(faults))

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in ``index.json``."""
        return dict(vars(self))


@dataclass(slots=True)
class Found:
    """One image as its input has it."""

    source: str
    id: str
    data: bytes
    label: str | None = None
    fault: str | None = None
    """Reason why it cannot be read."""


def rows_of(unit: ImageUnit, settings: ImageSettings, notes: Notes) -> Iterator[Row]:
    """The rows of one unit; images that turn out bad are noted in `notes`."""
    for number, found in enumerate(READERS[type(unit)](unit, settings)):
        try:
            if found.fault is not None:
                raise DecodeError(found.fault)
            data, facts = reencode(found.data, settings) or (found.data, examine(found.data, settings.max_pixels))
        except DecodeError as error:
            notes.skipped.append(Skipped(order=unit.order + number, source=found.source, reason=str(error)))
            continue
        notes.counts["bytes"] += len(data)
        yield Row(
            data,
            {
                "id": found.id,
                "width": facts.width,
                "height": facts.height,
                "orientation": facts.orientation,
                "format": facts.format,
                "label": found.label,
                "source": found.source,
            },
        )


def reencode(data: bytes, settings: ImageSettings) -> tuple[bytes, ImageFacts] | None:
    """A smaller JPEG of the same picture: upright, RGB, Lanczos filter. None if the image is kept as it is.

    Raises:
        DecodeError: it does not decode.
    """
    side = settings.shorter_side
    if side is None:
        return None
    with opened(data, settings.max_pixels) as image:
        short = min(image.size)
        if short <= side:
            return None
        facts = facts_of(image)
        width, height = (round(length * side / short) for length in (facts.width, facts.height))
        stored_width, stored_height = (-(-length * _DRAFT_FACTOR * side // short) for length in image.size)
        image.draft(image.mode, (stored_width, stored_height))
        smaller = upright(to_rgb(image), facts.orientation).resize((width, height), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        smaller.save(stream, format="JPEG", quality=settings.quality)
    return stream.getvalue(), ImageFacts("jpeg", width, height, 1)


def _read_files(unit: FileRun, settings: ImageSettings) -> Iterator[Found]:
    for number, name in enumerate(unit.names):
        source = utf8(name)
        id, label = source, utf8(folder_label(name) or "") or None
        if unit.ids is not None and unit.labels is not None:
            id, label = unit.ids[number] or source, unit.labels[number]
        path = os.path.join(unit.root, name)  # noqa: PTH118  (a million)
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                yield Found(source, id, file.readall(), label)
        except OSError as error:
            yield Found(source, id, b"", label, unreadable(path, error))


def _read_tar(unit: TarRun, settings: ImageSettings) -> Iterator[Found]:
    """Images of a part of a tar file with the labels of their keys; without such, the folder inside is the label."""
    descriptor = os.open(unit.path, os.O_RDONLY)
    try:
        group: list[tuple[str, bytes]] = []
        key = None
        for member in tar_members(unit.path, unit.start):
            if member.offset >= unit.stop:
                break
            if member_key(member.name) != key:
                yield from _found_in_group(unit, group, settings)
                group, key = [], member_key(member.name)
            if is_image_member(member.name) or _suffix(member.name) in LABEL_SUFFIXES:
                group.append((member.name, os.pread(descriptor, member.size, member.offset_data)))
        yield from _found_in_group(unit, group, settings)
    finally:
        os.close(descriptor)


def _found_in_group(unit: TarRun, group: list[tuple[str, bytes]], settings: ImageSettings) -> Iterator[Found]:
    """The images among members of one key."""
    beside = {_suffix(name): data for name, data in group if not is_image_member(name)}
    for name, data in group:
        if is_image_member(name):
            source = utf8(f"{unit.source}/{name}")
            label, fault = folder_label(name), None
            try:
                if "cls" in beside:
                    label = beside["cls"].decode().strip() or None
                elif "json" in beside:
                    label = json_label(beside["json"], settings.label_column)
                elif "txt" in beside:
                    label = beside["txt"].decode().strip() or None
            except ValueError as error:
                fault = f"its label is unreadable: {error}"
            yield Found(source, source, data, None if label is None else utf8(label), fault)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()  # noqa: PTH122


def _read_table(unit: RowGroup, settings: ImageSettings) -> Iterator[Found]:
    # without these two, the whole row group is read before its first row comes out
    with pq.ParquetFile(unit.path, pre_buffer=False, buffer_size=_TABLE_BUFFER_BYTES) as table:
        labelled = settings.label_column in table.schema_arrow.names
        names = class_names(table.schema_arrow, settings.label_column)
        columns = [settings.image_column, *([settings.label_column] if labelled else [])]
        batches = table.iter_batches(_TABLE_BATCH_ROWS, row_groups=[unit.number], columns=columns, use_threads=False)
        row = unit.first_row
        for batch in batches:
            images = batch.column(settings.image_column)
            labels = batch.column(settings.label_column).to_pylist() if labelled else [None] * batch.num_rows
            for image, label in zip(images, labels, strict=True):
                value = image.as_py()
                data = value.get("bytes") if isinstance(value, dict) else value
                source = f"{unit.source}#{row}"
                fault = "no bytes in this row" if data is None else None
                yield Found(source, source, data or b"", _label_of(label, names), fault)
                row += 1


def _label_of(value: Any, names: list[str] | None) -> str | None:
    if value is None:
        return None
    if names and isinstance(value, int) and 0 <= value < len(names):
        return utf8(names[value])
    return utf8(str(value))


READERS: dict[type, Callable[[Any, ImageSettings], Iterator[Found]]] = {
    FileRun: _read_files,
    TarRun: _read_tar,
    RowGroup: _read_table,
}
