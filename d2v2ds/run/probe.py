"""Judge a run by its features: probes on frozen features beside the run's own random start.

A block of the student is scored by linear models and nearest neighbours, and if asked a learned sum of all layers and
attention over frames, either leaving out one group at a time, or fitted on one folder and tested on another. The
verdict compares it with the same block at random init: it must gain more points than chance among so few rows would
give.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import d2v2ds
from d2v2ds.config.load import to_dict
from d2v2ds.config.schema import RunConfig
from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.evals.features import Features
from d2v2ds.evals.letters import score_letters
from d2v2ds.evals.probes import ProbeConfig, Score, fit_threads, gain, score, score_attention, score_layers
from d2v2ds.io import durable
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import Trunk
from d2v2ds.run.folder import checkpoint_folder, load_student, run_config
from d2v2ds.run.probe_start import kept_scores
from d2v2ds.run.probe_task import Question, Task
from d2v2ds.run.probing import append_record

LEARNED_POINTS = 5.0
"""Percentage points over the random start that count as having learned..."""
LEARNED_ERRORS = 2.0
"""... if they are more than so many standard errors, too: of 2,000 clips one is about a point, of 40 about nine."""
LAYERS, ATTENTION = "layers", "attention"
"""Rows of the table beside those of blocks."""


def random_start(config: RunConfig) -> Trunk:
    """Draw a trunk from the run's seed as its objective draws the first weights."""
    objective = config.objective.build(config.model, config.run.seed)
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, config.run.seed)
    trunk: Any = network.trunk
    assert isinstance(trunk, Trunk)
    return trunk.eval()


def verdict(trained: Score, start: Score, where: str) -> str:
    """Verdict in one line."""
    found = gain(trained, start)
    name = "" if trained.name in ("logistic", "accuracy") else f"{trained.name} "
    numbers = (
        f"{where} gives {name}{100 * trained.value:.1f} % against {100 * start.value:.1f} % at random init "
        f"({found.points:+.1f} points, standard error {found.standard_error:.1f})"
    )
    if found.points >= LEARNED_POINTS and found.points > LEARNED_ERRORS * found.standard_error:
        return f"the model learned: {numbers}"
    expected = f"expected {LEARNED_POINTS:g} points or more, and more than {LEARNED_ERRORS:g} standard errors"
    return f"no clear sign of learning: {numbers}; {expected}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a probe beside its question."""

    block: int | None = None
    """Block of the verdict; None: that of the modality, the middle or the last one."""
    all_blocks: bool = False
    layers: bool = False
    """Score a learned sum of all layers."""
    attention: bool = False
    """Score attention over the frames of the block."""
    baseline: bool = False
    c: float | None = None
    neighbours: int | None = None
    tag: str | None = None
    threads: int = 1
    """Threads of the fits."""
    memory_gib: float = 2.0
    """Most memory for frames."""
    append: bool = False
    """Append the scores to `probes.jsonl` and TensorBoard in place of writing `probe.json`."""

    @property
    def probe_settings(self) -> dict[str, Any]:
        """Settings of `ProbeConfig` that are given."""
        return {name: value for name in ("c", "neighbours") if (value := getattr(self, name)) is not None}

    def check(self, kind: str) -> None:
        """Check the options by themselves.

        Raises:
            ConfigError: naming what is wrong.
        """
        problems = ProbeConfig(**self.probe_settings).check()
        if self.threads < 1:
            problems.append(f"threads is {self.threads}, expected 1 or more")
        if not self.memory_gib > 0:
            problems.append(f"memory-gib is {self.memory_gib:g}, expected a number above 0")
        for name in ("all_blocks", "layers", "attention", "baseline"):
            if kind == "ctc" and getattr(self, name):
                problems.append(
                    f"{name.replace('_', '-')}: a probe of transcripts (--kind ctc) reads one block's frames"
                )
        if problems:
            raise ConfigError("; ".join(f"--{problem}" for problem in problems))


