"""Settings of a sweep: one YAML file, shipped in `d2v2ds/sweeps/` or the user's own."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from d2v2ds.bounds import Amount, Bounds, Count, CountOrZero, Positive, UserPath
from d2v2ds.config.faults import drop_unknown_keys, validated
from d2v2ds.config.load import apply_word, config_error, named_yaml
from d2v2ds.config.schema import LENGTHS, MISSING, ProbeKind, RunConfig
from d2v2ds.errors import ConfigError

SWEEP_FOLDER = Path(__file__).parents[2] / "sweeps"
OWN_FIELDS = (
    *(f"run.{name}" for name in LENGTHS),
    "run.seed", "run.dir", "run.save_every_steps", "run.keep_checkpoints", "run.keep_every_steps", "probe",
)  # fmt: skip
"""Fields of a run that the sweep sets itself."""
MOST_CELLS = 10_000
"""Most cells of a sweep."""
Fractions = Mapping[str, Positive]
"""Value of a field of the run as a fraction of its steps."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of a switch."""

    config: str | None = None
    """Configuration in place of the sweep's."""
    overrides: tuple[str, ...] = ()
    """Settings of the run, `section.field=value`."""
    fractions: Fractions = dataclasses.field(default_factory=dict)
    """Fields that are a fraction of the run's steps, such as `lr.warmup_steps: 0.1`."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Difference between cells: the values of one field, or named choices."""

    field: str | None = None
    """Field of the run that takes each of `values`."""
    values: tuple[Any, ...] = ()
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)

    def check(self, where: str) -> list[str]:
        """Return one message for each contradiction."""
        is_field, is_named = self.field is not None and bool(self.values), bool(self.choices)
        if is_field == is_named or (self.field is None) == bool(self.values):
            return [f"{where}: expected either field and values, or choices"]
        return []


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length of every run; exactly one is given."""

    steps: Count | None = None
    """Optimizer steps."""
    samples: Positive | None = None
    """Inputs in the unit of the first modality (seconds, images, tokens), before masks multiply them. The steps follow
    from the global batch."""
    minutes: Positive | None = None
    """Training time, without probes, validation and saving. The steps follow from the median of `pace_steps` steps that
    are run first, and forgotten."""
    pace_steps: Annotated[int, Bounds(ge=4, le=10_000)] = 24
    """Steps that measure the pace; the first quarter is left out."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Processes of a run."""

    ranks: Count = 1
    """1 runs `python -m`, more the deepspeed launcher on this machine."""
    threads: Count | None = None
    """OMP_NUM_THREADS of every rank; None leaves it as it is."""


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """Score by a probe of frozen features; see `d2v2ds.probe`."""

    shards: UserPath
    """Labelled folder."""
    test_shards: UserPath | None = None
    """Folder to test on; without one, one group of the first folder is left out at a time."""
    kind: ProbeKind = "one"
    measure: str | None = None
    """Score of the probe, such as knn; None: that of its verdict."""
    label: str | None = None
    divider: str = ","
    leave_out: str = "speaker"
    block: CountOrZero | None = None
    """Block that is probed; None: the middle one of speech, else the last one."""
    threads: Count = 1
    memory_gib: Positive = 2.0
    limit_minutes: Annotated[float, Bounds(gt=0, le=1440)] = 30.0
    """Minutes after which a probe is ended."""
    points: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Times that a run is scored, equally far apart, the last at its end."""
    when: Literal["after", "beside"] = "after"
    """after: the checkpoints of all points stay until the run has ended, and are probed then, which takes nothing from
    its time. beside: `probe.every_steps` of the run, which needs less disk; a point is left out if the one before it
    still runs, and the run is slower where all cores are busy."""
    niceness: Annotated[int, Bounds(ge=0, le=19)] = 10
    """Priority of probes beside a run."""


@dataclass(frozen=True, kw_only=True)
class FineTuneScore:
    """Score by fine-tuning the pretrained weights; see `d2v2ds.finetune` and `d2v2ds.evaluate`."""

    config: str
    """Configuration of the fine-tuning. Settings `model....` of a cell are passed on to it."""
    overrides: tuple[str, ...] = ()
    shards: UserPath
    """Labelled folder to train on."""
    test_shards: UserPath
    """Labelled folder that is evaluated, and not seen in training."""
    measure: str
    """Place of the score in evaluation.json: `scores.accuracy`, `greedy.wer`."""


@dataclass(frozen=True, kw_only=True)
class ScoreSection:
    """How runs are judged; at least one is given."""

    probe: ProbeScore | None = None
    finetune: FineTuneScore | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that decides a sweep."""

    title: str = ""
    """Title of the pictures."""
    origin: str = ""
    """Paper and section whose experiment it repeats."""
    dir: UserPath
    """Folder of the sweep: cells, table, pictures."""
    config: str
    """Configuration of every run."""
    overrides: tuple[str, ...] = ()
    """Settings of every run, `section.field=value`."""
    fractions: Fractions = dataclasses.field(default_factory=dict)
    """Fields of every run that are a fraction of its steps."""
    grid: Mapping[str, Switch] = dataclasses.field(default_factory=dict)
    """Switches by name: the cells are all combinations of their values."""
    cells: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    """Cells by name, in place of a grid."""
    seeds: tuple[Amount, ...] = (1,)
    """Every cell is run with each seed."""
    budget: Budget
    launch: Launch = Launch()
    score: ScoreSection
    reach: tuple[float, ...] = ()
    """Scores (in %) for which the time to reach them is compared."""
    reference: str | None = None
    """Cell, without its seed, to whose time the others' is compared; None: the first."""
    max_failures: Count = 3
    """Cells that fail in a row after which the sweep stops."""

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = [fault for name, switch in self.grid.items() for fault in switch.check(f"grid.{name}")]
        if bool(self.grid) == bool(self.cells):
            problems.append("expected either grid or cells")
        lengths = [name for name in ("steps", "samples", "minutes") if getattr(self.budget, name) is not None]
        if len(lengths) != 1:
            problems.append(f"budget: expected one of steps, samples, minutes; found {', '.join(lengths) or 'none'}")
        if self.score.probe is None and self.score.finetune is None:
            problems.append("score: expected probe or finetune, found neither")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: expected different seeds, one or more, found {list(self.seeds)}")
        for where, word in self._words():
            name = word.partition("=")[0]
            if any(name == own or name.startswith(f"{own}.") for own in OWN_FIELDS):
                problems.append(f"{where}: {name} is set by the sweep itself (budget, seeds, dir, score)")
        return problems + self._missing()

    def _words(self) -> Iterator[tuple[str, str]]:
        """Yield every setting of a run with its place."""
        yield from (("overrides", word) for word in (*self.overrides, *self.fractions))
        named = {f"cells.{name}": choice for name, choice in self.cells.items()}
        for name, switch in self.grid.items():
            yield from [(f"grid.{name}", switch.field)] if switch.field is not None else []
            named |= {f"grid.{name}.choices.{value}": choice for value, choice in switch.choices.items()}
        yield from ((where, word) for where, choice in named.items() for word in (*choice.overrides, *choice.fractions))

    def _missing(self) -> list[str]:
        """Return one message for each folder that the user still has to name."""
        scores = {"score.probe": self.score.probe, "score.finetune": self.score.finetune}
        return [
            f"{where}.{name}: required, give {where}.{name}=FOLDER"
            for where, score in scores.items()
            for name in ("shards", "test_shards")
            if score is not None and str(getattr(score, name)) == MISSING
        ]


