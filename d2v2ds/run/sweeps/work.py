"""Work of one cell: each step is the command that a user would type, in a process of its own.

A step whose result is there is left out, so that a cell goes on where it was interrupted.
"""

import json
import logging
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from d2v2ds.config.schema import ProbeSection
from d2v2ds.data.schema import read_index
from d2v2ds.distributed.checkpoint.format import steps_by_tag
from d2v2ds.distributed.checkpoint.keep import Keep, remove, superseded_tags
from d2v2ds.distributed.comm import free_port
from d2v2ds.errors import ConfigError, D2V2Error, PreemptedError
from d2v2ds.io import durable
from d2v2ds.io.read import json_lines, read_json
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.probing import GRACE_S, PROBES, probe_options
from d2v2ds.run.sweeps.cells import (
    Cell,
    fine_tuning_words,
    probe_words,
    score_steps,
    total_steps,
    write_identity,
)
from d2v2ds.run.sweeps.scores import passed_by_step
from d2v2ds.run.sweeps.settings import ProbeScore, Sweep
from d2v2ds.train.metrics import read_metrics

logger = logging.getLogger(__name__)

LOG, DONE, FAILED, LENGTH = "cell.log", "done.json", "failed.json", "length.json"
"""Files in a cell's folder: output of its commands; that it is done; why it failed; its steps by its pace."""
_POLL_S = 0.5
_TIME_TOLERANCE = 0.2
_MOST_SAID = 500
_TAIL_BYTES = 64 << 10


class CellFailedError(D2V2Error):
    """A command of a cell failed; the message names it, its exit code and the reason that it gave."""


