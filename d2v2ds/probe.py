"""Judge a run by what its features know: a probe on frozen, mean-pooled features beside the run's own random start.

    python -m d2v2ds.probe RUN --shards DIR --label digit --leave-out speaker [--block 2 | --all-blocks]
    python -m d2v2ds.probe RUN --shards TRAIN --test-shards VALID [--baseline]

A block of the student is scored by logistic regression and by nearest neighbours, either leaving out one speaker at a
time, or fitted on one folder and tested on another; the last line says in one sentence whether the model learned: by
more points than chance among so few rows would give.
Scores are also written to RUN/probe.json (of a joint run RUN/probe-MODALITY.json).
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.config.load import RunConfig
from d2v2ds.data.collate import Reader
from d2v2ds.data.joined import folders_of
from d2v2ds.data.readers import open_reader
from d2v2ds.data.shards import open_shards
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.evals.baselines import BASELINES
from d2v2ds.evals.features import annotation, pooled_features
from d2v2ds.evals.probes import Fold, ProbeConfig, Score, gain, leave_one_out, score
from d2v2ds.export import load_student, run_config
from d2v2ds.model.init import initialise
from d2v2ds.model.trunk import Data2Vec2
from d2v2ds.run.machine import tune_cpu

LEARNED_POINTS = 5.0
"""Percentage points over the random start that count as having learned..."""
LEARNED_ERRORS = 2.0
"""... if they are more than so many standard errors, too: of 2,000 clips one is about a point, of 40 about nine."""
PROBES = {
    "audio": ProbeConfig(c=1.0, neighbours=5),
    "image": ProbeConfig(c=0.1, neighbours=10),
    "text": ProbeConfig(c=1.0, neighbours=10),
}
"""Settings of each modality's probe where none are given."""


def random_start(config: RunConfig) -> Data2Vec2:
    """The very weights the run began with."""
    model = Data2Vec2(config.model)
    initialise(model, config.run.seed)
    return model.eval()


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
        """Of the inputs."""
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

    def features(self, model: Data2Vec2, name: str) -> list[Any]:
        """Pooled outputs, input of the first block included."""
        found = [pooled_features(model, reader, rows, progress=name) for reader, rows in self.parts]
        return [np.concatenate(layers) for layers in zip(*found, strict=True)]

    def score(self, features: Any, probe: ProbeConfig) -> Score:
        """Of one matrix of features."""
        return score(features, self.labels, self.folds, probe)

    def baseline(self) -> tuple[str, Any] | None:
        """What needs no model, if the modality has such a thing."""
        if self.modality not in BASELINES:
            return None
        name, compute = BASELINES[self.modality]
        joined = _Joined(self.parts)
        return name, compute(joined, range(len(joined)))  # type: ignore[arg-type]


class _Joined:
    """The labelled rows of several folders as one."""

    def __init__(self, parts: Sequence[tuple[Reader, list[int]]]) -> None:
        self.places = [(reader, row) for reader, rows in parts for row in rows]

    def __len__(self) -> int:
        return len(self.places)

    def read_whole(self, index: int) -> Any:
        reader, row = self.places[index]
        return reader.read_whole(row)


def _reader(config: RunConfig, folder: Path) -> Reader:
    """Open a folder as the run would, whatever the run's own data were."""
    modality = open_shards(folder).index.modality
    sections, models = config.data.active(), config.model.modalities.active()
    if modality not in sections:
        raise ConfigError(f"{folder}: holds {modality}, the run has {', '.join(sections)}")
    reader = open_reader(modality, replace(sections[modality], shards=folder), models[modality])
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
    """One line."""
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
    """What is scored."""

    folders: tuple[Path, ...]
    label: str
    leave_out: str
    block: int | None
    """Of the verdict; None: the middle one of speech, the last one else."""
    all_blocks: bool
    baseline: bool
    c: float | None
    neighbours: int | None
    tag: str | None


DEFAULT_BLOCK = {"audio": lambda depth: depth // 2}
"""Modality -> number of blocks -> block of the verdict, where that is not the last one."""


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
    settings = replace(PROBES[task.modality], **given)
    student, step = load_student(run_dir, options.tag)
    depth = student.depth(task.modality)
    chosen = DEFAULT_BLOCK.get(task.modality, lambda all_of_them: all_of_them)(depth)
    chosen = chosen if options.block is None else options.block
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
    joint = len(config.data.active()) > 1
    path = run_dir / (f"probe-{task.modality}.json" if joint else "probe.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return verdict(trained[chosen], start[chosen], chosen)


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--shards", type=Path, required=True, help="labelled rows, packed without joining or blocks")
    parser.add_argument("--test-shards", type=Path, help="fit on --shards and test on these")
    parser.add_argument("--label", default="label", help="annotation to predict")
    parser.add_argument("--leave-out", default="speaker", help="annotation whose values are left out in turn")
    parser.add_argument("--block", type=int, help="block of the verdict; the middle one of speech, else the last one")
    parser.add_argument("--all-blocks", action="store_true", help="score every block")
    parser.add_argument("--baseline", action="store_true", help="score what needs no model, too (images and text)")
    parser.add_argument("--c", type=float, help="inverse strength of the L2 of logistic regression")
    parser.add_argument("--neighbours", type=int, help="of the kNN probe")
    parser.add_argument("--checkpoint", help="tag of a checkpoint; the newest if not given")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    tune_cpu(processes=1)
    folders = (options.shards,) if options.test_shards is None else (options.shards, options.test_shards)
    try:
        print(
            probe(
                options.run,
                Options(
                    folders=folders,
                    label=options.label,
                    leave_out=options.leave_out,
                    block=options.block,
                    all_blocks=options.all_blocks,
                    baseline=options.baseline,
                    c=options.c,
                    neighbours=options.neighbours,
                    tag=options.checkpoint,
                ),
            )
        )
    except D2V2Error as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
