"""Evaluate a fine-tuned model on packed shards: error rates or scores with 95 % intervals.

    python -m d2v2ds.evaluate RUN_OR_EXPORT --shards DIR [--lm ARPA_OR_BINARY] [--lexicon FILE] [--decoder FILE]

Prints a table and writes evaluation.json, transcripts and pictures. Weights of the language model are those of the
official decoder: natural logarithms of the network, log10 of the language model.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error
from d2v2ds.run.decoder_choice import add_arguments, choice_of
from d2v2ds.run.evaluation import EvaluationOptions, evaluate, table


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
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        result = evaluate(
            options.model,
            EvaluationOptions(
                shards=tuple(options.shards), to=options.to, tag=options.checkpoint, device=options.device,
                draws=options.draws, decoder=choice_of(options),
            ),
        )  # fmt: skip
    except D2V2Error as error:
        logging.error("%s", error)
        return error.exit_code
    print("\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