@dataclass(frozen=True)
class Probe:
    """A probe of one model: which rows of the table there are, and what they need."""

    task: Task
    settings: ProbeConfig
    blocks: tuple[int, ...]
    chosen: int
    """Block of the verdict, and of the frames."""
    layers: bool
    attention: bool

    @property
    def reads_frames(self) -> bool:
        """True if a row of the table needs frames."""
        return self.attention or self.task.wanted is None

    def scores(self, model: Trunk, name: str, threads: int) -> dict[str, Score]:
        """Score a model: by row of the table."""
        features = self.task.features(model, name, self.chosen if self.reads_frames else None)
        rows = [*map(str, self.blocks), *[LAYERS] * self.layers, *[ATTENTION] * self.attention]
        with fit_threads(threads):
            return {
                row: self._score(row, features)
                for row in tqdm(rows, f"fits, {name}", unit="fit", leave=False, disable=None)
            }

    def _score(self, row: str, features: Features) -> Score:
        task, settings = self.task, self.settings
        if task.wanted is None:
            return score_letters(features.frames, task.labels, task.folds)
        if row == LAYERS:
            return score_layers(features, task.wanted, task.folds, settings)
        if row == ATTENTION:
            return score_attention(features, task.wanted, task.folds, settings)
        return score(features.layers[int(row)], task.wanted, task.folds, settings)


def probe(run_dir: Path, question: Question, options: Options) -> str:
    """Score, print a table, write the scores into the run's folder and return the verdict.

    Raises:
        CheckpointError, ConfigError, ShardError, MissingExtraError: with what to do.
    """
    began = time.monotonic()
    options.check(question.kind)
    config = run_config(run_dir)
    task = Task.read(config, question)
    settings = task.probe_config(**options.probe_settings)
    student, step = _student(run_dir, options.tag)
    plan = _plan(task, student, settings, options)
    task.check(settings, student.config.block.width if plan.reads_frames else 0, options.memory_gib)
    trained = plan.scores(student, f"student, step {step}", options.threads)
    start = _start_scores(run_dir, config, question, plan, options)
    print(f"{question.column} of {len(task.labels)} rows, {task.division}; in %, C {settings.c:g}")
    print("\n".join(table(trained, start)))
    chosen = str(plan.chosen)
    result: dict[str, Any] = {
        "step": step,
        "kind": question.kind,
        "modality": task.modality,
        "label": question.column,
        "division": task.division,
        "probe": asdict(settings),
        "block": plan.chosen,
        "measure": trained[chosen].name,
        "standard_error": trained[chosen].standard_error,
        "gain": asdict(gain(trained[chosen], start[chosen])),
        "student": {row: found.to_dict() for row, found in trained.items()},
        "random_init": {row: found.to_dict() for row, found in start.items()},
    }
    if options.baseline and task.wanted is not None and (baseline := task.baseline()) is not None:
        name, features = baseline
        with fit_threads(options.threads):
            found = score(features, task.wanted, task.folds, settings)
        said = ", ".join(f"{measure} {100 * value:.1f}" for measure, value in found.values.items())
        print(f"without a model, {name}: {said}")
        result["baseline"] = {"name": name} | found.to_dict()
    joint = len(config.data.modalities) > 1
    if options.append:
        _append(run_dir, result | {"seconds": round(time.monotonic() - began, 1)}, joint)
    else:
        path = run_dir / (f"probe-{task.modality}.json" if joint else "probe.json")
        durable.replace_text(path, json.dumps(result, indent=1) + "\n")
    return verdict(trained[chosen], start[chosen], f"block {chosen}")


def _start_scores(
    run_dir: Path, config: RunConfig, question: Question, plan: Probe, options: Options
) -> dict[str, Score]:
    """Score the random start; the probes that a run starts itself, with `append`, do so once for all."""

    def compute() -> dict[str, Score]:
        return plan.scores(random_start(config), "random init", options.threads)

    if not options.append:
        return compute()
    modality = plan.task.modality
    depends_on = {
        "versions": (d2v2ds.__version__, torch.__version__),
        "seed": config.run.seed,
        "network": to_dict(config.model),
        "objective": to_dict(config.objective),
        "data": to_dict(config.data.modalities[modality]),
        "question": asdict(question),
        "folders": [part.index.checksums() for reader, _ in plan.task.parts for part in reader.shards.parts],
        "probe": asdict(plan.settings),
        "rows": (plan.blocks, plan.chosen, plan.layers, plan.attention),
    }
    return kept_scores(run_dir / f"probe-start-{modality}-{question.kind}.json", depends_on, compute)


