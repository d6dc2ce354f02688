"""Tune the weights of a language model on a development set, and write them for --decoder of other commands.

    python -m d2v2ds.tune_decoder RUN_OR_EXPORT --shards DEV --lm ARPA [--lexicon FILE] --output decoder.json

The network runs once. Each trial is appended to decoder.json.trials.jsonl; killed and started again, finished ones are
kept. Weights are for natural logarithms of the network and log10 of the language model, as in the official decoder.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.run.decoder_choice import add_arguments, choice_of
from d2v2ds.run.reporting import reported
from d2v2ds.run.tuning import TuningOptions, tune


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.tune_decoder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a fine-tuned run, or an export of one")
    parser.add_argument("--shards", type=Path, nargs="+", required=True, help="packed folders with transcripts")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--trials", type=int, default=128, help="settings that are tried (128)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (0)")
    parser.add_argument("--checkpoint", metavar="TAG", help="of a run; the best one by default")
    parser.add_argument("--device", help="such as cuda:0 or cpu")
    add_arguments(parser)
    given = parser.parse_args(arguments)

    def work() -> int:
        options = TuningOptions(
            shards=tuple(given.shards), output=given.output, start=choice_of(given), trials=given.trials,
            seed=given.seed, tag=given.checkpoint, device=given.device,
        )  # fmt: skip
        best = tune(given.model, options)
        logging.info("%s: WER %.2f %% of %d words, %s", given.output, best["wer"], best["words"], best["settings"])
        return 0

    return reported(work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
