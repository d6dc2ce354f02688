"""Pack images into Arrow shards: ``python -m preprocessing.pack_images --input PATH --output DIR``.

Inputs are folders (the folder that holds a file is its label), TSV manifests, tar files and parquet tables. Encoded
bytes are kept as they are unless --shorter-side re-encodes what is larger. Killed and started again with the same
command, it keeps finished shards and ends with the same bytes.

Exit codes: 0 done; 2 wrong input or settings, nothing was packed; 3 the folder is complete, but all files or more
than --max-skipped were skipped, or notes on more than --max-noted of the content; 4 a file could not be written, an
input vanished or the machine failed, run again; 130 interrupted, run again.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from d2v2ds.data.codecs.imagefile import ALPHA_OVER
from d2v2ds.data.schema import Index
from d2v2ds.errors import ConfigError
from d2v2ds.modalities.image.shards import IMAGE_LAYOUT, IMAGE_SUFFIXES
from preprocessing.driver.command import common_parser, run
from preprocessing.driver.input_files import check_present, check_unique, listed, utf8
from preprocessing.driver.packing import read_all
from preprocessing.driver.progress import MEBIBYTES
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Noted, Plan, cut_shards, fingerprint
from preprocessing.driver.team.protocol import Team
from preprocessing.image.find import ArchiveScan, file_sizes, find_images, make_units, part_bytes
from preprocessing.image.rows import ImageSettings, rows_of
from preprocessing.image.units import MISSING, Archive, ArchiveFacts, FileRun, ImageUnit, Listing

_FILES_PER_JOB = 1 << 15
"""Files whose size one process asks for in one go: less does not pay for starting it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    settings = ImageSettings(
        shorter_side=options.shorter_side,
        quality=options.quality,
        max_pixels=options.max_pixels,
        shard_bytes=options.shard_bytes,
        label_column=options.label_column,
        image_column=options.image_column,
    )
    return run(ImagePacker(settings), options, arguments)


@dataclass(frozen=True)
class ImagePacker:
    """Images to rows; the methods are those of `preprocessing.driver.protocol.Packer`."""

    settings: ImageSettings
    layout = IMAGE_LAYOUT
    measure = MEBIBYTES

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        """List files, their sizes and the parts of archives; no image is opened."""
        settings = self.settings
        ignored: Counter[str] = Counter()  # by the leader
        found = team.share(lambda: find_images(inputs, settings.label_column, ignored))
        paths = [path for one in found if isinstance(one, Listing) for path in one.paths()]
        sizes = read_all(team, file_sizes, paths, "listing", _FILES_PER_JOB) if paths else []
        archives = [one for one in found if isinstance(one, Archive)]
        scan = ArchiveScan(
            part_bytes=part_bytes(settings.shard_bytes),
            image_column=settings.image_column,
            label_column=settings.label_column,
        )
        facts = read_all(team, scan, archives, "reading archives", items_per_job=1) if archives else []
        for one in facts:
            ignored.update(one.left_out)
        return team.share(lambda: replace(_make_plan(found, sizes, facts, settings, len(inputs)), ignored=ignored))

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Nothing lies beside images."""
        return ()

    def format(self, folder: Path) -> dict[str, Any]:
        """Settings of re-encoding, and the colour behind transparent pixels."""
        settings = self.settings
        return {
            "shorter_side": settings.shorter_side,
            "quality": settings.quality if settings.shorter_side else None,
            "alpha_over": list(ALPHA_OVER),
        }

    def rows(self, units: Sequence[ImageUnit], folder: Path, notes: Notes) -> Iterator[Row]:
        """Every image, decoded once to see that it is whole, and perhaps re-encoded."""
        for unit in units:
            yield from rows_of(unit, self.settings, notes)
            notes.report(unit.files, unit.size)

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        """Pixels as displayed, and bytes of the encoded images."""
        return {"pixels": size, "bytes": counts.get("bytes", 0)}

    def describe(self, index: Index) -> str:
        """Pixels, and whether images were re-encoded."""
        side = index.format["shorter_side"]
        kept = f"shorter side {side} at most (JPEG quality {index.format['quality']})" if side else "kept as they were"
        return f"{index.totals['pixels'] / 1e6:,.1f} megapixels, {kept}"

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decode and re-encode."""
        jpeg = features.version("libjpeg_turbo") or features.version("jpg")
        return {"pillow": PIL.__version__, "libjpeg": str(jpeg)}


def _make_plan(
    found: Sequence[Listing | Archive],
    sizes: Sequence[int],
    facts: Sequence[ArchiveFacts],
    settings: ImageSettings,
    num_inputs: int,
) -> Plan:
    listings = [one for one in found if isinstance(one, Listing)]
    places = [place for one in listings for place in one.places or [""] * len(one.names)]
    check_present([place for place, size in zip(places, sizes, strict=True) if place and size == MISSING])
    units = make_units(found, sizes, facts, settings.shard_bytes)
    if not any(unit.files for unit in units):
        paths = [one.path for one in found if isinstance(one, Archive)]
        raise ConfigError(
            f"expected images, found none in {len(paths)} archives; of tar files, members whose suffix is one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} count, of tables all rows:\n{listed(paths, len(paths))}"
        )
    if num_inputs > 1 or any(one.ids for one in listings):  # names of one folder are unique as they are
        check_unique(_ids(found, units))
    return Plan(
        shards=cut_shards(units, settings.shard_bytes),
        skipped=(),
        files=sum(unit.files for unit in units),
        sha256=fingerprint(chain((unit.identity for unit in units), sizes, (fact.bytes for fact in facts))),
        noted=tuple(_left_out(found, facts)),
    )


def _left_out(found: Sequence[Listing | Archive], facts: Sequence[ArchiveFacts]) -> Iterator[Noted]:
    """Yield a note for each archive of which members are not read."""
    for order, (archive, fact) in enumerate(
        zip((one for one in found if isinstance(one, Archive)), facts, strict=True)
    ):
        if fact.left_out:
            detail = ", ".join(f"{count:,} {kind or 'without suffix'}" for kind, count in sorted(fact.left_out.items()))
            yield Noted(order=order, source=archive.source, kind="archives with other members", detail=detail, lost=0.0)


def _ids(found: Sequence[Listing | Archive], units: Sequence[ImageUnit]) -> Iterator[tuple[str, str]]:
    """(id, place) of every file, and of every archive, whose members have ids of their own."""
    for unit in units:
        if isinstance(unit, FileRun):
            for number, name in enumerate(unit.names):
                yield (unit.ids and unit.ids[number]) or utf8(name), f"{unit.root}/{name}"
    for one in found:
        if isinstance(one, Archive):
            yield one.source, one.path


def _parser() -> argparse.ArgumentParser:
    defaults = ImageSettings()
    parser = common_parser("images", __doc__, "PATH", "folders, TSV manifests, tar files, parquet tables")
    add = parser.add_argument
    add("--shorter-side", type=int, metavar="PIXELS", help="re-encode images whose shorter side is larger, to it")
    add("--quality", type=int, default=defaults.quality, help="JPEG quality of these (%(default)s)")
    add("--max-pixels", type=int, default=defaults.max_pixels, metavar="N", help="skip larger images (%(default)s)")
    add("--label-column", default=defaults.label_column, metavar="NAME",
        help="of manifests, parquet tables and JSON in tar files (%(default)s)")  # fmt: skip
    add("--image-column", default=defaults.image_column, metavar="NAME", help="of parquet tables (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
