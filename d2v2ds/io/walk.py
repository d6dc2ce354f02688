"""Search of folders for input files of certain suffixes."""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error


def walk(root: Path, suffixes: Collection[str], ignored: Counter[str]) -> list[tuple[str, list[str]]]:
    """Folders below `root` that hold files of these suffixes (lower case), with the files' names; all sorted.

    Links are followed, each real folder is entered once, hidden files and folders are left out. Files of other
    suffixes are counted by these in `ignored`.

    Raises:
        ConfigError: a folder cannot be read; what it holds would be missing without a trace.
        MachineError: the machine is at fault.
    """

    def refuse(error: OSError) -> None:
        if is_machine_fault(error):
            raise reading_error(error.filename, error, ConfigError) from error
        raise ConfigError(
            f"{root}: {error.filename} cannot be read: {error.strerror}; allow it, or give folders without it"
        ) from error

    found = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kept = []
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  (300,000 files)
            if name.startswith("."):
                continue
            if suffix in suffixes:
                kept.append(name)
            else:
                ignored[suffix] += 1
        if kept:
            found.append((folder, sorted(kept)))
    return sorted(found)
