"""Judge a run by what its features know: a probe on frozen, mean-pooled features beside the run's own random start.

    python -m d2v2ds.probe RUN --shards DIR --label digit --leave-out speaker [--block 2 | --all-blocks]
    python -m d2v2ds.probe RUN --shards TRAIN --test-shards VALID [--baseline]
    python -m d2v2ds.probe RUN --shards DIR --kind number --label age [--layers] [--attention]
    python -m d2v2ds.probe RUN --shards DIR --kind ctc --leave-out speaker

A block of the student is scored by logistic regression and by nearest neighbours, either leaving out one speaker at a
time, or fitted on one folder and tested on another; the last line says in one sentence whether the model learned: by
more points than chance among so few rows would give.
Scores are also written to RUN/probe.json (of a joint run RUN/probe-MODALITY.json).
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error
from d2v2ds.run.machine import tune_cpu
from d2v2ds.run.probe import end_with_input, probe
from d2v2ds.run.probe_options import add_options, options_of, question_of


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    add_options(parser)
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    if given.until_input_ends:
        end_with_input()
    tune_cpu(processes=1)
    try:
        print(probe(given.run, question_of(given), options_of(given)))
    except D2V2Error as error:
        logging.getLogger(__name__).error("%s", error)
        return D2V2Error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
