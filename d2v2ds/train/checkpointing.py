"""Write checkpoints, resume from them, and roll back to them; the state they hold beside the weights.

Every random draw is a function of (seed, step), so the step stands for all generators; the data's position is a few
integers for each modality.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2v2ds.data.order import BatchPlan, SamplerState
from d2v2ds.distributed import comm
from d2v2ds.distributed.checkpoint import load as checkpoint
from d2v2ds.distributed.checkpoint.format import finished_tags, tags_without_manifest
from d2v2ds.distributed.checkpoint.keep import Keep, abandon_after
from d2v2ds.distributed.checkpoint.save import SaveOutcome, Saver
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError, ConfigError, NonFiniteError, SaveError
from d2v2ds.train.guard import Guard

logger = logging.getLogger(__name__)

FREE_FIELDS = re.compile(
    r"(model\.block\.attention_path|objective\.ema\.\w+|objective\.modalities\.\w+\.(mask|loss)\.\w+):"
)
"""Settings that a resumed run may change: they do not change what the weights mean."""
MAX_FAILURES = 2
"""Saves in a row that may fail; the last of them ends the run."""


@dataclass
class Progress:
    """Position of a run; stored in every checkpoint."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    seen: dict[str, float] = field(default_factory=dict)
    """What all ranks have seen of each modality, in the unit of its reader."""
    sampler: dict[str, SamplerState] = field(default_factory=dict)
    """Position of the data of each modality."""


def has_checkpoints(run_dir: Path) -> bool:
    """True if a run has checkpoints, whole or not: it must then resume from one or stop. The same on every rank."""
    folder = run_dir / "checkpoints"
    # A shared file system may show ranks different lists.
    return comm.broadcast_object(bool(finished_tags(folder)) or bool(tags_without_manifest(folder)))


def reading_ahead(run_dir: Path) -> AbstractContextManager[None]:
    """Meanwhile, bring the newest checkpoint of a run from the disk, for `Checkpoints.resume` to find it in memory."""
    return checkpoint.reading_ahead(run_dir / "checkpoints")


