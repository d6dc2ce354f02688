"""Classify images, sound files of any length, or lines of text with a fine-tuned model.

    python -m d2v2ds.classify RUN_OR_EXPORT FILES_OR_FOLDERS... [--top N] [--output FILE.jsonl]

Long recordings and texts are cut into windows, whose probabilities are averaged. Without --output JSON lines are
printed. Killed and started again, finished inputs are kept. Exit code 3: more than one in a hundred inputs could not be
read.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.run.file_inputs import EXIT_UNREAD
from d2v2ds.run.labelling import LabellingOptions, label
from d2v2ds.run.reporting import reported


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.classify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a fine-tuned run, or an export of one")
    parser.add_argument("inputs", type=Path, nargs="+", help="files, and folders that are searched for them")
    parser.add_argument("--output", type=Path, help="file of JSON lines")
    parser.add_argument("--top", type=int, default=5, help="classes that are named, the most likely ones (5)")
    parser.add_argument("--window-seconds", type=float, default=40.0, help="longest stretch read at once (40)")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run; the best one by default")
    parser.add_argument("--device", help="such as cuda:0 or cpu")
    given = parser.parse_args(arguments)

    def work() -> int:
        options = LabellingOptions(
            inputs=tuple(given.inputs), output=given.output, top=given.top, window_seconds=given.window_seconds,
            tag=given.checkpoint, device=given.device,
        )  # fmt: skip
        return 0 if label(given.model, options) else EXIT_UNREAD

    return reported(work, "with --output the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