def _student(run_dir: Path, tag: str | None) -> tuple[Trunk, int]:
    """Load the student of a checkpoint.

    Raises:
        CheckpointError: there is none, or a run at work removed it meanwhile, in one line.
    """
    folder = checkpoint_folder(run_dir, tag)
    try:
        return load_student(run_dir, folder.name)
    except CheckpointError as error:
        if folder.is_dir():
            raise
        raise CheckpointError(
            f"{folder}: removed while it was read; raise run.keep_checkpoints, or probe another checkpoint"
        ) from error


def _plan(task: Task, student: Trunk, settings: ProbeConfig, options: Options) -> Probe:
    """Choose the rows of the table.

    Raises:
        ConfigError: there is no such block.
    """
    depth = student.depth(task.modality)
    default_block = depth // 2 if known_modalities()[task.modality].probe.uses_middle_block else depth
    chosen = default_block if options.block is None else options.block
    if not 0 <= chosen <= depth:
        raise ConfigError(f"--block {chosen}: the model has blocks 1 to {depth}; 0 is the input of the first")
    blocks = range(depth + 1) if options.all_blocks else sorted({0, chosen})
    if task.wanted is None:
        blocks = [chosen]
    return Probe(task, settings, tuple(blocks), chosen, options.layers, options.attention)


def table(trained: Mapping[str, Score], start: Mapping[str, Score]) -> list[str]:
    """Lines for a reader: scores of the student in %, each beside that of the random start."""
    names = list(dict.fromkeys(_column(name) for found in trained.values() for name in _shown(found)))
    lines = [f"{'block':>9}" + "".join(f" {name:>9} {'random':>7}" for name in names)]
    for row, found in trained.items():
        cells = f"{row:>9}"
        own, others = ({_column(name): value for name, value in _shown(one).items()} for one in (found, start[row]))
        for name in names:
            cells += f" {100 * own[name]:9.1f} {100 * others[name]:7.1f}" if name in own else " " * 18
        lines.append(cells)
    if LAYERS in trained:
        weights = [value for name, value in trained[LAYERS].more.items() if name.startswith("weight_")]
        lines.append("layer weights of the student: " + " ".join(f"{weight:.2f}" for weight in weights))
    return lines


def _shown(found: Score) -> dict[str, float]:
    """Scores that are columns of the table."""
    return {name: value for name, value in found.values.items() if not name.startswith("weight_")}


def _column(name: str) -> str:
    """Column of a score: accuracies of linear layers share one."""
    return {"accuracy": "logistic", "knn": "kNN"}.get(name, name)


def _append(run_dir: Path, result: Mapping[str, Any], joint: bool) -> None:
    """Append the scores to `probes.jsonl`, and those of the verdict's block to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    time_now = datetime.now(UTC).isoformat(timespec="seconds")
    append_record(run_dir, {"time": time_now, **result})
    prefix = f"{result['modality']}/" if joint else ""
    prefix += "probe" if result["kind"] == "one" else f"probe/{result['kind']}"
    scores = result["student"][str(result["block"])]
    values = {name: value for name, value in scores.items() if name != "folds"} | {"gain": result["gain"]["points"]}
    with SummaryWriter(str(run_dir / "tensorboard" / "probe")) as writer:
        for name, value in values.items():
            writer.add_scalar(f"{prefix}/{name}", value, result["step"])


def end_with_input() -> None:
    """End this process when its standard input ends, as that of a run's probe does with the run."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    sys.stdin = None
    threading.Thread(target=wait, daemon=True).start()
