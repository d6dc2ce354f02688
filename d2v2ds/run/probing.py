"""Probe the checkpoints of a run while it goes on: `d2v2ds.probe` in a process of low priority beside rank 0.

The run's own process starts that command on a finished checkpoint and waits for it in a thread. It computes nothing,
draws no random number and writes no metric, so that weights and metrics are those of a run without probes. The command
itself appends its scores to `<run>/probes.jsonl` and to TensorBoard (`<run>/tensorboard/probe`). Whatever happens to
it, the run continues. A checkpoint stays as long as it is probed. Whatever is left unprobed is logged with the command
for it.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from d2v2ds.config.schema import ProbeSection
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.io import durable
from d2v2ds.io.lock import FolderLock
from d2v2ds.io.read import json_lines
from d2v2ds.run.preempt import StopRequest

logger = logging.getLogger(__name__)

PROBES = "probes.jsonl"
"""File in a run's folder: one line for each probe, with its step, kind and modality."""
LOCK = "probes.lock"
"""File in a run's folder, held by whoever changes `probes.jsonl`."""
LOG = "probe.log"
"""File in a run's folder with what the last probe printed."""
PROGRAM = (sys.executable, "-m", "d2v2ds.probe")
GRACE_S = 5.0
"""Seconds between a request to end and SIGKILL."""
_PATIENCE_S = 5.0
"""Seconds to wait for another process that changes `probes.jsonl`."""
_POLL_S = 0.2
_MOST_SAID = 500


@dataclass(frozen=True)
class _Job:
    """One probe of every checkpoint."""

    kind: str
    modality: str
    options: tuple[str, ...]
    """Options of the command, but for run and checkpoint."""


@dataclass
class _Work:
    """Probes of one checkpoint, one after the other."""

    checkpoint: Path
    step: int
    jobs: list[_Job]
    """Probes that have not ended by themselves; the first one runs."""
    deadline: float
    """Time of the monotonic clock at which they are ended."""
    is_ended: bool = False
    """True: no further process may start."""
    process: "subprocess.Popen[bytes] | None" = None


