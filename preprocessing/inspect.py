"""Totals and a picture of a shard folder: ``python -m preprocessing.inspect DIR [--plot report.png]``.

The figure shows sizes and examples: of audio durations, levels and log-mel pictures, of images a contact sheet.
Exit codes: 0, or 2 if the folder cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v2ds.data.schema import SKIPPED_NAME, Index
from d2v2ds.errors import D2V2Error
from preprocessing.driver.notes import NOTES_NAME, said_notes
from preprocessing.formats import format_of, open_shards

EXIT_UNREADABLE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figure")
    options = parser.parse_args(arguments)
    try:
        shards = open_shards(options.folder)
        print(summary(options.folder, shards))
        if options.plot:
            format_of(shards.index.modality, options.folder).report().plot(shards, options.plot)
            print(f"figure: {options.plot}")
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0


def summary(folder: Path, shards: Any) -> str:
    """The totals, several lines."""
    index: Index = shards.index
    report = format_of(index.modality, folder).report()
    size = sum(entry.bytes for entry in index.shards)
    lines = [
        f"{folder}: {index.modality}, {report.headline(index)}",
        f"  rows      {index.rows:,} in {len(index.shards)} shards, {size / (1 << 20):,.1f} MiB",
        f"  files     {index.files:,}, of these skipped {index.files_skipped:,} (reasons in {SKIPPED_NAME})",
    ]
    if index.notes:
        lines.append(f"  notes     {said_notes(index)} (files in {NOTES_NAME})")
    return "\n".join([*lines, *(f"  {line}" for line in report.lines(shards))])


if __name__ == "__main__":
    sys.exit(main())
