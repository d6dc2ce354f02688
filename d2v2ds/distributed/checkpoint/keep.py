"""Choose the checkpoints to keep and remove the others. Needs neither DeepSpeed nor a process group."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from d2v2ds.distributed.checkpoint.format import (
    BEST,
    LATEST,
    PARTIAL,
    finished_tags,
    named_tag,
    read_manifest,
    steps_by_tag,
)
from d2v2ds.io import durable


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Rule for keeping checkpoints. `best` and the newest are always kept."""

    last: int | None = None
    """This many of the newest; None keeps all."""
    every_steps: int | None = None
    """Those whose step is a multiple of it, for good; None keeps none for its number."""


KEEP_ALL = Keep()


def superseded_tags(folder: Path, keep: Keep) -> list[str]:
    """Finished checkpoints that the policy does not keep, oldest first; never one that its owner moved and linked."""
    if keep.last is None:
        return []
    newest_first = finished_tags(folder)
    kept = {*newest_first[: max(keep.last, 1)], named_tag(folder, LATEST), named_tag(folder, BEST)}
    dropped = [tag for tag in reversed(newest_first) if tag not in kept and not (folder / tag).is_symlink()]
    if keep.every_steps is None:
        return dropped
    steps = steps_by_tag(folder)
    return [tag for tag in dropped if steps[tag] % keep.every_steps]


def remove(path: Path) -> None:
    """Delete a checkpoint; under another name first, so that a removal that is interrupted leaves no half one."""
    doomed = path.with_name(f"{path.name}.old{PARTIAL}")
    remove_tree(doomed)
    path.rename(doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Delete a folder, a file or a link; what a link leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def abandon_after(folder: Path, tag: str) -> None:
    """Make a checkpoint the newest again, and remove those of later steps."""
    newest = read_manifest(folder / tag).counters["global_steps"]
    steps = steps_by_tag(folder)
    durable.replace_text(folder / LATEST, tag)
    for other, step in steps.items():
        if step > newest:
            remove(folder / other)
