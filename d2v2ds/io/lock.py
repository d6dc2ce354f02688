"""One writer per folder: a record lock (`lockf`), which network file systems know too.

It belongs to the process, not to its children, and the kernel lets go of it even after SIGKILL. The file stays; what it
says is only read while somebody holds the lock.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal, Self

logger = logging.getLogger(__name__)


class FolderLock:
    """Held from `take` to the end of the ``with`` block."""

    def __init__(self, path: Path, patience_s: float = 0.0, *, shared: bool = False) -> None:
        """
        Args:
            path: of the lock's file.
            patience_s: seconds to wait for a holder that may be ending.
            shared: let others hold it that share it too.
        """
        self.path, self._patience_s = path, patience_s
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._file: IO[str] | None = None
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Take it; where the file system has no locks, warn and do without.

        Raises:
            BlockingIOError: another process has it; says which. At the latest when `is_stopping` answers True.
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a link would be written through
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(self.path, flags, 0o644), "r+")
        deadline, has_warned = time.monotonic() + self._patience_s, False
        while True:
            try:
                fcntl.lockf(file, self._kind | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # it depends on the file system how a held lock shows
                holder = self.path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "unknown"
                if time.monotonic() > deadline or is_stopping():
                    file.close()
                    raise BlockingIOError(
                        f"{self.path}: another one is at work there ({holder}); let it end, or take another folder"
                    ) from None
                if not has_warned:
                    logger.warning("%s is held by another one (%s); waiting for its end", self.path, holder)
                has_warned = True
                time.sleep(min(1.0, self._patience_s / 10))
            except OSError as error:
                logger.warning("%s: no lock (%s); a second one there would not be noticed", self.path, error)
                break
        if self._kind == fcntl.LOCK_EX:
            self._text = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat()}\n"
            file.truncate(0)
            file.write(self._text)
            file.flush()
        self._file = file

    def state(self) -> Literal["held", "gone", "taken"]:
        """Return whether the file of this lock still lies in the folder; an exclusive lock only.

        It is gone if the folder was moved, removed or unmounted, and taken if another process has made it anew. Its
        text is compared, for numbers of files change on some file systems. "held" if it was never taken.
        """
        if self._file is None:
            return "held"
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return "gone"
        except OSError:
            return "held"  # a fault of the machine, for whoever writes there
        with os.fdopen(descriptor, "rb") as file:
            return "held" if file.read(len(self._text) + 1) == self._text.encode() else "taken"