@dataclass(frozen=True)
class Work:
    """Runs the commands of one cell."""

    sweep: Sweep
    cell: Cell
    stop: StopRequest
    """Signal that asks the sweep to end."""
    say: Callable[[str], None]
    """Logs what is done now."""

    def run(self) -> None:
        """Train, score and note that the cell is done.

        Raises:
            CellFailedError: a command failed.
            PreemptedError: a signal ended it; what is finished stays.
        """
        folder, probe = self.cell.folder, self.sweep.score.probe
        write_identity(self.sweep, self.cell)
        (folder / FAILED).unlink(missing_ok=True)
        steps = self._length()
        words = self.cell.overrides(self.sweep, steps)
        if probe is not None and probe.when == "beside":
            words += probe_words(self.sweep, steps)
        if steps not in steps_by_tag(folder / "checkpoints").values():
            self.say(f"training, {steps} steps")
            self._train("d2v2ds.pretrain", self.cell.config, words)
            self._compare_time(steps)
        if probe is not None:
            self._probe(probe, steps)
        if self.sweep.score.finetune is not None:
            self._fine_tune()
        for tag in superseded_tags(folder / "checkpoints", Keep(last=1)):
            remove(folder / "checkpoints" / tag)
        durable.replace_text(folder / DONE, json.dumps({"time": _now(), "steps": steps}) + "\n")

    # ---------------------------------------------------------------- steps

    def _length(self) -> int:
        """Return the steps of the run; if its budget is a time, from its pace, which is measured once."""
        steps = total_steps(self.cell, self.sweep)
        if steps is not None:
            return steps
        file, budget = self.cell.folder / LENGTH, self.sweep.budget
        if not file.exists():
            self.say(f"measuring its pace in {budget.pace_steps} steps")
            folder = self.cell.folder / "pace"
            shutil.rmtree(folder, ignore_errors=True)
            words = self.cell.overrides(self.sweep, budget.pace_steps)
            own = ["run.log_every_steps=1", "run.health_every_steps=1000000", f"run.dir={folder}"]
            self._train("d2v2ds.pretrain", self.cell.config, [*words, *own, "lr.warmup_steps=1"])
            times = [record["perf/step_ms"] for record in read_metrics(folder / "metrics.jsonl")]
            pace = statistics.median(times[len(times) // 4 :])
            assert budget.minutes is not None
            found = {"step_ms": pace, "total_steps": max(1, round(budget.minutes * 60_000 / pace))}
            durable.replace_text(file, json.dumps(found) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
        return int(read_json(file, ConfigError)["total_steps"])

    def _compare_time(self, steps: int) -> None:
        """Say if a run took another time than its budget, because the machine was busier or less busy than before."""
        passed = passed_by_step(list(read_metrics(self.cell.folder / "metrics.jsonl")), "", 1.0)
        asked, took = self.sweep.budget.minutes, passed[steps].seconds / 60 if steps in passed else None
        if asked is not None and took is not None and abs(took / asked - 1) > _TIME_TOLERANCE:
            self.say(f"trained for {took:.3g} minutes, budget.minutes is {asked:g}: the pace of the machine changed")

    def _train(self, module: str, config: str, words: Sequence[str]) -> None:
        """Run a training command under its launcher."""
        launch = self.sweep.launch
        program = [sys.executable, "-m", module]
        if launch.ranks > 1:
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            program = [
                launcher, "--num_gpus", str(launch.ranks), "--master_port", str(free_port()), "--module", module,
            ]  # fmt: skip
        self._command([*program, "--config", config, *words], threads=launch.threads)

    def _probe(self, probe: ProbeScore, steps: int) -> None:
        """Probe every checkpoint that is due, is there, and has no record."""
        folder, wanted = self.cell.folder, score_steps(probe, steps)
        modality = read_index(probe.shards).modality
        settings = ProbeSection(
            modalities={modality: probe.shards},
            test={} if probe.test_shards is None else {modality: probe.test_shards},
            label=probe.label, divider=probe.divider, leave_out=probe.leave_out, block=probe.block,
            threads=probe.threads, memory_gib=probe.memory_gib,
        )  # fmt: skip
        options = probe_options(settings, probe.kind, modality)
        tags = {step: tag for tag, step in steps_by_tag(folder / "checkpoints").items()}
        known = {record.get("step") for record in json_lines(folder / PROBES, ConfigError)}
        due = [step for step in wanted if step not in known and step in tags]
        for number, step in enumerate(due, 1):
            self.say(f"probing step {step}, {number} of {len(due)}")
            command = [sys.executable, "-m", "d2v2ds.probe", str(folder), "--checkpoint", tags[step], *options]
            self._command(command, threads=probe.threads, limit_s=60 * probe.limit_minutes)
        if steps not in {record.get("step") for record in json_lines(folder / PROBES, ConfigError)}:
            raise CellFailedError(f"step {steps} has no score in {folder / PROBES}; {folder / 'probe.log'} may say why")

    def _fine_tune(self) -> None:
        """Export, fine-tune and evaluate."""
        tuning, folder = self.sweep.score.finetune, self.cell.folder
        assert tuning is not None
        if (folder / "finetune" / "evaluation" / "evaluation.json").exists():
            return
        self.say("fine-tuning")
        self._command([sys.executable, "-m", "d2v2ds.export", str(folder), "--to", str(folder / "model")])
        words = fine_tuning_words(self.sweep, self.cell, folder / "model")
        self._train("d2v2ds.finetune", tuning.config, words)
        self.say("evaluating")
        run = [sys.executable, "-m", "d2v2ds.evaluate", str(folder / "finetune")]
        self._command([*run, "--shards", str(tuning.test_shards)], threads=self.sweep.launch.threads)

    # ---------------------------------------------------------------- processes

    def _command(self, words: Sequence[str], threads: int | None = None, limit_s: float | None = None) -> None:
        """Run a command, its output behind that of earlier ones in `cell.log`.

        Its end has no limit where none is given: a run has limits of its own for every wait.
        """
        if self.stop.received is not None:
            raise PreemptedError(f"stopped by {self.stop.received.name}; start the same command to continue")
        log = self.cell.folder / LOG
        with log.open("ab") as file:
            file.write(f"\n{_now()} $ {' '.join(words)}\n".encode())
            file.flush()
            begin = file.tell()
            own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
            # a group of its own: a signal reaches all its ranks, once
            process = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=os.environ | own,
                process_group=0,
            )  # fmt: skip
            try:
                code = self._wait(process, limit_s)
            finally:
                _end(process)
        if self.stop.received is not None and code != 0:
            raise PreemptedError(f"stopped by {self.stop.received.name}; start the same command to continue")
        if code != 0:
            what = next(word for word in words if word.startswith("d2v2ds."))
            raise CellFailedError(f"{what} {_ending(code)}: {_reason(log, begin)}")

    def _wait(self, process: "subprocess.Popen[bytes]", limit_s: float | None) -> int | None:
        """Wait for a command; return its exit code, None if its time limit ended it."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        is_asked = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=_POLL_S)
            if self.stop.received is not None and not is_asked:
                is_asked = True
                self.say(f"{self.stop.received.name}: waiting for the command to save")
                os.killpg(process.pid, signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                _end(process)
                return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command and whatever of its group still lives."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)


def _ending(code: int | None) -> str:
    if code is None:
        return "was ended after limit_minutes"
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _reason(log: Path, begin: int) -> str:
    """Return the line of a command's output that tells most about its failure."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and "[launch.py" not in line]
    for pattern in (r"^(\d\d:\d\d:\d\d )?(ERROR|CRITICAL) ", r"^\w*(Error|Exception|Interrupt)\b", r"[Ee]rror"):
        found = [number for number, line in enumerate(said) if re.search(pattern, line)]
        if found:
            behind = [line for line in said[found[-1] + 1 : found[-1] + 4] if line.startswith("- ")]
            return " ".join([said[found[-1]], *behind])[:_MOST_SAID]
    return said[-1][:_MOST_SAID] if said else "it printed nothing"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def note_failure(cell: Cell, error: D2V2Error) -> None:
    """Write into a cell's folder why it failed."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    durable.replace_text(cell.folder / FAILED, json.dumps({"time": _now(), "reason": str(error)}, indent=1) + "\n")
