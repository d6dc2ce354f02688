"""Make a model of a run: a folder that loads with `d2v2ds.load_model`, and goes on training with `init.weights`.

    python -m d2v2ds.export RUN --to FOLDER [--teacher] [--checkpoint TAG]
    python -m d2v2ds.export RUN --to NAME.safetensors [--teacher] [--checkpoint TAG]

A folder has the student, with --teacher the average beside it, the tokenizer and a card; a file has one of the two.
Where the run has lost its metrics or its starts, the model is written all the same, and a warning says what it lacks.
Reads the checkpoint tensor by tensor, whatever the number of ranks it was saved by: neither DeepSpeed, nor a process
group, nor memory for more than one tensor is needed. `interop/folder.py` says what lies in the folder.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.run.export import export

logger = logging.getLogger("d2v2ds.export")


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--to", type=Path, required=True, help="folder to write, or one file: NAME.safetensors")
    parser.add_argument("--teacher", action="store_true", help="the average too; in one file, it alone")
    parser.add_argument("--checkpoint", help="tag of a checkpoint; the newest if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        export(options.run, options.to, teacher=options.teacher, tag=options.checkpoint)
    except (D2V2Error, OSError) as error:
        logger.error("%s", error)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
