"""`d2v2ds.pretrain` with one fault built in: `-m tests.runs.faulty fault=NAME,rank,step ...` and the usual arguments.

kill_in_step     SIGKILL between two micro-batches' backward and the optimizer step
kill_in_average  SIGKILL when half of the teacher is averaged
kill_in_save     SIGKILL when the first file of the first checkpoint at or after the step is written
sleep            thirty seconds of sleep in the forward
stop             SIGSTOP in the forward; whoever started it has to kill it
poison           the inputs of steps `step` to `step + 3` on that rank become infinite
signal           SIGUSR1 to itself in the forward
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import d2v2ds.pretrain
from d2v2ds.distributed import comm
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.io import tensor_file as tensorfile
from d2v2ds.train import loop, step

POISONED_STEPS = 4


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _break_clock() -> None:
    right, looks = time.time, itertools.count()
    time.time = lambda: right() - 3 * 365 * 86400 + 3600 * (-1) ** next(looks)  # type: ignore[assignment]


def install(name: str, rank: int, at_step: int) -> None:
    """Build one fault in; steps are counted in calls, so that data once seen is never seen again."""
    calls = {"step": 0}
    inner_step = loop.train_step

    def is_now() -> bool:
        return comm.rank() == rank and calls["step"] == at_step

    def before(act: Callable[[], None]) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["step"] = kwargs["step"] + 1
            if is_now():
                act()
            return inner_step(*args, **kwargs)

        loop.train_step = counted

    def poison() -> None:
        seen = 0

        def poisoned(engine: Any, objective: Any, micro: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if comm.rank() == rank and at_step <= seen < at_step + POISONED_STEPS:
                for batch in micro:
                    batch.source.fill_(torch.inf)
            return inner_step(engine, objective, micro, **kwargs)

        loop.train_step = poisoned

    if name == "poison":
        poison()
    elif name == "kill_in_return":
        poison()
        inner_return = loop.Trainer._roll_back

        def killed(self: loop.Trainer) -> None:
            inner_return(self)
            _die()

        loop.Trainer._roll_back = killed  # type: ignore[method-assign]
    elif name == "sleep":
        before(lambda: time.sleep(30))
    elif name == "stop":
        before(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    elif name == "clock":
        before(_break_clock)
    else:
        before(lambda: None)
        _install_kill(name, is_now, lambda: comm.rank() == rank and calls["step"] >= at_step)


def _install_kill(name: str, is_now: Callable[[], bool], is_due: Callable[[], bool]) -> None:
    if name == "kill_in_step":
        inner_optimizer = step.optimizer_step

        def killed(engine: Any) -> Any:
            if is_now():
                _die()
            return inner_optimizer(engine)

        step.optimizer_step = killed
    elif name == "kill_in_average":
        inner_update = Teacher.update

        def half(self: Teacher, decay: float) -> None:
            if is_now():
                for ema, master, _ in self._chunks[: max(1, len(self._chunks) // 2)]:
                    ema.lerp_(master, 1.0 - decay)
                _die()
            inner_update(self, decay)

        Teacher.update = half  # type: ignore[method-assign]
    elif name == "kill_in_save":
        inner_write = tensorfile._write_and_sync

        def torn(path: Any, parts: Any) -> None:
            inner_write(path, parts)
            if is_due():
                _die()

        tensorfile._write_and_sync = torn
    else:
        raise ValueError(f"no fault {name}")


def main() -> int:
    """Take the fault out of the arguments and start the run."""
    (fault,) = [argument for argument in sys.argv if argument.startswith("fault=")]
    name, rank, at_step = fault.removeprefix("fault=").split(",")
    install(name, int(rank), int(at_step))
    return d2v2ds.pretrain.main([argument for argument in sys.argv[1:] if argument != fault])


if __name__ == "__main__":
    sys.exit(main())
