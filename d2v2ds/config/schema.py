"""Sections of a run's configuration. Each class of settings stands beside the class that uses it; `RunConfig` composes.

Bounds of single fields are part of their types (`d2v2ds.bounds`); `check` looks at what several fields say together.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from d2v2ds.bounds import Amount, Bounds, Count, CountOrZero, Positive, UserPath
from d2v2ds.config.objectives import ObjectiveConfig
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.selection import score_of, set_of
from d2v2ds.train.guard import HealthConfig
from d2v2ds.train.optim import OptimConfig
from d2v2ds.train.schedule import LearningRateConfig

MISSING = "???"
"""Value in a shipped YAML that the user must give."""
LENGTHS = ("total_steps", "hours", "epochs", "tokens")
"""Fields of `RunSection` that say how long a run is; exactly one is given."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Length and folder of the run, and intervals of logging and saving."""

    dir: UserPath
    """Folder of the run: resolved configuration, checkpoints, metrics."""
    total_steps: Count | None = None
    """Optimizer steps of the whole run; the learning rate reaches its minimum there. Or let them follow from one of
    `hours`, `epochs` and `tokens`, so that a run keeps its length when the global batch changes."""
    hours: Positive | None = None
    """Audio seen by the whole run, before the masks multiply it (hours)."""
    epochs: Positive | None = None
    """Passes over `epoch_images` images."""
    epoch_images: Amount | None = None
    """Images of one such pass, as the recipe counts them."""
    tokens: Positive | None = None
    """Text tokens seen by the whole run, before the masks multiply them."""
    seed: Amount = 1
    """Seed of weights, sample order, crops, masks, dropout and noise."""
    save_every_steps: Count = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: CountOrZero = 3
    """Newest checkpoints kept; 0 keeps all. The best one of the validation is kept besides."""
    keep_every_steps: Count | None = None
    """Checkpoints whose step is a multiple of it are kept for good."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on; takes host memory for a copy of this rank's part."""
    log_every_steps: Count = 50
    """Optimizer steps between lines of metrics."""
    health_every_steps: Count = 500
    """Optimizer steps between effective ranks and position shares, which cost an eigendecomposition each."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = []
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            problems.append(
                f"run: expected exactly one of {', '.join(LENGTHS)}, found {', '.join(given) or 'none'}; set the "
                "others to null"
            )
        if self.keep_every_steps is not None and self.keep_every_steps % self.save_every_steps:
            problems.append(
                f"run.keep_every_steps is {self.keep_every_steps}, expected a multiple of run.save_every_steps "
                f"{self.save_every_steps}"
            )
        if self.epochs is not None and self.epoch_images is None:
            problems.append("run.epochs is given, and run.epoch_images is not; give both")
        return problems


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Training data. In YAML every modality stands beside `num_workers`: `data.audio.shards`."""

    num_workers: CountOrZero = 2
    """Loader processes on each rank; 0 loads in the training process."""
    max_wait_seconds: Annotated[float, Bounds(gt=0, le=86400)] = 900.0
    """Seconds that a rank waits for its loader processes before all ranks save and end; at most 0.8 of
    engine.timeout_minutes, after which the others stop waiting for it."""
    modalities: Mapping[str, Any] = field(default_factory=dict)
    """`DataSettings` of each modality in use, by name, in the order in which a step sees them."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        return [problem for settings in self.modalities.values() for problem in settings.check()]

    def missing(self) -> list[str]:
        """Return one message for each folder that the user still has to name."""
        return [
            f"data.{name}.shards: required, give data.{name + '.' if len(self.modalities) > 1 else ''}shards=FOLDER "
            f"(written by {known_modalities()[name].packer})"
            for name, settings in self.modalities.items()
            if str(settings.shards) == MISSING
        ]


@dataclass(frozen=True, kw_only=True)
class ValidSection:
    """Held-out packed folders, and how often the objective is evaluated on them. In YAML: `valid.audio=FOLDER`."""

    modalities: Mapping[str, UserPath] = field(default_factory=dict)
    """Held-out folder of each modality that is validated, by name."""
    more: Mapping[str, Mapping[str, UserPath | None]] = field(default_factory=dict)
    """Further sets: name -> modality -> folder, such as `valid.more.mismatched.text=FOLDER`. Their metrics have the
    name, as in `valid/mismatched/score/accuracy`; the best checkpoint is chosen by the first set, unless
    `objective.select` names others. A folder that is null is left out."""
    decoder: UserPath | None = None
    """File of `d2v2ds.tune_decoder` with a language model: validation of ctc decodes with it besides, and reports
    `ctc/lm_wer`, which `objective.select=[lm_wer]` makes the measure of the best checkpoint. None: greedy alone."""
    decoder_seconds: Positive = 600.0
    """Seconds of this search for one set on one rank; beyond them the set has no `ctc/lm_wer`, and the log says so."""
    every_steps: Count = 1000
    """Optimizer steps between validations."""
    micro_batches: Count = 32
    """Micro-batches of each modality that are looked at, over all ranks; fewer if the folder has fewer."""

    @property
    def sets(self) -> dict[str, dict[str, Path]]:
        """Folders by set and modality; the first set has the name ''."""
        more = {name: {one: path for one, path in folders.items() if path} for name, folders in self.more.items()}
        return {"": dict(self.modalities)} | {name: folders for name, folders in more.items() if folders}

    def check(self, selected: Iterable[str]) -> list[str]:
        """Return one message for each set that cannot be.

        Args:
            selected: sets by which the best checkpoint is chosen.
        """
        problems = [
            f"valid.more.{name}: expected a name of small letters, digits and _, such as mismatched"
            for name in self.more
            if not _SET_NAME.fullmatch(name)
        ]
        for name, folders in self.sets.items():
            problems += [
                f"valid.more.{name}.{one} is given and valid.{one} is not; the first set is that of valid.{one}"
                for one in folders.keys() - self.modalities.keys()
            ]
        problems += [
            f"objective.select names the validation set {name}, found {', '.join(self.sets.keys() - {''}) or 'none'}; "
            f"give valid.more.{name}.MODALITY=FOLDER"
            for name in sorted(set(selected) - self.sets.keys())
        ]
        return problems


_SET_NAME = re.compile(r"[a-z][a-z0-9_]*")


ProbeKind = Literal["one", "several", "number", "ctc"]
"""What a probe predicts: one class, several classes of a row, a number, or a transcript."""


@dataclass(frozen=True, kw_only=True)
class ProbeSection:
    """Probes of frozen features while a run goes on (`d2v2ds.probe`). In YAML: `probe.audio=FOLDER`.

    A process of low priority beside rank 0 reads a checkpoint that has just been written. The run's numbers do
    not depend on it.
    """

    modalities: Mapping[str, UserPath] = field(default_factory=dict)
    """Labelled folder of each modality that is probed, by name; packed without joining or blocks."""
    test: Mapping[str, UserPath] = field(default_factory=dict)
    """Folder to test on, by modality; without one, one group of the first folder is left out at a time."""
    every_steps: Count | None = None
    """Optimizer steps between probes, a multiple of run.save_every_steps; None probes the last checkpoint only."""
    kinds: tuple[ProbeKind, ...] = ("one",)
    """What is predicted, one probe each."""
    label: str | None = None
    """Annotation that is predicted; None: `label`, for ctc `text`."""
    divider: str = ","
    """Character between several classes of one row."""
    leave_out: str = "speaker"
    """Annotation whose values are left out in turn."""
    block: CountOrZero | None = None
    """Block that is probed; None: the middle one of speech, else the last one."""
    threads: Count = 1
    """Threads of the process."""
    niceness: Annotated[int, Bounds(ge=0, le=19)] = 19
    """Priority of the process; at 19, the lowest, it computes when no other wants to. A run that keeps every core busy
    leaves it next to nothing; a smaller number then lets it finish, and takes that time from the run."""
    memory_gib: Positive = 2.0
    """Most memory for frames of ctc (GiB)."""
    limit_minutes: Annotated[float, Bounds(gt=0, le=1440)] = 10.0
    """Minutes after which the probes of a checkpoint are ended; the run's end waits as long for its last one."""

    def check(self, run: RunSection) -> list[str]:
        """Return one message for each contradiction between fields, or with the run."""
        problems = []
        if self.every_steps is not None and self.every_steps % run.save_every_steps:
            problems.append(
                f"probe.every_steps is {self.every_steps}, expected a multiple of run.save_every_steps "
                f"{run.save_every_steps}: checkpoints are probed"
            )
        if self.every_steps is not None and not self.modalities:
            problems.append("probe.every_steps is given and no folder of labelled rows; give for example probe.audio")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            problems.append(f"probe.kinds is {list(self.kinds)}, expected different kinds, one or more")
        problems += [
            f"probe.test.{name} is given and probe.{name}, on which the probe is fitted, is not"
            for name in self.test.keys() - self.modalities.keys()
        ]
        return problems


