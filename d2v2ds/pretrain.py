"""Pretrain: the entry point of a run.

    deepspeed --num_gpus 2 --module d2v2ds.pretrain --config audio_large data.shards=DIR run.dir=DIR key=value...

The same module runs under `torchrun`, under `srun`, and as one process (`python -m d2v2ds.pretrain ...`). A run
whose folder holds a checkpoint goes on from it. Everything that can be wrong with the configuration is reported
at once, before any process group starts.

Exit codes: 0 done, 2 configuration or data, 3 collapse (only if health.stop_on_collapse), 4 too many steps that
were not finite, 5 no usable checkpoint, 6 too many rows that could not be read, 7 two checkpoints in a row could not
be written, 8 a fault of the machine (no descriptors or memory, a file system that failed, data that do not arrive),
75 stopped by a signal (TERM, USR1, USR2, HUP or INT to any rank) with everything saved: start again.
"""

import argparse
import errno
import logging
import os
import sys

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.io.machine_faults import ADVICE, is_out_of_memory
from d2v2ds.run.pretraining import pretrain

logger = logging.getLogger("d2v2ds.pretrain")  # not __name__, which is "__main__" under a launcher


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="name in d2v2ds/configs or path of a YAML file")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher; not used")
    parser.add_argument(
        "--allow-grown", action="store_true", help="go on although rows were added to the data since the checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)  # job scripts add settings behind options
    try:
        pretrain(options.config, options.overrides, allow_grown=options.allow_grown)
    except D2V2Error as error:
        logging.basicConfig(format="%(levelname)s %(message)s")
        logger.error("%s", error)
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        logging.basicConfig(format="%(levelname)s %(message)s")
        said = str(error).strip().splitlines() or ["MemoryError"]
        logger.error("rank %s: %s; %s", os.environ.get("RANK", "0"), said[0], ADVICE[errno.ENOMEM])
        return MachineError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
