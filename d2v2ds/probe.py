"""Judge a run by what its features know: a probe on frozen, mean-pooled features beside the run's own random start.

    python -m d2v2ds.probe RUN --shards DIR --label digit --leave-out speaker [--block 2 | --all-blocks]
    python -m d2v2ds.probe RUN --shards TRAIN --test-shards VALID [--baseline]

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
from d2v2ds.run.probe import Options, probe


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--shards", type=Path, required=True, help="labelled rows, packed without joining or blocks")
    parser.add_argument("--test-shards", type=Path, help="fit on --shards and test on these")
    parser.add_argument("--label", default="label", help="annotation to predict")
    parser.add_argument("--leave-out", default="speaker", help="annotation whose values are left out in turn")
    parser.add_argument("--block", type=int, help="block of the verdict; the middle one of speech, else the last one")
    parser.add_argument("--all-blocks", action="store_true", help="score every block")
    parser.add_argument("--baseline", action="store_true", help="score what needs no model, too (images and text)")
    parser.add_argument("--c", type=float, help="inverse strength of the L2 of logistic regression")
    parser.add_argument("--neighbours", type=int, help="of the kNN probe")
    parser.add_argument("--checkpoint", dest="tag", help="tag of a checkpoint; the newest if not given")
    given = vars(parser.parse_args(arguments))
    run, shards, test_shards = (given.pop(name) for name in ("run", "shards", "test_shards"))
    logging.basicConfig(format="%(levelname)s %(message)s")
    tune_cpu(processes=1)
    try:
        print(probe(run, Options(folders=(shards,) if test_shards is None else (shards, test_shards), **given)))
    except D2V2Error as error:
        logging.getLogger(__name__).error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
