"""Reports on the checkpoints of a run, and their removal; for the command `d2v2ds.checkpoints`.

Needs neither GPU, DeepSpeed nor process group.
"""

from pathlib import Path

from tqdm import tqdm

from d2v2ds.distributed.checkpoint.format import (
    BEST,
    LATEST,
    PARTIAL,
    Manifest,
    file_faults,
    finished_tags,
    named_tag,
    read_manifest,
    tags_without_manifest,
)
from d2v2ds.distributed.checkpoint.keep import Keep, remove, superseded_tags
from d2v2ds.errors import CheckpointError


def folder_of(run_dir: Path) -> Path:
    """Folder of a run's checkpoints.

    Raises:
        CheckpointError: there are none.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{run_dir}: expected a run with checkpoints, found no folder {folder}")
    return folder


def list_checkpoints(run_dir: Path) -> bool:
    """Print a table, newest first; returns whether every manifest can be read."""
    folder = folder_of(run_dir)
    latest, best, is_whole = named_tag(folder, LATEST), named_tag(folder, BEST), True
    print(f"{'checkpoint':<16} {'step':>9} {'GiB':>8} {'ranks':>5} {'stage':>5}  {'precision':<14} {'selection':>10}")
    for tag in finished_tags(folder):
        try:
            print(_line(read_manifest(folder / tag)), *(n for n, t in ((LATEST, latest), (BEST, best)) if t == tag))
        except CheckpointError as error:
            if (folder / tag).is_dir():  # else removed meanwhile, by the run
                print(f"{tag:<16} DAMAGED: {error}")
                is_whole = False
    for tag in tags_without_manifest(folder):
        print(f"{tag:<16} LOST: no manifest")
        is_whole = False
    for path in sorted(folder.glob(f"*{PARTIAL}")):
        print(f"{path.name}: being written, or left by a save that was interrupted; the next save clears it away")
    return is_whole


def _line(manifest: Manifest) -> str:
    gib = sum(record["bytes"] for record in manifest.files.values()) / 2**30
    selection = "" if manifest.validation_loss is None else f"{manifest.validation_loss:.5g}"
    precision = manifest.compute_dtype.removeprefix("torch.")
    return (
        f"{manifest.tag:<16} {manifest.counters['global_steps']:>9} {gib:>8.3f} {manifest.world_size:>5} "
        f"{manifest.stage:>5}  {precision:<14} {selection:>10}"
    )


def verify_checkpoints(run_dir: Path, tag: str | None) -> bool:
    """Read every byte, of one checkpoint or of all; print a line for each; returns whether all are whole."""
    folder = folder_of(run_dir)
    tags = [tag] if tag is not None else [*finished_tags(folder), *tags_without_manifest(folder)]
    if not tags:
        print(f"{folder}: no checkpoints")
    is_whole = True
    for one in tags:
        try:
            manifest = read_manifest(folder / one)
        except CheckpointError as error:
            faults = [str(error)]
        else:
            names = tqdm(sorted(manifest.files), desc=one, unit="file", leave=False, disable=None)
            faults = file_faults(folder / one, manifest, names)
        if faults and tag is None and not (folder / one).is_dir() and one not in tags_without_manifest(folder):
            print(f"{one}: removed meanwhile")
            continue
        print(f"{one}: {'whole' if not faults else 'DAMAGED'}")
        for fault in faults:
            print(f"  {fault}")
        is_whole = is_whole and not faults
    return is_whole


def prune_checkpoints(run_dir: Path, keep: Keep, dry_run: bool) -> None:
    """Remove what the policy does not keep, oldest first."""
    folder = folder_of(run_dir)
    for tag in superseded_tags(folder, keep):
        print(f"{'would remove' if dry_run else 'removing'} {folder / tag}")
        if not dry_run:
            remove(folder / tag)
    print("kept: " + ", ".join(finished_tags(folder)))
