"""Evaluate a fine-tuned model on packed shards: error rates or scores with 95 % intervals.

    python -m d2v2ds.evaluate RUN_OR_EXPORT --shards DIR [--lm ARPA_OR_BINARY] [--lexicon FILE] [--decoder FILE]

Prints a table and writes evaluation.json, transcripts and pictures. Weights of the language model are those of the
official decoder: natural logarithms of the network, log10 of the language model.
"""

import argparse
import sys
from pathlib import Path

from d2v2ds.run.decoder_choice import add_arguments, choice_of
from d2v2ds.run.evaluation import EvaluationOptions, evaluate, table
from d2v2ds.run.reporting import reported


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a run, or an export")
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="packed folders with labels")
    parser.add_argument("--to", type=Path, help="folder for results (RUN/evaluation or EXPORT-evaluation)")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run; the best one by default")
    parser.add_argument("--device", help="such as cuda:0 or cpu")
    parser.add_argument("--draws", type=int, default=1000, help="sets of rows drawn for an interval (1000)")
    add_arguments(parser)
    given = parser.parse_args(arguments)

    def work() -> int:
        options = EvaluationOptions(
            shards=tuple(given.shards), to=given.to, tag=given.checkpoint, device=given.device, draws=given.draws,
            decoder=choice_of(given),
        )  # fmt: skip
        print("\n".join(table(evaluate(given.model, options))))
        return 0

    return reported(work)


if __name__ == "__main__":
    sys.exit(main())
