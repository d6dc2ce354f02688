"""Labelled inputs of a probe: which rows, what is predicted from them, and how they are divided."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.config.schema import ProbeKind, RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.reader import Reader
from d2v2ds.errors import ConfigError
from d2v2ds.evals.features import Features, annotation, check_memory, compute_features, frame_bytes
from d2v2ds.evals.letters import check_letters
from d2v2ds.evals.probes import Fold, ProbeConfig, check_folds, leave_one_out
from d2v2ds.evals.wanted import Number, OneClass, SeveralClasses, Wanted
from d2v2ds.modalities.known import known_modalities, modality_reading, open_reader, open_shards
from d2v2ds.model.trunk import Trunk
from d2v2ds.tasks.words import edit_counts


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is predicted from which rows."""

    folders: tuple[Path, ...]
    """Folder that is divided by `leave_out`, or a fitted and a tested one."""
    kind: ProbeKind = "one"
    label: str | None = None
    """Annotation that is predicted; None: `label`, of ctc `text`."""
    leave_out: str = "speaker"
    """Annotation whose values are left out in turn."""
    divider: str = ","
    """Character between several classes of one row."""

    @property
    def column(self) -> str:
        """Annotation that is predicted."""
        return self.label or ("text" if self.kind == "ctc" else "label")


@dataclass(frozen=True)
class Task:
    """Labelled inputs of one modality, and how they are divided."""

    parts: tuple[tuple[Reader, list[int]], ...]
    """One or two folders, and the labelled rows of each."""
    labels: list[str]
    wanted: Wanted | None
    """Labels as a probe predicts them; None for transcripts."""
    folds: list[Fold]
    division: str

    @property
    def modality(self) -> str:
        """Modality of the inputs."""
        return self.parts[0][0].modality

    @staticmethod
    def read(config: RunConfig, question: Question) -> "Task":
        """Read the labels of all rows that have what is asked for.

        Raises:
            ConfigError, ShardError: the folders do not answer the question.
            MissingExtraError: a package is not installed.
        """
        folders = question.folders
        readers = [_reader(config, folder) for folder in folders]
        if question.kind == "ctc":
            edit_counts([], [])  # needs a package
        if len(readers) == 1:
            return _leave_one_out_task(readers[0], folders[0], question)
        if (first := readers[0].modality) != (second := readers[1].modality):
            raise ConfigError(f"{folders[1]}: holds {second}, {folders[0]} holds {first}; both must be of one modality")
        parts, labels, sides = [], [], []
        for side, (reader, folder) in enumerate(zip(readers, folders, strict=True)):
            values = annotation(open_shards(folder), question.column)
            found = [(row, name) for row, name in enumerate(values) if name]
            parts.append((reader, [row for row, _ in found]))
            labels += [name for _, name in found]
            sides += [side] * len(found)
        fitted = np.array(sides) == 0
        if question.kind == "one" and len(classes := set(labels[: fitted.sum()])) < 2:
            raise ConfigError(
                f"{folders[0]}: expected rows of two classes or more of {question.column}, found only {classes.pop()!r}"
            )
        fold = Fold(folders[1].name, fitted, ~fitted)
        division = f"fitted on {fitted.sum()}, tested on {(~fitted).sum()}"
        return Task(tuple(parts), labels, _wanted(question, labels), [fold], division)

    def check(self, config: ProbeConfig, frame_width: int, memory_gib: float) -> None:
        """Check that probes can be fitted, and that the frames of all rows fit into memory if they are needed.

        Args:
            config: of the probes.
            frame_width: D, 0 if no frames are needed.
            memory_gib: most memory for frames.

        Raises:
            ConfigError: they cannot or do not.
        """
        if self.wanted is None:
            check_letters(self.labels, self.folds)
        else:
            check_folds(self.wanted, self.folds, config)
        check_memory(sum(frame_bytes(reader, rows, frame_width) for reader, rows in self.parts), memory_gib)

    def probe_config(self, **given: Any) -> ProbeConfig:
        """Return the settings of the probes: those given, else the modality's."""
        defaults = known_modalities()[self.modality].probe
        return replace(ProbeConfig(c=defaults.c, neighbours=defaults.neighbours), **given)

    def features(self, model: Trunk, name: str, frames_of: int | None = None) -> Features:
        """Compute pooled outputs, input of the first block included, and the frames of one layer."""
        return Features.join(
            [compute_features(model, reader, rows, progress=name, frames_of=frames_of) for reader, rows in self.parts]
        )

    def baseline(self) -> tuple[str, Any] | None:
        """Name and features of the modality's baseline, if it has one."""
        baseline = known_modalities()[self.modality].baseline
        if baseline is None:
            return None
        return baseline.name, baseline.compute(reader.read_whole(row) for reader, rows in self.parts for row in rows)


def _reader(config: RunConfig, folder: Path) -> Reader:
    """Open a folder as the run would, whatever the run's own data were."""
    sections = config.data.modalities
    modality = modality_reading(folder, sections)
    if modality is None:
        raise ConfigError(f"{folder}: holds {open_shards(folder).index.modality}, the run has {', '.join(sections)}")
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


def _leave_one_out_task(reader: Reader, folder: Path, question: Question) -> Task:
    shards, label, leave_out = open_shards(folder), question.column, question.leave_out
    pairs = zip(annotation(shards, label), annotation(shards, leave_out), strict=True)
    found = [(row, a, b) for row, (a, b) in enumerate(pairs) if a and b]
    classes = len({a for _, a, _ in found})
    if classes < 2 or len({b for _, _, b in found}) < 2:
        raise ConfigError(
            f"{folder}: expected rows of two classes and two groups or more, found {len(found)} that have both "
            f"{label} and {leave_out}; or give --test-shards"
        )
    rows, labels, groups = (list(column) for column in zip(*found, strict=True))
    folds = leave_one_out(groups)
    division = f"one {leave_out} of {len(folds)} left out in turn, mean"
    return Task(((reader, rows),), labels, _wanted(question, labels), folds, division)


def _wanted(question: Question, labels: Sequence[str]) -> Wanted | None:
    """Encode labels; transcripts are spelled by the probe itself, from the letters of the fitted rows."""
    if question.kind == "ctc":
        return None
    if question.kind == "several":
        return SeveralClasses(labels, question.divider)
    return Number(labels) if question.kind == "number" else OneClass(labels)
