"""One progress line: files, hours, times real time, time left. On a terminal it is rewritten, elsewhere repeated."""

import sys
import time
from typing import TextIO

_TERMINAL_PERIOD_S = 0.5
_LOG_PERIOD_S = 10.0


class Progress:
    """Counts files and samples and prints now and then.

    Args:
        name: first word of the line.
        files: how many will come.
        samples: how many samples will come; 0 if only files are counted.
        sample_rate_hz: turns samples into hours.
        unit: what is counted beside the samples.
        stream: where to print; standard error by default.
    """

    def __init__(
        self,
        name: str,
        files: int,
        samples: int = 0,
        sample_rate_hz: int = 16000,
        unit: str = "files",
        stream: TextIO | None = None,
    ) -> None:
        self._name = name
        self._total_files = files
        self._total_samples = samples
        self._rate = sample_rate_hz
        self._unit = unit
        self._stream = stream or sys.stderr
        self._rewrite = self._stream.isatty()
        self._files = 0
        self._samples = 0
        self._start = self._printed = time.monotonic()

    def add(self, files: int, samples: int) -> None:
        """Count finished work and print if it is time."""
        self._files += files
        self._samples += samples
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
        if self._total_samples:
            done, total = self._samples, self._total_samples
            hours, all_hours = (count / self._rate / 3600 for count in (done, total))
            parts += [f"{hours:.2f} of {all_hours:.2f} h", f"{done / self._rate / seconds:,.0f} x real time"]
        if 0 < done < total:
            left = int(seconds * (total - done) / done)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)

    def _print(self, end: str) -> None:
        text = f"\r\033[K{self.line()}" if self._rewrite else self.line()
        print(text, end=end, file=self._stream, flush=True)