def load_sweep(name_or_path: str, words: Sequence[str] = ()) -> Sweep:
    """Read a YAML file and apply settings.

    Args:
        name_or_path: name of a file in `d2v2ds/sweeps/` without its ending, or a path to a YAML file.
        words: `field=value`: of the sweep (`dir=DIR`, `score.probe.shards=DIR`), or of every run (`data.shards=DIR`).

    Raises:
        ConfigError: listing everything that is wrong.
    """
    values = named_yaml(name_or_path, SWEEP_FOLDER, "")
    sections, problems, of_runs = {one.name for one in fields(RunConfig)}, list[str](), list[str]()
    for word in words:
        if word.partition("=")[0].split(".")[0] in sections:
            of_runs.append(word)
            continue
        try:
            apply_word(values, word, Sweep)
        except ConfigError as error:
            problems.append(str(error))
    problems += drop_unknown_keys(values, Sweep, "")
    sweep, faults = validated(Sweep, values, {})
    problems += faults
    if sweep is not None:
        given = {one.name: getattr(sweep, one.name) for one in fields(Sweep)}
        sweep = Sweep(**given | {"overrides": (*sweep.overrides, *of_runs)})
        problems += sweep.check()
    if sweep is None or problems:
        raise config_error(name_or_path, problems)
    return sweep
