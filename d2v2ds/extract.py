"""Features of a whole packed folder, into one Arrow file.

    python -m d2v2ds.extract --model FOLDER --shards DIR --out features.arrow --layers 6,12 --pool mean [--workers N]

Killed and started again, finished parts are kept (OUT.parts/). `d2v2ds/inference/feature_file.py` says how to read the
file.
"""

import logging
import sys

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.inference.extraction import extract
from d2v2ds.inference.extraction_options import parse

logger = logging.getLogger("d2v2ds.extract")


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    options, out, workers = parse(arguments, (__doc__ or "").splitlines()[0])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows = extract(options, out, workers)
    except (D2V2Error, OSError) as error:
        logger.error("%s", error)
        return error.exit_code if isinstance(error, MachineError) else D2V2Error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; finished parts stay in %s.parts, the same command goes on from them", out)
        return 130
    layers = "all" if options.layers is None else ",".join(map(str, options.layers))
    logger.info("%s: %d rows, layers %s", out, rows, layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
