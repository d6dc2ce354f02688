"""How a command that works on files ends: its exit code, and one line for an error."""

import logging
from collections.abc import Callable

from d2v2ds.errors import D2V2Error

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def reported(work: Callable[[], int], interrupted: str) -> int:
    """Run a command's work and return the exit code.

    Args:
        work: returns the exit code.
        interrupted: what a user does after Ctrl-C.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        return work()
    except D2V2Error as error:
        logging.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logging.error("interrupted; %s", interrupted)
        return INTERRUPTED
