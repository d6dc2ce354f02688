"""Judge a run by its features: probes on frozen, mean-pooled features beside the run's own random start.

A block of the student is scored by logistic regression and by nearest neighbours, either leaving out one group at a
time, or fitted on one folder and tested on another. The verdict compares it with the same block at random init: it must
gain more points than chance among so few rows would give.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.reader import Reader
from d2v2ds.errors import ConfigError
from d2v2ds.evals.features import annotation, pooled_features
from d2v2ds.evals.probes import Fold, ProbeConfig, Score, gain, leave_one_out, score
from d2v2ds.modalities.known import known_modalities, open_reader, open_shards
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk
from d2v2ds.run.folder import load_student, run_config

LEARNED_POINTS = 5.0
"""Percentage points over the random start that count as having learned..."""
LEARNED_ERRORS = 2.0
"""... if they are more than so many standard errors, too: of 2,000 clips one is about a point, of 40 about nine."""


def random_start(config: RunConfig) -> Trunk:
    """Re-create the run's initial weights from its seed."""
    trunk = Trunk(config.model)
    initialise(trunk_parts(trunk), config.run.seed)
    return trunk.eval()


@dataclass(frozen=True)
class Task:
    """Labelled inputs of one modality, and how they are divided."""

    parts: tuple[tuple[Reader, list[int]], ...]
    """One or two folders, and the labelled rows of each."""
    labels: list[str]
    folds: list[Fold]
    division: str

    @property
    def modality(self) -> str:
        """Modality of the inputs."""
        return self.parts[0][0].modality

    @staticmethod
    def read(config: RunConfig, folders: Sequence[Path], label: str, leave_out: str) -> "Task":
        """All rows that have what is asked for: of one folder divided by a group, or of a fitted and a tested one."""
        readers = [_reader(config, folder) for folder in folders]
        if len(readers) == 1:
            return _leave_one_out_task(readers[0], folders[0], label, leave_out)
        if (first := readers[0].modality) != (second := readers[1].modality):
            raise ConfigError(f"{folders[1]}: holds {second}, {folders[0]} holds {first}; both must be of one modality")
        parts, labels, sides = [], [], []
        for side, (reader, folder) in enumerate(zip(readers, folders, strict=True)):
            found = [(row, name) for row, name in enumerate(annotation(open_shards(folder), label)) if name is not None]
            parts.append((reader, [row for row, _ in found]))
            labels += [name for _, name in found]
            sides += [side] * len(found)
        fitted = np.array(sides) == 0
        if len(classes := set(labels[: fitted.sum()])) < 2:
            raise ConfigError(
                f"{folders[0]}: expected rows of two classes or more of {label}, found only {classes.pop()!r}"
            )
        fold = Fold(folders[1].name, fitted, ~fitted)
        return Task(tuple(parts), labels, [fold], f"fitted on {fitted.sum()}, tested on {(~fitted).sum()}")

    def features(self, model: Trunk, name: str) -> list[Any]:
        """Pooled outputs, input of the first block included."""
        found = [pooled_features(model, reader, rows, progress=name) for reader, rows in self.parts]
        return [np.concatenate(layers) for layers in zip(*found, strict=True)]

    def score(self, features: Any, probe: ProbeConfig) -> Score:
        """Score one matrix of features."""
        return score(features, self.labels, self.folds, probe)

    def baseline(self) -> tuple[str, Any] | None:
        """Name and features of the modality's baseline, if it has one."""
        baseline = known_modalities()[self.modality].baseline
        if baseline is None:
            return None
        return baseline.name, baseline.compute(reader.read_whole(row) for reader, rows in self.parts for row in rows)


def _reader(config: RunConfig, folder: Path) -> Reader:
    """Open a folder as the run would, whatever the run's own data were."""
    modality = open_shards(folder).index.modality
    sections = config.data.modalities
    if modality not in sections:
        raise ConfigError(f"{folder}: holds {modality}, the run has {', '.join(sections)}")
    data = replace(sections[modality], shards=folder, weights=None)
    reader = open_reader(modality, data, config.model.modalities[modality], None)
    problems = reader.misfits()
    own = folders_of(sections[modality].shards)[0]
    if own.is_dir() and open_shards(own).index.files_beside != open_shards(folder).index.files_beside:
        problems.append(
            f"its tokenizer is not that of {own}, on which the run was trained; pack with --tokenizer from there"
        )
    if problems:
        raise ConfigError(f"{folder}: " + "; ".join(problems))
    return reader


