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
from d2v2ds.errors import ConfigError
from d2v2ds.run.outputs import count_annotations, write_outputs
from d2v2ds.run.reporting import reported
from d2v2ds.run.units import write_trained
from d2v2ds.tasks.encoding import TaskConfig


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.outputs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path, nargs="+", help="packed folders with transcripts or labels")
    parser.add_argument("--config", required=True, help="configuration of the task: which column, which order")
    parser.add_argument("--units", type=int, metavar="N", help="of ctc: N pieces of words, a sentencepiece model")
    parser.add_argument("--to", type=Path, required=True, help="file to write")
    given = parser.parse_args(arguments)

    def work() -> int:
        task = load_config(given.config).objective
        if not isinstance(task, TaskConfig):
            raise ConfigError(f"--config {given.config}: expected a fine-tuning task, found {task.name}")
        found = count_annotations(given.shards, task.label_column)
        if given.units is None:
            names = task.names_of(found)
            write_outputs(given.to, names)
        else:
            names = write_trained(given.to, found, task, given.units)
        logging.info("%s: %d outputs, %s", given.to, len(names), " ".join(names[:40]))
        return 0

    return reported(work)


if __name__ == "__main__":
    sys.exit(main())