@dataclass(frozen=True, kw_only=True)
class InitSection:
    """Initial weights; drawn from the seed if nothing is given."""

    weights: UserPath | None = None
    """Folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`. Its student and teacher are taken, optimizer and
    warm-up begin anew; a run that has checkpoints goes on from those."""
    skip: tuple[str, ...] = ()
    """Parameters that are drawn all the same: names or beginnings of names, such as `decoders` or
    `encoders.text.local.tokens`."""


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """The DeepSpeed configuration, and settings that it has no field for."""

    deepspeed: str = "zero3_bf16"
    """Name of a file in `ds_configs/` without its ending, or a path."""
    activation_checkpointing: bool = True
    """Recompute every transformer block in the backward pass instead of keeping its activations."""
    timeout_minutes: Annotated[float, Bounds(ge=0.01)] = 30.0
    """Minutes that a rank waits for the others before it gives up."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    run: RunSection
    data: DataSection
    model: TrunkConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    lr: LearningRateConfig
    init: InitSection = InitSection()
    engine: EngineSection = EngineSection()
    health: HealthConfig = HealthConfig()
    valid: ValidSection = ValidSection()
    probe: ProbeSection = ProbeSection()

    def check(self) -> list[str]:
        """Return one message for each contradiction within and between the sections."""
        if not_finite := list(_not_finite(self)):
            return [problem.replace("data.modalities.", "data.", 1) for problem in not_finite]  # as in YAML
        of_run = self.run.check()
        problems = [f"model: {problem}" for problem in self.model.check()]
        problems += [f"objective: {problem}" for problem in self.objective.check(self.model)]
        problems += of_run + self.data.check() + self._modality_faults() + self.probe.check(self.run)
        selected = (getattr(self.objective, "select", None) or ()) if self.valid.modalities else ()
        problems += self.valid.check(map(set_of, selected)) + self._decoder_faults()
        save, validate = self.run.save_every_steps, self.valid.every_steps
        if self.valid.modalities and max(save, validate) % min(save, validate):
            problems.append(
                f"run.save_every_steps is {save} and valid.every_steps {validate}, expected one to be a multiple of "
                "the other: the best checkpoint is chosen among those that were validated"
            )
        if not of_run:
            try:
                steps = self.total_steps
            except (ValueError, ZeroDivisionError) as error:
                return [*problems, str(error)]
            if self.lr.warmup_steps > steps:
                problems.append(f"lr.warmup_steps {self.lr.warmup_steps} is more than the {steps} steps of the run")
        return problems

    def _decoder_faults(self) -> list[str]:
        """Return one message for each reason why a validation cannot decode with a language model."""
        problems, valid = [], self.valid
        is_selected = any(score_of(name) == "lm_wer" for name in getattr(self.objective, "select", None) or ())
        if valid.decoder is None:
            return ["objective.select names lm_wer, and valid.decoder is not given; give both"] * is_selected
        if not isinstance(self.objective, CtcConfig) or not valid.modalities:
            problems.append(
                "valid.decoder: expected a run of ctc with a validation folder, found another; leave it out"
            )
        most = 0.5 * 60 * self.engine.timeout_minutes
        if valid.decoder_seconds > most:
            problems.append(
                f"valid.decoder_seconds is {valid.decoder_seconds:g}, expected at most {most:g}, half of "
                "engine.timeout_minutes, after which the other ranks stop waiting"
            )
        return problems

    def _modality_faults(self) -> list[str]:
        """Return one message for each modality that some section has and another lacks."""
        sections: dict[str, Mapping[str, Any]] = {
            "data": self.data.modalities,
            "model.modalities": self.model.modalities,
            "objective.modalities": self.objective.modalities,
        }
        names = dict.fromkeys(name for section in sections.values() for name in section)
        problems = []
        for name in names:
            has = [section for section, found in sections.items() if name in found]
            lacks = [section for section in sections if section not in has]
            if lacks:
                given, absent = (" and ".join(f"{section}.{name}" for section in part) for part in (has, lacks))
                problems.append(f"{given} configured, {absent} not; give all of them, or set all to null")
        for name in self.valid.modalities.keys() - self.data.modalities.keys():
            problems.append(f"valid.{name} is given and data.{name} is not; validation needs the settings of its data")
        for name in self.probe.modalities.keys() - self.data.modalities.keys():
            problems.append(f"probe.{name} is given and data.{name} is not; a probe needs the settings of its data")
        for name in self.probe.modalities.keys() & self.model.modalities.keys():
            if (self.probe.block or 0) > (depth := self.model.depth(name)):
                problems.append(f"probe.block is {self.probe.block}, the network of {name} has blocks 1 to {depth}")
        return problems

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: if they cannot follow, because no modality of the run counts in the given length.
        """
        if self.run.total_steps is not None:
            return self.run.total_steps
        for name, settings in self.data.modalities.items():
            amount = known_modalities()[name].run_length(self.run)
            if amount is not None:
                return round(amount / settings.global_batch)
        given = next(name for name in LENGTHS if getattr(self.run, name) is not None)
        raise ValueError(
            f"run.{given}: no modality of the run ({', '.join(self.data.modalities)}) counts in it; give "
            "run.total_steps"
        )


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    """Yield one message for each field that is NaN or infinite: comparisons with such values are meaningless."""
    if dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from _not_finite(getattr(value, one.name), f"{where}.{one.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_finite(item, f"{where}.{name}")
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}, expected a finite number"
