"""Errors of the machine, told apart from damaged files: one list, one advice for each.

A row that cannot be read because the node has no file descriptors left is not damaged, and a checkpoint that an I/O
error stopped does not need room. Everything that meets an `OSError` asks here what it means.
"""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from d2v2ds.errors import D2V2Error, MachineError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADVICE = {
    errno.EMFILE: "this process may not open more files; raise `ulimit -n`, or lower the number of workers",
    errno.ENFILE: "this machine may not open more files; raise fs.file-max, or use another node",
    errno.ENOMEM: "the machine or the memory limit of the job has no memory left; lower workers or batch sizes",
    errno.EAGAIN: "the machine may not start more processes or lock more memory; raise `ulimit -u`",
    errno.EIO: "the disk or its network failed; look at the kernel's log, or use another node",
    errno.ESTALE: "the network file system changed below; mount it anew, or use another node",
    errno.ETIMEDOUT: "the network file system does not answer; use another node",
    errno.EHOSTDOWN: "the server of the file system is down",
    errno.ENOTCONN: "the file system lost its connection; mount it anew",
    errno.ESHUTDOWN: "the file system was shut down after an error",
    errno.ENOLCK: "the file system has no locks left",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "the quota is used up: make room, or ask for more",
    errno.EROFS: "the file system is mounted for reading only; mount it anew, or write elsewhere",
    errno.EFBIG: "the file is larger than `ulimit -f` or the file system allows",
    errno.ENODEV: "the device is gone; use another node",
    errno.ENXIO: "the device is gone; use another node",
}
"""Advice for each errno that says nothing of the content of a file."""
TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ENFILE,
}  # fmt: skip
"""Errors of the machine that may be over a moment later."""
_MEMORY_TEXTS = (
    "can't allocate memory",  # torch on a CPU
    "Cannot allocate memory",
    "out of memory",  # torch on a GPU
    "bad_alloc",
    "could not create a primitive",  # oneDNN, whose every failure reads so
    "can't start new thread",
    "Resource temporarily unavailable",  # a thread of gloo
)
_WAITS_S = (0.1, 0.5, 2.0)
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
_said: set[str] = set()


def is_machine_fault(error: OSError) -> bool:
    """True for an error of the machine; False for one about this file: absent, a folder, not allowed, damaged."""
    return error.errno in ADVICE


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error of whatever library means that memory, or a thread with its stack, could not be had."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _MEMORY_TEXTS)


def is_unsupported(error: OSError) -> bool:
    """True if the file system lacks the call (EINVAL, EOPNOTSUPP, ENOSYS): do without, and say it once."""
    return error.errno in _UNSUPPORTED


def advice(error: OSError) -> str:
    """Return what to do about an error."""
    return ADVICE.get(error.errno or 0, "mend the cause")


def reading_error(path: Path | str, error: OSError, kind: type[D2V2Error]) -> D2V2Error:
    """Make the project's error of a failed open or read.

    Args:
        path: of the file.
        error: as the system raised it.
        kind: of the result if the file itself is at fault.
    """
    fault = f"{path}: cannot be read: {error.strerror or error}"
    return MachineError(f"{fault}; {advice(error)}") if is_machine_fault(error) else kind(fault)


def retried(read: Callable[[], T]) -> T:
    """Call `read`, and again after a moment as long as it raises a `MachineError` of `TRANSIENT`, up to three times."""
    for wait_s in _WAITS_S:
        try:
            return read()
        except MachineError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in TRANSIENT:
                raise
            logger.warning("%s; trying again in %g s", error, wait_s)
            time.sleep(wait_s)
    return read()


def say_once(key: str, message: str, *values: object) -> None:
    """Log a warning about an ability that the machine lacks; later calls with the same key are silent."""
    if key not in _said:
        _said.add(key)
        logger.warning(message, *values)