def _leave_one_out_task(reader: Reader, folder: Path, label: str, leave_out: str) -> Task:
    shards = open_shards(folder)
    pairs = zip(annotation(shards, label), annotation(shards, leave_out), strict=True)
    found = [(row, a, b) for row, (a, b) in enumerate(pairs) if a is not None and b is not None]
    if len({a for _, a, _ in found}) < 2 or len({b for _, _, b in found}) < 2:
        raise ConfigError(
            f"{folder}: expected rows of two classes and two groups or more, found {len(found)} that have both "
            f"{label} and {leave_out}; or give --test-shards"
        )
    rows, labels, groups = (list(column) for column in zip(*found, strict=True))
    folds = leave_one_out(groups)
    division = f"one {leave_out} of {len(folds)} left out in turn, mean"
    return Task(((reader, rows),), labels, folds, division)


def verdict(trained: Score, start: Score, block: int) -> str:
    """Verdict in one line."""
    found = gain(trained, start)
    numbers = (
        f"block {block} gives {100 * trained.logistic:.1f} % against {100 * start.logistic:.1f} % at random init "
        f"({found.points:+.1f} points, standard error {found.standard_error:.1f})"
    )
    if found.points >= LEARNED_POINTS and found.points > LEARNED_ERRORS * found.standard_error:
        return f"the model learned: {numbers}"
    expected = f"expected {LEARNED_POINTS:g} points or more, and more than {LEARNED_ERRORS:g} standard errors"
    return f"no clear sign of learning: {numbers}; {expected}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a probe."""

    folders: tuple[Path, ...]
    label: str
    leave_out: str
    block: int | None
    """Block of the verdict; None: that of the modality, the middle or the last one."""
    all_blocks: bool
    baseline: bool
    c: float | None
    neighbours: int | None
    tag: str | None


def probe(run_dir: Path, options: Options) -> str:
    """Score, print a table, write the scores into the run's folder and return the verdict.

    Raises:
        CheckpointError, ConfigError, ShardError, MissingExtraError: with what to do.
    """
    given = {name: value for name in ("c", "neighbours") if (value := getattr(options, name)) is not None}
    if problems := ProbeConfig(**given).check():
        raise ConfigError("; ".join(f"--{problem}" for problem in problems))
    config = run_config(run_dir)
    task = Task.read(config, options.folders, options.label, options.leave_out)
    defaults = known_modalities()[task.modality].probe
    settings = replace(ProbeConfig(c=defaults.c, neighbours=defaults.neighbours), **given)
    student, step = load_student(run_dir, options.tag)
    depth = student.depth(task.modality)
    default_block = depth // 2 if defaults.uses_middle_block else depth
    chosen = default_block if options.block is None else options.block
    if not 0 <= chosen <= depth:
        raise ConfigError(f"--block {chosen}: the model has blocks 1 to {depth}; 0 is the input of the first")
    blocks = range(depth + 1) if options.all_blocks else sorted({0, chosen})
    trained_features = task.features(student, f"student, step {step}")
    start_features = task.features(random_start(config), "random init")
    trained = {i: task.score(trained_features[i], settings) for i in blocks}
    start = {i: task.score(start_features[i], settings) for i in blocks}
    print(f"{options.label} of {len(task.labels)} rows, {task.division}; accuracy in %, C {settings.c:g}")
    print(f"{'block':>5} {'logistic':>9} {'random':>7} {'kNN':>6} {'random':>7}")
    for i in blocks:
        columns = (trained[i].logistic, start[i].logistic, trained[i].knn, start[i].knn)
        print("{:5d} {:9.1f} {:7.1f} {:6.1f} {:7.1f}".format(i, *(100 * value for value in columns)))
    result: dict[str, Any] = {
        "step": step,
        "label": options.label,
        "division": task.division,
        "probe": asdict(settings),
        "block": chosen,
        "gain": asdict(gain(trained[chosen], start[chosen])),
        "student": {i: found.to_dict() for i, found in trained.items()},
        "random_init": {i: found.to_dict() for i, found in start.items()},
    }
    if options.baseline and (baseline := task.baseline()) is not None:
        name, features = baseline
        found = task.score(features, settings)
        print(f"without a model, {name}: logistic {100 * found.logistic:.1f}, kNN {100 * found.knn:.1f}")
        result["baseline"] = {"name": name} | found.to_dict()
    joint = len(config.data.modalities) > 1
    path = run_dir / (f"probe-{task.modality}.json" if joint else "probe.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return verdict(trained[chosen], start[chosen], chosen)