class Checkpoints:
    """The checkpoints of one run. Every rank has one, and calls its methods in the same order."""

    def __init__(
        self,
        student: Engine,
        teacher: Teacher | None,
        run_dir: Path,
        *,
        plans: Mapping[str, BatchPlan],
        guard: Guard,
        progress: Progress,
        settings: Mapping[str, Any],
        keep: Keep,
        asynchronous: bool,
    ) -> None:
        """
        Args:
            student: engine.
            teacher: sharded average, if the objective has one.
            run_dir: folder of the run.
            plans: of the data, by modality.
            guard, progress: stored in every checkpoint and changed in place when one is taken up.
            settings: of the network as plain values; a checkpoint of others is refused.
            keep: which checkpoints are not removed.
            asynchronous: write while training goes on.
        """
        self.student, self.teacher = student, teacher
        self.folder, self._rollbacks_file = run_dir / "checkpoints", run_dir / "rollbacks.jsonl"
        self.plans, self.guard, self.progress, self.settings = plans, guard, progress, settings
        self._saver = Saver(student, teacher, self.folder, keep, asynchronous)
        self._began = 0.0
        self._failures = 0
        self.stall_s = 0.0
        """Seconds for which training has waited for checkpoints; the reader sets it back."""

    # ---------------------------------------------------------------- saving

    def begin(self, validation_loss: float | None = None) -> None:
        """Write a checkpoint of this step, in the background if the run says so.

        Raises:
            SaveError: the second failure in a row; the checkpoints before are intact.
        """
        asked = time.perf_counter()
        self._settle(self._saver.finish())
        self._began = time.perf_counter()
        state = {
            "step": self.progress.step,
            "seen": self.progress.seen,
            "sampler": self._positions(),
            "guard": self.guard.state_dict(),
            "settings": self.settings,
        }
        self._settle(self._saver.save(f"step{self.progress.step:08d}", state, {}, validation_loss))
        self.stall_s += time.perf_counter() - asked

    def finish(self) -> None:
        """Wait until what was begun is on disk; if it failed, try once more with what the run has now.

        Raises:
            SaveError: that failed too.
        """
        self._settle(self._saver.finish())
        while self._failures:
            self.begin()
            self._settle(self._saver.finish())

    @property
    def is_busy(self) -> bool:
        """True while this rank writes."""
        return self._saver.is_busy

    def advance(self, any_busy: bool) -> None:
        """Call once a step, with whether any rank is busy.

        Raises:
            SaveError: as `begin`.
        """
        asked = time.perf_counter()
        self._settle(self._saver.advance(any_busy))
        self.stall_s += time.perf_counter() - asked

    def _settle(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if not outcome.fault:
            self._failures = 0
            logger.info("checkpoint %s in %.1f s", outcome.path, time.perf_counter() - self._began)
            return
        self._failures += 1
        said = f"checkpoint {outcome.path} was NOT written, earlier ones are intact:\n{outcome.fault}"
        if self._failures >= MAX_FAILURES:
            raise SaveError(f"{said}\nthis is failure {self._failures} in a row: make room, and start the same command")
        logger.error("%s\nthe run goes on; a second failure will end it", said)

    # ---------------------------------------------------------------- taking up

    def resume(self, allow_grown: bool = False) -> None:
        """Go on from the newest whole checkpoint; on another number of ranks too.

        Args:
            allow_grown: whether rows may have been added to the data since.

        Raises:
            CheckpointError: none is whole.
            ConfigError: it is of another model, or of other data.
        """
        restored = checkpoint.load(self.student, self.teacher, self.folder, reshard=True, accept=self._is_of_this_model)
        state = restored.client_state
        self.progress.step, self.progress.seen = state["step"], dict(state["seen"])
        self.guard.load_state_dict(state["guard"])
        stored = state["sampler"]
        if returns := self._rollbacks_to(self.progress.step):
            stored = returns[-1]["sampler"]  # past the data that the run went back for
            self.guard.load_state_dict(returns[-1]["guard"])
        try:
            for name, plan in self.plans.items():
                self.progress.sampler[name] = plan.load_state_dict(stored[name], allow_grown)
        except CheckpointError as error:
            raise ConfigError(f"{self.folder / restored.tag}, data.{name}: {error}") from error
        logger.info("resumed at step %d from %s", self.progress.step, restored.tag)

    def _is_of_this_model(self, state: Mapping[str, Any]) -> bool:
        """True, or ConfigError. Asked before the weights are compared, whose names and shapes say less."""
        differing = [
            field for field in differing_fields(state["settings"], self.settings) if not FREE_FIELDS.match(field)
        ]
        if differing:
            raise ConfigError(
                f"{self.folder}: the checkpoint is of another model than this configuration ({'; '.join(differing)}); "
                "choose another run.dir"
            )
        return True

    def roll_back(self) -> None:
        """Go back to the last checkpoint before the steps that were not finite, and on with the data after them.

        Raises:
            NonFiniteError: there is none, or the run went back to it too often.
            SaveError: as `begin`.
        """
        guard, step = self.guard, self.progress.step
        self._settle(self._saver.finish())
        try:
            restored = checkpoint.load(
                self.student,
                self.teacher,
                self.folder,
                reshard=True,
                accept=lambda state: state["guard"]["nonfinite_in_a_row"] == 0,
            )
        except CheckpointError as error:
            when = "and no checkpoint was saved before them"
            if number := len(finished_tags(self.folder)) + len(tags_without_manifest(self.folder)):
                when = (
                    f"and it can go back to none of the run's {number} checkpoint(s): each was saved after some of "
                    "them, or is damaged, as warnings above say"
                )
            raise NonFiniteError(guard.nonfinite(step, when)) from error
        returns = len(self._rollbacks_to(restored.client_state["step"])) + 1
        guard.after_rollback(step, returns)
        self.progress.step, self.progress.seen = restored.client_state["step"], dict(restored.client_state["seen"])
        record = {
            "at_step": step,
            "to_step": self.progress.step,
            "sampler": self._positions(),
            "guard": guard.state_dict(),
        }
        if fault := comm.on_rank0(lambda: self._note_rollback(record, restored.tag)):
            raise SaveError(f"{self._rollbacks_file} cannot be written: {fault}; make room, and start the same command")
        logger.warning(
            "went back from step %d to step %d (return %d of %d), and on with the data after it",
            step, self.progress.step, returns, guard.config.max_rollbacks,
        )  # fmt: skip

    def _positions(self) -> dict[str, dict[str, int]]:
        """Positions in the data, with the settings that give them their meaning."""
        return {name: plan.state_dict(self.progress.sampler[name]) for name, plan in self.plans.items()}

    def _note_rollback(self, record: Mapping[str, Any], tag: str) -> None:
        """Record the rollback on disk: a run stopped before its next save would meet the same data at a later step."""
        with self._rollbacks_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        abandon_after(self.folder, tag)

    def _rollbacks_to(self, step: int) -> list[dict[str, Any]]:
        """Earlier returns to the checkpoint of a step, oldest first; the same on every rank."""
        lines: list[str] = []
        if comm.rank() == 0 and self._rollbacks_file.exists():
            lines = self._rollbacks_file.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in comm.broadcast_object(lines)]
        return [record for record in records if record["to_step"] == step]


def differing_fields(before: Any, now: Any, prefix: str = "") -> list[str]:
    """`field: value before -> value now` for each leaf in which two nested dicts differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [
            line
            for name in names
            for line in differing_fields(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if before == now else [f"{prefix}: {before!r} -> {now!r}"]
