"""Train an n-gram language model for `d2v2ds.evaluate --lm`.

    python -m d2v2ds.ngram --shards DIR... --to lm.arpa            # of packed transcripts
    python -m d2v2ds.ngram --text FILE... --order 4 --to lm.arpa   # of any text, a sentence a line

The words must be written as the recogniser writes them, in the same case.
"""

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from d2v2ds.decoding.ngram import train_ngram
from d2v2ds.errors import ConfigError
from d2v2ds.io.read import open_regular
from d2v2ds.modalities.known import open_shards
from d2v2ds.run.reporting import reported
from d2v2ds.tasks.ctc import CtcConfig


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.ngram", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=Path, nargs="+", default=[], help="packed folders with transcripts")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files of sentences, one a line")
    parser.add_argument("--order", type=int, default=3, help="n (3)")
    parser.add_argument("--prune", type=float, default=0.0, help="entropy threshold of pruning, such as 1e-8 (none)")
    parser.add_argument("--to", type=Path, required=True, help="ARPA file to write")
    given = parser.parse_args(arguments)

    def work() -> int:
        count = train_ngram(_sentences(given.shards, given.text), given.to, order=given.order, prune=given.prune)
        logging.info("%s: an order %d model of %d sentences", given.to, given.order, count)
        return 0

    return reported(work)


def _sentences(folders: list[Path], files: list[Path]) -> Iterator[str]:
    for folder in folders:
        shards = open_shards(folder)
        if CtcConfig.label_column not in shards.annotations:
            raise ConfigError(f"{folder}: expected transcripts, found {', '.join(shards.annotations) or 'none'}")
        yield from (text for row in range(len(shards)) if (text := shards.read_labels(row).text) is not None)
    for file in files:
        with open_regular(file, ConfigError) as opened:
            try:
                yield from io.TextIOWrapper(opened, encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{file}: expected UTF-8, found {error}") from error


if __name__ == "__main__":
    sys.exit(main())
