"""Manifests of fairseq's speech recipes: the first line is a folder, each other one ``path<TAB>samples``.

`examples/wav2vec/wav2vec_manifest.py` of fairseq writes them; paths are relative to the folder.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from d2v2ds.errors import ConfigError
from preprocessing.driver.input_files import listed, manifest_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class FairseqLine:
    """One recording of a manifest."""

    path: str
    """Path below the folder, as the manifest writes it."""
    full_path: str
    place: str
    """Place for a message: manifest, line and path."""
    samples: int


def read_fairseq_manifest(manifest: Path) -> list[FairseqLine] | None:
    """Read a manifest of fairseq; None if it is none, for it names columns or begins with a recording.

    Raises:
        ConfigError: its folder does not exist, or a line is no path and number; all such lines are named.
        MachineError: it cannot be read, for the machine is at fault.
    """
    root, *lines = manifest_lines(manifest) or [""]
    numbered = [(number, line.split("\t")) for number, line in enumerate(lines, start=2) if line.strip()]
    is_typical = bool(numbered) and _is_recording(numbered[0][1])
    if not root or "\t" in root or root == "path" or not (is_typical or os.path.isdir(_below(manifest, root))):  # noqa: PTH112
        return None
    folder = _below(manifest, root)
    if not os.path.isdir(folder):  # noqa: PTH112
        raise ConfigError(f"{manifest} line 1: expected the folder of the recordings, found no folder {root!r}")
    if wrong := [f"line {number}: {fields}" for number, fields in numbered if not _is_recording(fields)]:
        raise ConfigError(
            f"{manifest}: line 1 is a folder, so the other lines are expected to be a path, a tab and a number of "
            f"samples; found others:\n{listed(wrong, len(wrong))}"
        )
    return [
        FairseqLine(
            path=path,
            full_path=os.path.join(folder, path),  # noqa: PTH118
            place=f"{manifest} line {number}: {path}",
            samples=int(samples),
        )
        for number, (path, samples) in numbered
    ]


def _below(manifest: Path, path: str) -> str:
    """Path as the manifest means it: relative to itself."""
    return os.path.join(manifest.parent, path)  # noqa: PTH118


def _is_recording(fields: list[str]) -> bool:
    return len(fields) == 2 and bool(fields[0]) and fields[1].isascii() and fields[1].isdigit() and len(fields[1]) < 19
