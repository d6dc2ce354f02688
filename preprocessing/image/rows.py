"""Turn units of images into rows: read the encoded bytes, decode them, re-encode large ones, annotate."""

import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from d2v2ds.data.codecs.imagefile import DecodeError, check_bytes, read_image_file, to_rgb, upright
from d2v2ds.data.codecs.pixels import ImageFacts, examine, facts_of, opened
from d2v2ds.errors import ConfigError, MachineError, ShardError
from d2v2ds.io.machine_faults import ADVICE
from preprocessing.driver.input_files import unreadable, utf8
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Skipped
from preprocessing.image.tables import open_table, table_rows
from preprocessing.image.tar_examples import LABEL_SUFFIXES, tar_examples
from preprocessing.image.tar_members import ArchiveError, TarFile, TarMember
from preprocessing.image.units import FileRun, ImageUnit, RowGroup, TarRun

PILLOW_MAX_PIXELS = 89_478_485
"""Pixels from which on Pillow warns of decompression bombs: a quarter of a GiB in RGB."""
_DRAFT_FACTOR = 2
"""A JPEG is decoded at a reduced scale that leaves so many times the wanted side: the rest is filtered away."""
LABEL_BYTES = 1 << 20
"""Longest label: a caption; longer ones are no labels."""


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
    is_label_missing: bool = False
    """It has no label, but its archive has labels that belong to no image."""


def rows_of(unit: ImageUnit, settings: ImageSettings, notes: Notes) -> Iterator[Row]:
    """The rows of one unit; images that turn out bad are noted in `notes`."""
    for number, found in enumerate(READERS[type(unit)](unit, settings)):
        try:
            if found.fault is not None:
                raise DecodeError(found.fault)
            data, facts = _decoded(found, settings)
        except DecodeError as error:
            notes.skipped.append(Skipped(order=unit.order + number, source=found.source, reason=str(error)))
            continue
        notes.counts["bytes"] += len(data)
        if found.is_label_missing:
            detail = "its archive has labels that belong to no image"
            notes.note("without label", detail, order=unit.order + number, source=found.source)
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


def _decoded(found: Found, settings: ImageSettings) -> tuple[bytes, ImageFacts]:
    """Decode an image; return what is stored of it.

    Raises:
        DecodeError: it does not decode.
        MachineError: the machine has no memory for it.
    """
    try:
        return reencode(found.data, settings) or (found.data, examine(found.data, settings.max_pixels))
    except MachineError as error:
        raise MachineError(f"{found.source}: {error}") from error
    except MemoryError as error:
        raise MachineError(f"{found.source}: {ADVICE[errno.ENOMEM]}") from error


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
            yield Found(source, id, read_image_file(path, settings.max_pixels), label)
        except DecodeError as error:
            cause = error.__cause__
            reason = unreadable(path, cause) if isinstance(cause, FileNotFoundError) else str(error)
            yield Found(source, id, b"", label, reason)


def _read_tar(unit: TarRun, settings: ImageSettings) -> Iterator[Found]:
    """Images of a part of a tar file with the labels of their keys; without such, the folder inside is the label."""
    with tar_faults(unit.path), TarFile(unit.path) as archive:
        for member, beside in tar_examples(archive, unit):
            source = utf8(f"{unit.source}/{member.name}")
            found = Found(source, source, b"", is_label_missing=unit.has_stray_labels and not beside)
            try:
                label = _tar_label(archive, beside, settings) if beside else folder_label(member.name)
                found.label = None if label is None else utf8(label)
            except ValueError as error:
                found.fault = f"its label is unreadable: {error}"
            if member.kind:
                found.fault = f"expected an image file, found {member.kind}; unpack the archive"
            elif found.fault is None:
                found.fault = _too_large(member.size, settings)
            if found.fault is None:
                found.data = archive.read(member.data, member.size)
            yield found


def _too_large(size: int, settings: ImageSettings) -> str | None:
    """Return why the bytes of an image are not read, None if they are."""
    try:
        check_bytes(size, settings.max_pixels)
    except DecodeError as error:
        return str(error)
    return None


@contextmanager
def tar_faults(path: str) -> Iterator[None]:
    """Raise a `ShardError` if an archive, which was whole when it was listed, is damaged now."""
    try:
        yield
    except ArchiveError as error:
        raise ShardError(
            f"{path}: {error}; the file changed while it was packed: run the same command again"
        ) from error


def _tar_label(archive: TarFile, beside: Mapping[str, TarMember], settings: ImageSettings) -> str | None:
    """Read the label of an image from the best member beside it.

    Raises:
        ValueError: the member holds none.
    """
    suffix = next(suffix for suffix in LABEL_SUFFIXES if suffix in beside)
    member = beside[suffix]
    if member.size > LABEL_BYTES:
        raise ValueError(f"expected at most {LABEL_BYTES:,} bytes, found {member.size:,}")
    data = archive.read(member.data, member.size)
    return json_label(data, settings.label_column) if suffix == "json" else data.decode().strip() or None


def json_label(data: bytes, column: str) -> str | None:
    """The label in a JSON object, None if it has none.

    Raises:
        ValueError: if this is no JSON object.
    """
    try:
        values = json.loads(data)
    except RecursionError:
        raise ValueError("values nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("no JSON object")
    value = values.get(column)
    return None if value is None else str(value)


def folder_label(name: str) -> str | None:
    """The label of a class folder: the folder that holds the file; None for files that lie in none."""
    return name.rpartition("/")[0].rpartition("/")[2] or None


def _read_table(unit: RowGroup, settings: ImageSettings) -> Iterator[Found]:
    """Images of a row group; behind damage, all rows that are left of it have a fault."""
    row = unit.first_row
    stop = row + unit.files
    fault: str | None = None
    try:
        with open_table(unit.path) as table:
            for data, label in table_rows(table, unit.number, settings.image_column, settings.label_column):
                source = f"{unit.source}#{row}"
                fault = "no bytes in this row" if data is None else _too_large(len(data), settings)
                if label is not None and len(label) > LABEL_BYTES:
                    fault, label = f"its label is unreadable: {len(label):,} characters", None
                row += 1
                yield Found(source, source, data or b"", None if label is None else utf8(label), fault)
    except ConfigError as error:
        fault = f"cannot be read: {error}"
    for left in range(row, stop):
        source = f"{unit.source}#{left}"
        yield Found(source, source, b"", None, fault or "fewer rows than the table states")


READERS: dict[type, Callable[[Any, ImageSettings], Iterator[Found]]] = {
    FileRun: _read_files,
    TarRun: _read_tar,
    RowGroup: _read_table,
}
