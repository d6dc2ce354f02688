"""Look after the checkpoints of a run, on a machine without GPU, DeepSpeed or process group.

    python -m d2v2ds.checkpoints list RUN
    python -m d2v2ds.checkpoints verify RUN [--tag TAG]
    python -m d2v2ds.checkpoints prune RUN --keep-last N [--keep-every STEPS] [--dry-run]

`list` reads manifests only. Its column `selection` has the value by which `best` is chosen, the lower the better: the
validation loss, the word error rate, or 100 less the mean of the scores that `objective.select` names.
`verify` reads every byte; `prune` removes whole checkpoints that the policy does not keep, never `latest` and `best`.
Do not prune while the run is running.

Exit codes: 0 all is well, 2 no such run or impossible options, 5 something is damaged, 8 a fault of the machine.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.distributed.checkpoint.keep import Keep
from d2v2ds.distributed.checkpoint.report import list_checkpoints, prune_checkpoints, verify_checkpoints
from d2v2ds.errors import CheckpointError, D2V2Error, MachineError


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
            return 0 if list_checkpoints(options.run) else CheckpointError.exit_code
        if options.command == "verify":
            return 0 if verify_checkpoints(options.run, options.tag) else CheckpointError.exit_code
        if options.keep_last < 1 or (options.keep_every is not None and options.keep_every < 1):
            parser.error("--keep-last and --keep-every must be 1 or more")
        prune_checkpoints(options.run, Keep(last=options.keep_last, every_steps=options.keep_every), options.dry_run)
    except (D2V2Error, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
