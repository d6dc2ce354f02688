"""Saving, resuming and rolling back a run, and the state in its checkpoints beside the weights.

No generator state is stored, because every random draw is a function of (seed, step). The data position is a few
integers for each modality.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

from d2v2ds.data.order import BatchPlan, SamplerState
from d2v2ds.distributed import comm
from d2v2ds.distributed.checkpoint import load as checkpoint
from d2v2ds.distributed.checkpoint.format import finished_tags, tags_without_manifest
from d2v2ds.distributed.checkpoint.keep import Keep, abandon_after
from d2v2ds.distributed.checkpoint.save import SaveOutcome, Saver
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError, ConfigError, NonFiniteError, SaveError
from d2v2ds.io import durable
from d2v2ds.io.read import json_lines
from d2v2ds.train.guard import COUNTS, Guard

logger = logging.getLogger(__name__)

FREE_FIELDS = re.compile(
    r"(model\.block\.attention_path|objective\.ema\.\w+|objective\.modalities\.\w+\.(mask|loss)\.\w+"
    r"|objective\.(outputs|mask|mask_noise_std|prenet_layer_drop|drop_path|final_dropout|label_smoothing|image_mixing"
    r"|waveform_mixing)(\.\w+)*):|model\.modalities\.\w+\.conv_gradient: None -> 1\.0$"
)
"""Settings that may differ in a resumed run: its weights are valid with any value."""
MAX_FAILURES = 2
"""Failed saves in a row that end the run."""
LOST_FOLDER = "move the folder back, or start the same command to continue from what lies there"


@dataclass
class Progress:
    """Progress of a run; stored in every checkpoint."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    seen: dict[str, float] = field(default_factory=dict)
    """Amount of data of each modality over all ranks, in the unit of its reader."""
    sampler: dict[str, SamplerState] = field(default_factory=dict)
    """Data position of each modality."""


class Follower(Protocol):
    """Uses the checkpoints of a run on rank 0, such as `run.probing.Probing`. Raises nothing.

    The run waits for its methods: `saved` reads a small file, `went_back` may take seconds to end what has begun.
    """

    @property
    def needed(self) -> frozenset[str]:
        """Names of checkpoints that it reads or will read; they are not removed. Asked in another thread."""

    def saved(self, checkpoint: Path, step: int) -> None:
        """Take notice of a whole checkpoint, just written or just loaded."""

    def went_back(self, step: int) -> None:
        """Take notice of a rollback: everything after this step is abandoned."""


def has_checkpoints(run_dir: Path) -> bool:
    """Return True if a run has checkpoints, whole or damaged, and so must resume. The same on every rank."""
    folder = run_dir / "checkpoints"
    # A shared file system may show ranks different lists.
    return comm.broadcast_object(bool(finished_tags(folder)) or bool(tags_without_manifest(folder)))


def reading_ahead(run_dir: Path) -> AbstractContextManager[None]:
    """Read the newest checkpoint of a run into the page cache in the background, for `Checkpoints.resume`."""
    return checkpoint.reading_ahead(run_dir / "checkpoints")


