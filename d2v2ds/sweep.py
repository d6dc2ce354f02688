"""Sweep: run a base configuration with many settings and seeds, score every run, and compare.

    python -m d2v2ds.sweep FILE.yaml [field=value ...]
    python -m d2v2ds.sweep num_masks data.shards=TRAIN score.probe.shards=LABELLED score.probe.test_shards=VALID
    python -m d2v2ds.sweep FILE.yaml --slurm

The last writes DIR/sweep.sh for sbatch, a task for each cell; `--report` afterwards makes the tables.

FILE is a YAML file or the name of one in `d2v2ds/sweeps/`.
Every cell is a normal run in DIR/cells. A second start goes on with what is missing; a cell whose settings changed is
refused by name. The end is `sweep.csv`, `reach.csv` and pictures in DIR.

Exit codes: 0 done, 2 settings, 9 cells failed, 75 stopped by a signal: start again.
"""

import argparse
import sys

from d2v2ds.run.reporting import reported
from d2v2ds.run.sweeps.cells import check_cells, expand
from d2v2ds.run.sweeps.drive import run_cell, run_sweep
from d2v2ds.run.sweeps.job import write_job
from d2v2ds.run.sweeps.report import report
from d2v2ds.run.sweeps.settings import load_sweep


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="name in d2v2ds/sweeps or path of a YAML file")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--cell", type=int, metavar="N", help="run this cell alone, from 0; of a job array its task")
    action.add_argument("--slurm", action="store_true", help="check all cells, and write the script of a job array")
    action.add_argument("--report", action="store_true", help="write tables and pictures of the cells that are there")
    parser.add_argument("words", nargs="*", metavar="field=value", help="settings of the sweep, or of every run")
    options = parser.parse_intermixed_args(arguments)

    def work() -> int:
        sweep = load_sweep(options.file, options.words)
        if options.cell is not None:
            run_cell(sweep, options.cell)
        elif options.report:
            report(sweep, expand(sweep))
        elif options.slurm:
            check_cells(sweep, expand(sweep))
            write_job(sweep, len(expand(sweep)), [options.file, *options.words])
        else:
            run_sweep(sweep)
        return 0

    return reported(work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
