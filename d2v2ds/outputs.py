"""Count the letters or classes of packed rows, or train sentencepiece units, and write them for `objective.outputs`.

    python -m d2v2ds.outputs SHARDS... --config finetune/ctc_tiny --to letters.json
    python -m d2v2ds.outputs SHARDS... --config finetune/ctc_tiny --units 500 --to units.model

A fine-tuning run does so itself. The file is for several runs that are to have the same outputs.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.run.outputs import count_annotations, write_outputs
from d2v2ds.run.units import write_trained
from d2v2ds.tasks.encoding import TaskConfig


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.outputs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path, nargs="+", help="packed folders with transcripts or labels")
    parser.add_argument("--config", required=True, help="configuration of the task: which column, which order")
    parser.add_argument("--units", type=int, metavar="N", help="of ctc: N pieces of words, a sentencepiece model")
    parser.add_argument("--to", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        task = load_config(options.config).objective
        if not isinstance(task, TaskConfig):
            raise ConfigError(f"--config {options.config}: expected a fine-tuning task, found {task.name}")
        found = count_annotations(options.shards, task.label_column)
        names = task.names_of(found) if options.units is None else write_trained(options.to, found, task, options.units)
        if options.units is None:
            write_outputs(options.to, names)
    except D2V2Error as error:
        logging.error("%s", error)
        return error.exit_code
    logging.info("%s: %d outputs, %s", options.to, len(names), " ".join(names[:40]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
