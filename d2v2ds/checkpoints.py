"""Look after the checkpoints of a run, on a machine without GPU, DeepSpeed or process group.

    python -m d2v2ds.checkpoints list RUN
    python -m d2v2ds.checkpoints verify RUN [--tag TAG]
    python -m d2v2ds.checkpoints prune RUN --keep-last N [--keep-every STEPS] [--dry-run]

`list` reads the manifests only; `verify` reads every byte and compares sizes and checksums; `prune` removes what the
policy does not keep, never `latest` and `best`, and only from the whole ones. Do not prune a run that is running with
a policy of its own.

Exit codes: 0 all is well, 2 no such run or impossible options, 5 something is damaged.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from d2v2ds.distributed.checkpoint.format import (
    BEST,
    LATEST,
    PARTIAL,
    Manifest,
    candidate_tags,
    file_faults,
    lost_tags,
    named_tag,
    read_manifest,
)
from d2v2ds.distributed.checkpoint.keep import Keep, remove, superseded_tags
from d2v2ds.errors import CheckpointError

EXIT_USAGE, EXIT_DAMAGED = 2, 5


def folder_of(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie.

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
    print(f"{'checkpoint':<16} {'step':>9} {'GiB':>8} {'ranks':>5} {'stage':>5}  {'precision':<14} {'validation':>10}")
    for tag in candidate_tags(folder):
        try:
            print(_line(read_manifest(folder / tag)), *(n for n, t in ((LATEST, latest), (BEST, best)) if t == tag))
        except CheckpointError as error:
            print(f"{tag:<16} DAMAGED: {error}")
            is_whole = False
    for tag in lost_tags(folder):
        print(f"{tag:<16} LOST: no manifest")
        is_whole = False
    for path in sorted(folder.glob(f"*{PARTIAL}")):
        print(f"{path.name}: being written, or left by a save that was interrupted; the next save clears it away")
    return is_whole


def _line(manifest: Manifest) -> str:
    gib = sum(record["bytes"] for record in manifest.files.values()) / 2**30
    loss = "" if manifest.validation_loss is None else f"{manifest.validation_loss:.5g}"
    precision = manifest.compute_dtype.removeprefix("torch.")
    return (
        f"{manifest.tag:<16} {manifest.counters['global_steps']:>9} {gib:>8.3f} {manifest.world_size:>5} "
        f"{manifest.stage:>5}  {precision:<14} {loss:>10}"
    )


def verify_checkpoints(run_dir: Path, tag: str | None) -> bool:
    """Read every byte, of one checkpoint or of all; print a line for each; returns whether all are whole."""
    folder = folder_of(run_dir)
    tags = [tag] if tag is not None else [*candidate_tags(folder), *lost_tags(folder)]
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
    print("kept: " + ", ".join(candidate_tags(folder)))


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.checkpoints", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a table of all checkpoints")
    verifying = commands.add_parser("verify", help="read every byte and compare checksums")
    verifying.add_argument("--tag", help="only this one")
    pruning = commands.add_parser("prune", help="remove what is not to be kept")
    pruning.add_argument("--keep-last", type=int, required=True, metavar="N", help="newest ones that stay, 1 or more")
    pruning.add_argument("--keep-every", type=int, metavar="STEPS", help="those at multiples of it stay too")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    for one in (listing, verifying, pruning):
        one.add_argument("run", type=Path, help="folder of the run")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            return 0 if list_checkpoints(options.run) else EXIT_DAMAGED
        if options.command == "verify":
            return 0 if verify_checkpoints(options.run, options.tag) else EXIT_DAMAGED
        if options.keep_last < 1 or (options.keep_every is not None and options.keep_every < 1):
            parser.error("--keep-last and --keep-every must be 1 or more")
        prune_checkpoints(options.run, Keep(last=options.keep_last, every_steps=options.keep_every), options.dry_run)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
