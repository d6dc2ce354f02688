"""Comparisons of a folder of golden vectors besides its cases: statistics, schedules, scores, decoding."""

from collections.abc import Callable
from pathlib import Path

from d2v2ds.errors import D2V2Error
from d2v2ds.verify.data2vec1 import masks
from d2v2ds.verify.finetuning.check import TABLES as OF_FINETUNING
from d2v2ds.verify.report import Report

TABLES: dict[str, tuple[tuple[str, ...], Callable[[Path, Report], None]]] = {
    **OF_FINETUNING,
    masks.NAME: ((f"{masks.NAME}.json", f"{masks.NAME}.safetensors"), masks.check_first_masks),
}
"""Name -> files of which one is enough to ask for it, and the comparison."""


def tables(folder: Path) -> list[str]:
    """List the comparisons, besides cases, of a folder."""
    return [name for name, (files, _) in TABLES.items() if any((folder / file).exists() for file in files)]


def check_table(folder: Path, name: str, report: Report) -> None:
    """Run one of `tables`.

    Raises:
        D2V2Error: its files are incomplete.
    """
    _, check = TABLES[name]
    check(folder, report)
    if not report.errors:
        raise D2V2Error(f"{name}: nothing to compare")
