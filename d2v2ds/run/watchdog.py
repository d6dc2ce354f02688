"""Log which rank is late, and in which line, while a step hangs: long before the collective times out.

A thread of every rank watches the clock. If a step takes many times the median, each rank writes to a small key-value
store whether it computes or waits for the others, and in which line; rank 0 reads and logs all of them. A rank that
writes nothing is stopped or gone. The threads never take part in collectives.
"""

import json
import logging
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from d2v2ds.distributed import comm

logger = logging.getLogger(__name__)

FIRST_STEP_S = 600.0
"""Seconds after which the first step, which compiles and opens files, is late."""
MEDIAN_STEPS = 50
"""Last steps of which the median is taken."""
ANSWER_SECONDS = 5.0
"""Seconds that rank 0 waits for the other ranks' reports."""
WAITING_FILES = ("torch/distributed/", "deepspeed/comm/")
"""A stack whose last lines lie in one of these waits for other ranks."""
FRAMES_SAID = 6
"""Innermost lines of a late rank's stack in the message."""


class Watchdog:
    """Watches the steps of one rank; its thread runs as long as the `with` block. Entering it is collective."""

    def __init__(self, late_factor: float, late_seconds: float) -> None:
        """
        Args:
            late_factor: a step is late at this many times the median of the last ones,
            late_seconds: and not before so many seconds.
        """
        self._factor, self._floor_s = late_factor, late_seconds
        self._durations: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._step = 0
        self._began = time.monotonic()
        self._is_reported = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._store = comm.side_store()
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def step_done(self, step: int) -> None:
        """A step has ended; the next one begins now."""
        self._durations.append(time.monotonic() - self._began)
        self.touch(step)

    def touch(self, step: int) -> None:
        """The run is alive and begins something that is no step: the clock starts anew."""
        self._step, self._is_reported = step, False
        self._began = time.monotonic()

    def limit_s(self) -> float:
        """Seconds after which the present step is late."""
        if not self._durations:
            return max(self._floor_s, FIRST_STEP_S)
        return max(self._floor_s, self._factor * statistics.median(self._durations))

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._floor_s / 4)):
            step, seconds = self._step, time.monotonic() - self._began
            if seconds > self.limit_s() and not self._is_reported:
                self._is_reported = True
                self._report(step, seconds)

    def _report(self, step: int, seconds: float) -> None:
        own = _where()
        took = f"the step after {step} takes {seconds:.0f} s so far"
        if self._durations:
            took += f", {seconds / statistics.median(self._durations):.0f} x the median"
        if not own["waits"]:
            logger.warning("%s; rank %d is busy in\n%s", took, comm.rank(), own["stack"])
        # In a thread of its own: the store lives in rank 0's process, and a stopped one never answers.
        answered = threading.Event()
        threading.Thread(target=self._leave_word, args=(step, own, answered), daemon=True).start()
        if not answered.wait(ANSWER_SECONDS):
            logger.warning("%s; rank 0 does not answer: it is stopped or gone", took)
        elif comm.rank() == 0:
            self._ended.wait(ANSWER_SECONDS)
            logger.warning("%s: %s", took, describe(self._words(step)))

    def _leave_word(self, step: int, word: dict[str, Any], answered: threading.Event) -> None:
        key = f"{step}/{comm.rank()}"
        try:
            self._store.set(key, json.dumps(word))
            self._store.get(key)  # `set` alone waits for no answer
        except RuntimeError:
            return  # rank 0 is gone: said by whoever waits for the answer
        answered.set()

    def _words(self, step: int) -> list[dict[str, Any] | None]:
        """Reports of all ranks, in rank order; None from a rank that wrote none."""
        keys = [f"{step}/{rank}" for rank in range(comm.world())]
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]


def describe(words: list[dict[str, Any] | None]) -> str:
    """Make one message about all ranks: which are late, where, and which wait.

    Args:
        words: by rank, `_where` of each; None from a rank that wrote none.
    """
    silent = [rank for rank, word in enumerate(words) if word is None]
    busy = [rank for rank, word in enumerate(words) if word is not None and not word["waits"]]
    waiting = [rank for rank, word in enumerate(words) if word is not None and word["waits"]]
    parts = []
    if silent:
        parts.append(f"no word from ranks {ranges(silent)}: stopped, gone, or not late themselves")
    for rank in busy[:4]:
        word = words[rank]
        assert word is not None
        parts.append(f"rank {rank} is late in\n{word['stack']}")
    if len(busy) > 4:
        parts.append(f"ranks {ranges(busy[4:])} are late as well")
    if waiting:
        parts.append(f"ranks {ranges(waiting)} wait for others")
    if not silent and not busy and words[0] is not None:
        parts.append(
            f"nobody is late: the network hangs, or ranks call different collectives; rank 0\n{words[0]['stack']}"
        )
    return "; ".join(parts)


def _where() -> dict[str, Any]:
    """Stack of this process's main thread, and whether any thread waits for other ranks."""
    stacks = {ident: traceback.extract_stack(frame) for ident, frame in sys._current_frames().items()}
    stacks.pop(threading.get_ident())
    waits = any(_is_waiting(stack) for stack in stacks.values())  # on a GPU, backward runs in threads of its own
    main = stacks[threading.main_thread().ident or 0]
    lines = [f"  {Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in main[-FRAMES_SAID:]]
    return {"waits": waits, "stack": "\n".join(lines)}


def _is_waiting(stack: traceback.StackSummary) -> bool:
    innermost = stack[-1]
    in_deepspeed = "deepspeed/" in innermost.filename and ".wait(" in (innermost.line or "")
    return in_deepspeed or any(part in frame.filename for frame in stack[-4:] for part in WAITING_FILES)


def ranges(ranks: list[int]) -> str:
    """`0-2, 4`: ascending numbers, neighbours joined."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
