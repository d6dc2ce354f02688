"""How a command that works on files ends: its exit code, and one line for an error."""

import logging
from collections.abc import Callable

from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.io.machine_faults import advice, is_machine_fault

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def reported(work: Callable[[], int], interrupted: str = "nothing was kept") -> int:
    """Run a command's work and return the exit code; an error of the operating system is one line too.

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
    except OSError as error:
        logging.error("%s; %s", error, advice(error))
        return MachineError.exit_code if is_machine_fault(error) else D2V2Error.exit_code
    except KeyboardInterrupt:
        logging.error("interrupted; %s", interrupted)
        return INTERRUPTED
