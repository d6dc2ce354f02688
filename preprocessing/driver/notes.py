"""Notes on files that are in the shards, but not as they were: counts for the index, the summary, and the limit.

A packer calls `Notes.note` wherever it loses something of a file without skipping it: samples that are clipped, members
of an archive that are left out, unknown tokens. The driver writes all notes to ``notes.tsv`` and counts them in
``index.json``; `pack` exits 3 if the files of one kind lost more than ``--max-noted`` of the folder.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

from d2v2ds.data.schema import Index
from preprocessing.driver.shard_plan import Noted

NOTES_NAME = "notes.tsv"
"""Table of all notes; absent if there are none."""
FILES = "files"
"""Key of a kind in `Index.notes`: number of files that have such a note."""
LOST = "lost"
"""Key of a kind in `Index.notes`: share of the folder that is lost, the mean of `Noted.lost` over all input files."""


def count_notes(noted: Iterable[Noted], files: int) -> dict[str, dict[str, float]]:
    """Return `Index.notes`. Of several notes of one kind on one file the one that lost most counts.

    Args:
        noted: all notes of a packing.
        files: number of input files.
    """
    worst: defaultdict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    for one in noted:
        if not 0 <= one.lost <= 1:
            raise ValueError(f"{one.source}: {one.kind}: expected a lost share from 0 to 1, found {one.lost}")
        file = one.order, one.source
        worst[one.kind][file] = max(one.lost, worst[one.kind].get(file, 0.0))
    return {
        kind: {FILES: len(lost), LOST: math.fsum(lost.values()) / max(1, files)} for kind, lost in sorted(worst.items())
    }


def said_notes(index: Index) -> str:
    """Return ``3 clipped (0.52% of the content), 1 streamed``; empty if there are no notes."""
    return ", ".join(
        f"{kind['files']:,} {name}" + (f" ({_percent(kind['lost'])} of the content)" if kind["lost"] else "")
        for name, kind in index.notes.items()
    )


def excess_notes(index: Index, most: float) -> str:
    """Return which kinds of notes lost more than a share of the folder; empty if none did."""
    above = [f"{name} {_percent(kind['lost'])}" for name, kind in index.notes.items() if kind["lost"] > most]
    return f"too much of the content has notes ({', '.join(above)}), --max-noted allows {most:.2%}" if above else ""


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.00005 else "less than 0.01%"
