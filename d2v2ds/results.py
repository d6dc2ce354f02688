"""Print the results of several evaluations as one table, with their intervals and means over seeds.

    python -m d2v2ds.results FOLDER...

Reads every evaluation.json of d2v2ds.evaluate below the folders, such as those of a sweep (slurm/README.md). Numbers in
parentheses are 95 % intervals over the rows of the evaluation; of a mean over seeds the least and the greatest value.
"""

import argparse
import logging
import sys
from pathlib import Path

from d2v2ds.errors import D2V2Error
from d2v2ds.run.results import find_results, over_seeds, table


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="of runs or evaluations, searched to any depth")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        results = find_results(options.folders)
    except D2V2Error as error:
        logging.error("%s", error)
        return error.exit_code
    print("\n".join(table(results | over_seeds(results))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
