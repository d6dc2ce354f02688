"""One run per folder: rank 0 holds a lock on `RUN/lock` for as long as it lives, however it ends.

A record lock (`lockf`), which network file systems know too: it belongs to the process, not to its children, and the
kernel lets go of it even after SIGKILL. The file stays; what it says is only read while somebody holds the lock.
"""

import fcntl
import logging
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Self

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""Seconds to wait for a run that may be ending: one that saves, or that died with its node, whose locks expire on a
network file system after a minute and a half."""


class RunLock:
    """Held from `take` to the end of the ``with`` block."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self) -> None:
        """Take it; where the file system has no locks, warn and do without.

        Raises:
            BlockingIOError: another run has it.
            OSError: the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        deadline, has_warned = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # it depends on the file system how a held lock shows
                holder = self.path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
                if time.monotonic() > deadline:
                    file.close()
                    raise BlockingIOError(
                        f"another run is at work there ({holder}); let it end, or give another run.dir"
                    ) from None
                if not has_warned:
                    logger.warning("%s is held by another run (%s); waiting for its end", self.path, holder)
                has_warned = True
                time.sleep(min(1.0, PATIENCE_S / 10))
            except OSError as error:
                logger.warning("%s: no lock (%s); a second run there would not be noticed", self.path, error)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n")
        file.flush()
        self._file = file
