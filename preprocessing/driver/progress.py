"""One progress line: files, amount, speed, time left. On a terminal it is rewritten, elsewhere repeated."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

_TERMINAL_PERIOD_S = 0.5
_LOG_PERIOD_S = 10.0
_REPORT_PERIOD_S = 0.5

Report = Callable[[int, int], None]
"""Callback with (files, size) since its last call; size is in samples, bytes or another unit of the modality."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Units in which a size and a speed are printed."""

    amount: float
    """Size of one of `amount_unit`."""
    amount_unit: str
    amount_decimals: int = 0
    speed: float
    """Size per second that is one of `speed_unit`."""
    speed_unit: str


MEBIBYTES = Measure(amount=1 << 20, amount_unit="MiB", speed=1 << 20, speed_unit="MiB/s")
"""For sizes in bytes."""


class Progress:
    """Counts files and sizes and prints now and then.

    Args:
        name: first word of the line.
        files: how many will come.
        size: how much will come; 0 if only files are counted.
        measure: of the size.
        unit: what is counted beside the size.
        stream: where to print; standard error by default.
    """

    def __init__(
        self,
        name: str,
        files: int,
        size: int = 0,
        measure: Measure = MEBIBYTES,
        unit: str = "files",
        stream: TextIO | None = None,
    ) -> None:
        self._name = name
        self._total_files = files
        self._total_size = size
        self._measure = measure
        self._unit = unit
        self._stream = stream or sys.stderr
        self._rewrite = self._stream.isatty()
        self._files = 0
        self._size = 0
        self._start = self._printed = time.monotonic()

    def add(self, files: int, size: int) -> None:
        """Count finished work and print if it is time."""
        self._files += files
        self._size += size
        now = time.monotonic()
        if now - self._printed >= (_TERMINAL_PERIOD_S if self._rewrite else _LOG_PERIOD_S):
            self._printed = now
            self._print(end="" if self._rewrite else "\n")

    def finish(self) -> None:
        """Print the last line."""
        self._print(end="\n")

    def line(self) -> str:
        """The line as it would be printed now."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self._name}: {self._files:,} of {self._total_files:,} {self._unit}"]
        done, total = self._files, self._total_files
        if self._total_size:
            done, total = self._size, self._total_size
            measure = self._measure
            amount, whole = (f"{size / measure.amount:,.{measure.amount_decimals}f}" for size in (done, total))
            parts += [
                f"{amount} of {whole} {measure.amount_unit}",
                f"{done / measure.speed / seconds:,.0f} {measure.speed_unit}",
            ]
        if 0 < done < total:
            left = int(seconds * (total - done) / done)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)

    def _print(self, end: str) -> None:
        text = f"\r\033[K{self.line()}" if self._rewrite else self.line()
        print(text, end=end, file=self._stream, flush=True)


class Throttle:
    """Adds up reports and passes them on a few times a second.

    Args:
        send: receives the sums.
    """

    def __init__(self, send: Report) -> None:
        self._send = send
        self._files = self._size = 0
        self._sent = time.monotonic()

    def add(self, files: int, size: int) -> None:
        """Count finished work, and send the sums if it is time."""
        self._files += files
        self._size += size
        if time.monotonic() - self._sent >= _REPORT_PERIOD_S:
            self.flush()

    def flush(self) -> None:
        """Send the sums now."""
        if self._files:
            self._send(self._files, self._size)
            self._files = self._size = 0
        self._sent = time.monotonic()
