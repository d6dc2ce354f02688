"""Command line of a run: pretraining and fine-tuning share it."""

import argparse
import errno
import logging
import os

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.io.machine_faults import ADVICE, is_out_of_memory
from d2v2ds.run.pretraining import pretrain

logger = logging.getLogger("d2v2ds.run")


def run_command(program: str, description: str, arguments: list[str] | None = None) -> int:
    """Run what a configuration describes; returns the exit code.

    Args:
        program: how a user starts it.
        description: its first line is shown by `--help`.
        arguments: None for those of the process.
    """
    parser = argparse.ArgumentParser(prog=program, description=description.splitlines()[0])
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