def append_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append a probe's record to `probes.jsonl`, not while the run removes records.

    Raises:
        OSError: the file cannot be written, or another process holds it.
    """
    with FolderLock(run_dir / LOCK, _PATIENCE_S) as lock:
        lock.take()
        durable.append_line(run_dir / PROBES, json.dumps(record))


class Probing:
    """Probes the checkpoints of one run; a `Follower` of its checkpoints on rank 0.

    A context manager: at its end it waits for the probe of the last step, unless an error ends the run; then, at a
    signal and after `limit_minutes`, it ends the probe.
    """

    def __init__(
        self, run_dir: Path, settings: ProbeSection, total_steps: int, program: Sequence[str] = PROGRAM
    ) -> None:
        """
        Args:
            run_dir: folder of the run.
            settings: what is probed, and when.
            total_steps: last step, whose checkpoint is always probed.
            program: command that probes.
        """
        self._run_dir, self._settings, self._total_steps = run_dir, settings, total_steps
        self._program = tuple(program)
        self._jobs = [_job(settings, kind, name) for name in settings.modalities for kind in settings.kinds]
        self._work: _Work | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._postponed: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = "the run ended before"
        try:
            if self._thread is not None and error is None:
                with StopRequest() as stop:
                    why = self._wait(stop)
        finally:
            self._end()
            if self._work is not None:
                self._name_left(self._work, why)
            if self._postponed is not None:
                self._name_left(self._new_work(self._postponed, self._total_steps), why)

    @property
    def needed(self) -> frozenset[str]:
        """Names of the checkpoints that are being probed or wait for it."""
        current = self._work.checkpoint if self._work is not None and self._is_busy else None
        return frozenset(path.name for path in (current, self._postponed) if path is not None)

    def saved(self, checkpoint: Path, step: int) -> None:
        """Begin to probe a checkpoint if that is due, none is being probed, and `probes.jsonl` lacks it."""
        every = self._settings.every_steps
        is_last = step == self._total_steps
        if not self._jobs or not (is_last or (every is not None and step % every == 0)):
            return
        if self._work is not None and self._is_busy:
            if is_last:
                self._postponed = checkpoint
            else:
                logger.info("step %d is not probed: the probe of step %d still runs", step, self._work.step)
            return
        self._begin(self._new_work(checkpoint, step))

    def went_back(self, step: int) -> None:
        """End the probe of an abandoned step, and drop the records after the step to which the run returned."""
        if self._work is not None and self._work.step > step:
            self._end()
            self._work = None
        path = self._run_dir / PROBES
        try:
            if not path.exists():
                return
            with FolderLock(self._run_dir / LOCK, _PATIENCE_S) as lock:  # the process of another probe may append
                lock.take()
                records = list(json_lines(path, ConfigError))
                kept = [one for one in records if one.get("step", 0) <= step]
                if len(kept) < len(records):
                    durable.replace_text(path, "".join(json.dumps(one) + "\n" for one in kept))
        except (D2V2Error, OSError) as error:
            logger.warning("%s: records of abandoned steps are not removed: %s", path, error)

    # ---------------------------------------------------------------- beginning and ending

    @property
    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _new_work(self, checkpoint: Path, step: int) -> _Work:
        """Return the probes of a checkpoint that have no record."""
        deadline = time.monotonic() + 60 * self._settings.limit_minutes
        return _Work(checkpoint, step, self._missing(step), deadline)

    def _begin(self, work: _Work) -> None:
        if not work.jobs:
            return
        thread = threading.Thread(target=self._run_jobs, args=(work,), name="probe", daemon=True)
        self._work = work
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("step %d is not probed: %s", work.step, error)
            return
        self._thread = thread

    def _missing(self, step: int) -> list[_Job]:
        """Return the probes of a step that have no record."""
        try:
            found = {
                (one.get("kind"), one.get("modality"))
                for one in json_lines(self._run_dir / PROBES, ConfigError)
                if one.get("step") == step
            }
        except D2V2Error as error:
            logger.warning("%s cannot be read, probes may be repeated: %s", self._run_dir / PROBES, error)
            found = set()
        return [job for job in self._jobs if (job.kind, job.modality) not in found]

    def _wait(self, stop: StopRequest) -> str:
        """Wait for the current probe, then for that of the last step, no longer than `limit_minutes` for both.

        Returns:
            Why it waits no longer.
        """
        deadline = time.monotonic() + 60 * self._settings.limit_minutes
        while self._thread is not None and stop.received is None and time.monotonic() < deadline:
            if self._thread.is_alive():
                self._thread.join(_POLL_S)
                continue
            self._thread = None
            if self._postponed is not None:
                checkpoint, self._postponed = self._postponed, None
                self._begin(self._new_work(checkpoint, self._total_steps))
        return self._limit if stop.received is None else f"ended by {stop.received.name}"

    def _end(self) -> None:
        """End the current probe, if there is one; after SIGTERM and SIGKILL at most three times `GRACE_S` pass."""
        if self._work is None:
            return
        with self._lock:
            self._work.is_ended = True
            process = self._work.process
        if process is not None:
            _kill(process)
        if self._thread is not None:
            self._thread.join(GRACE_S)
            self._thread = None

    def _name_left(self, work: _Work, why: str) -> None:
        """Log the probes of a checkpoint that did not come to an end, each with the command that makes up for it."""
        left, work.jobs = work.jobs, []
        for job in left:
            command = ["python", *self._program[1:], *self._arguments(work, job)]
            logger.warning(
                "step %d is not probed for %s, kind %s: %s; this command does it: %s",
                work.step, job.modality, job.kind, why, shlex.join(command),
            )  # fmt: skip

    @property
    def _limit(self) -> str:
        return f"ended after probe.limit_minutes {self._settings.limit_minutes:g}"

    def _arguments(self, work: _Work, job: _Job) -> list[str]:
        return [str(self._run_dir), "--checkpoint", work.checkpoint.name, *job.options]

    # ---------------------------------------------------------------- in the thread

    def _run_jobs(self, work: _Work) -> None:
        """Run the probes of one checkpoint one after the other."""
        while work.jobs and time.monotonic() < work.deadline:
            job = work.jobs[0]
            try:
                said = self._run(work, job)
            except subprocess.TimeoutExpired:
                break
            except OSError as error:
                said = f"its process cannot be started: {error}"
            if work.is_ended:
                return  # whoever ended it names what is left
            if said:
                logger.warning("step %d, probe of %s: %s; the run continues", work.step, job.modality, said)
            else:
                logger.info("step %d, probe of %s: %s", work.step, job.modality, self._last_line())
            work.jobs = work.jobs[1:]
        self._name_left(work, self._limit)

    def _run(self, work: _Work, job: _Job) -> str:
        """Run one probe; return what went wrong.

        Raises:
            OSError: its process cannot be started.
            TimeoutExpired: it was ended at the deadline.
        """
        command = [*self._program, *self._arguments(work, job), "--until-input-ends"]
        with self._lock, (self._run_dir / LOG).open("wb") as log:
            if work.is_ended:
                return ""
            # A group of its own, so that Ctrl-C reaches the run alone. Its input is a pipe that ends with this process.
            process = work.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=_environment(self._settings.threads), process_group=0,
            )  # fmt: skip
            _yield_to_others(process.pid, self._settings.niceness)
        try:
            code = process.wait(timeout=max(0.0, work.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
        if code == 0:
            return ""
        if code < 0:
            return f"killed by signal {-code} ({signal.strsignal(-code)})"
        return f"failed with code {code}: {self._last_line()}; {self._run_dir / LOG} has all it printed"

    def _last_line(self) -> str:
        try:
            lines = (self._run_dir / LOG).read_text(errors="replace").strip().splitlines()
        except OSError as error:
            return str(error)
        return lines[-1][:_MOST_SAID] if lines else "it printed nothing"


def _job(settings: ProbeSection, kind: str, modality: str) -> _Job:
    return _Job(kind, modality, probe_options(settings, kind, modality))


def probe_options(settings: ProbeSection, kind: str, modality: str) -> tuple[str, ...]:
    """List the options of `d2v2ds.probe`, but for the checkpoint, to append one kind of scores to `probes.jsonl`."""
    options: dict[str, Any] = {
        "--shards": settings.modalities[modality],
        "--kind": kind,
        "--leave-out": settings.leave_out,
        "--divider": settings.divider,
        "--threads": settings.threads,
        "--memory-gib": settings.memory_gib,
        "--test-shards": settings.test.get(modality),
        "--label": settings.label,
        "--block": settings.block,
    }
    return (*(f"{name}={value}" for name, value in options.items() if value is not None), "--append")


def _environment(threads: int) -> dict[str, str]:
    """Environment of the command: few threads, and no accelerator, whose memory is the run's."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"CUDA_VISIBLE_DEVICES": ""}


def _yield_to_others(pid: int, niceness: int) -> None:
    """Lower the priority of a process, and let it be the first that the kernel ends for want of memory."""
    with contextlib.suppress(OSError):  # it has ended, or this system has no such setting
        os.setpriority(os.PRIO_PROCESS, pid, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those it started; SIGKILL follows if it does not end by itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