class Checkpoints:
    """Checkpoints of one run. Every rank has one, and calls its methods in the same order."""

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
        lock_state: Callable[[], str],
        follower: Follower | None = None,
    ) -> None:
        """
        Args:
            student: engine.
            teacher: sharded average, if the objective has one.
            run_dir: folder of the run.
            plans: of the data, by modality.
            guard, progress: stored in every checkpoint, and changed in place when one is loaded.
            settings: of the network, as plain values; a checkpoint with other settings raises `ConfigError`.
            keep: checkpoints that are not removed.
            asynchronous: write while training continues.
            lock_state: whether the run still has its folder, as `FolderLock.state`; asked on rank 0 at every save.
            follower: uses finished checkpoints; None on other ranks than 0.
        """
        self.student, self.teacher = student, teacher
        self.folder, self._rollbacks_file = run_dir / "checkpoints", run_dir / "rollbacks.jsonl"
        self.plans, self.guard, self.progress, self.settings = plans, guard, progress, settings
        self._saver = Saver(student, teacher, self.folder, keep, asynchronous, self._needed)
        self._lock_state = lock_state
        self._follower = follower
        self._began, self._step = 0.0, 0
        self._failures = 0
        self.stall_s = 0.0
        """Seconds for which training has waited for checkpoints; the reader resets it."""

    def _needed(self) -> frozenset[str]:
        return frozenset() if self._follower is None else self._follower.needed

    # ---------------------------------------------------------------- saving

    def begin(self, selection: float | None = None) -> None:
        """Write a checkpoint of this step, in the background if `asynchronous`.

        Args:
            selection: value of `Objective.selection`; None without a validation at this step.

        Raises:
            SaveError: the second failure in a row; earlier checkpoints are intact. Or the run's folder is not the one
                that it began in; if it is gone, a checkpoint is written there nevertheless.
        """
        started = time.perf_counter()
        self._settle(self._saver.finish())
        lock_state = comm.broadcast_object(self._lock_state())
        if lock_state == "taken":
            raise SaveError(
                f"{self.folder.parent}: another run has taken the place of this one's folder; {LOST_FOLDER}"
            )
        self._began, self._step = time.perf_counter(), self.progress.step
        state = {
            "step": self.progress.step,
            "seen": self.progress.seen,
            "sampler": self._positions(),
            "guard": self.guard.state_dict(),
            "settings": self.settings,
        }
        self._settle(self._saver.save(f"step{self.progress.step:08d}", state, selection))
        if lock_state == "gone":
            self._end_without_folder()
        self.stall_s += time.perf_counter() - started

    def finish(self) -> None:
        """Wait until the current checkpoint is on disk; if that fails, write one of the current step.

        Raises:
            SaveError: the second one failed too.
        """
        self._settle(self._saver.finish())
        while self._failures:
            self.begin()
            self._settle(self._saver.finish())

    def _end_without_folder(self) -> NoReturn:
        """Wait until the current checkpoint is on disk, and raise SaveError."""
        outcome = self._saver.finish()
        saved = (
            f"no checkpoint could be written: {outcome.fault}" if outcome and outcome.fault else "this step is saved"
        )
        raise SaveError(
            f"{self.folder.parent}: the run's folder was moved, removed or unmounted; {saved}; {LOST_FOLDER}"
        )

    @property
    def is_busy(self) -> bool:
        """True while this rank is writing."""
        return self._saver.is_busy

    def advance(self, any_busy: bool) -> None:
        """Check on a checkpoint in the background; call this once a step, with True if any rank is busy.

        Raises:
            SaveError: as `begin`.
        """
        started = time.perf_counter()
        self._settle(self._saver.advance(any_busy))
        self.stall_s += time.perf_counter() - started

    def _settle(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if not outcome.fault:
            self._failures = 0
            logger.info("checkpoint %s in %.1f s", outcome.path, time.perf_counter() - self._began)
            if self._follower is not None:
                self._follower.saved(outcome.path, self._step)
            return
        self._failures += 1
        fault = f"checkpoint {outcome.path} was NOT written, earlier ones are intact:\n{outcome.fault}"
        if self._failures >= MAX_FAILURES:
            raise SaveError(
                f"{fault}\nthis is failure {self._failures} in a row; mend the cause, and start the same command"
            )
        logger.error("%s\nthe run continues; a second failure will end it", fault)

    # ---------------------------------------------------------------- loading

    def resume(self, allow_grown: bool = False) -> None:
        """Load the newest whole checkpoint, also one of another number of ranks.

        Args:
            allow_grown: accept rows that were added to the data since.

        Raises:
            CheckpointError: no checkpoint is whole.
            ConfigError: model or data differ from the checkpoint's.
        """
        restored = checkpoint.load(self.student, self.teacher, self.folder, accept=self._is_of_this_model)
        state = restored.client_state
        if not _is_complete(state) or not {"step", "seen"} <= state.keys():
            raise CheckpointError(f"{self.folder / restored.tag}: no run's checkpoint, its state is not complete")
        self.progress.step, self.progress.seen = state["step"], dict(state["seen"])
        self.guard.load_state_dict(state["guard"])
        stored = state["sampler"]
        if returns := self._rollbacks_to(self.progress.step):
            stored = returns[-1]["sampler"]  # after the data that caused the rollback
            self.guard.load_state_dict(returns[-1]["guard"])
        try:
            for name, plan in self.plans.items():
                self.progress.sampler[name] = plan.load_state_dict(stored[name], allow_grown)
        except CheckpointError as error:
            raise ConfigError(f"{self.folder / restored.tag}, data.{name}: {error}") from error
        logger.info("resumed at step %d from %s", self.progress.step, restored.tag)
        if self._follower is not None:
            self._follower.went_back(self.progress.step)
            self._follower.saved(self.folder / restored.tag, self.progress.step)

    def _is_of_this_model(self, state: Mapping[str, Any]) -> bool:
        """Return True or raise ConfigError, which names the settings that differ; runs before weights are compared."""
        saved = state.get("settings")
        differing = [field for field in differing_fields(saved, self.settings) if not FREE_FIELDS.match(field)]
        if differing:
            raise ConfigError(
                f"{self.folder}: the checkpoint has other settings than this configuration ({'; '.join(differing)}); "
                "choose another run.dir"
            )
        return True

    def roll_back(self) -> None:
        """Load the last checkpoint before the steps that were not finite, and skip their data.

        Raises:
            NonFiniteError: there is none, or the run has loaded it too often.
            SaveError: as `begin`.
        """
        guard, step = self.guard, self.progress.step
        self._settle(self._saver.finish())
        try:
            restored = checkpoint.load(
                self.student,
                self.teacher,
                self.folder,
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
        if fault := comm.on_rank0(lambda: self._write_rollback(record, restored.tag)):
            raise SaveError(
                f"{self._rollbacks_file} cannot be written: {fault}; mend the cause, and start the same command"
            )
        logger.warning(
            "went back from step %d to step %d (return %d of %d), and skips the data between",
            step, self.progress.step, returns, guard.config.max_rollbacks,
        )  # fmt: skip
        if self._follower is not None:
            self._follower.went_back(self.progress.step)

    def _positions(self) -> dict[str, dict[str, int]]:
        """Data positions and the batch plans they refer to."""
        return {name: plan.state_dict(self.progress.sampler[name]) for name, plan in self.plans.items()}

    def _write_rollback(self, record: Mapping[str, Any], tag: str) -> None:
        """Record a rollback, so that a run that stops before its next save does not read the same data again."""
        durable.append_line(self._rollbacks_file, json.dumps(record))
        abandon_after(self.folder, tag)

    def _rollbacks_to(self, step: int) -> list[dict[str, Any]]:
        """Return the rollbacks to the checkpoint of a step, oldest first; the same on every rank."""

        def read() -> list[dict[str, Any]]:
            if comm.rank() > 0:
                return []
            found = [one for one in json_lines(self._rollbacks_file, ConfigError) if one.get("to_step") == step]
            return [one for one in found if _is_complete(one)]

        return comm.broadcast_object(comm.together(read))


def _is_complete(record: Mapping[str, Any]) -> bool:
    """True if a checkpoint's state, or a rollback, has the data position and the counts of the guard."""
    guard, sampler = record.get("guard"), record.get("sampler")
    return isinstance(sampler, dict) and isinstance(guard, dict) and guard.keys() >= set(COUNTS)


def differing_fields(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return `field: value before -> value now` for each leaf that differs between two nested dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [
            line
            for name in names
            for line in differing_fields(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if before == now else [f"{prefix}: {before!r} -> {now!r}"]
