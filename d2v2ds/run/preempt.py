"""Stop when the scheduler asks for it: a signal sets a flag, all ranks agree on it at the next step, all save.

In: TERM, USR1, USR2, HUP or INT, sent to any rank: the warning before a time limit, a preemption, a closed terminal,
Ctrl-C. Out: a flag on that rank. Nothing else happens in the handler, for a rank that saved alone would leave the
others waiting for it; the loop asks all ranks once a step.
"""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from d2v2ds.data.workers import JOB_SIGNALS


class StopRequest:
    """Remembers a signal until all ranks act on it; its handlers stand as long as the `with` block runs."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that reached this rank, if any did."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in JOB_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        if self.received is None:
            self.received = signal.Signals(number)
