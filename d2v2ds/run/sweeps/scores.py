"""Scores of the cells of a sweep, each with the training time and the amount of data that it took."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2v2ds.data.schema import read_index
from d2v2ds.errors import ConfigError
from d2v2ds.io.read import is_there, json_lines, read_json
from d2v2ds.modalities.known import known_modalities
from d2v2ds.run.folder import run_config
from d2v2ds.run.probing import PROBES
from d2v2ds.run.sweeps.cells import Cell
from d2v2ds.run.sweeps.settings import ProbeScore, Sweep
from d2v2ds.train.metrics import read_metrics

_NORMAL_95 = 1.96
"""Standard errors of a 95 % interval."""
ERROR_MEASURES = {"cer", "wer"}
"""Measures of which less is better."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One score of one cell; a row of sweep.csv."""

    cell: str
    setting: str
    """Switches without the seed."""
    switches: Mapping[str, str]
    seed: int
    measure: str
    """probe/logistic, finetune/scores.accuracy and so on."""
    steps: int
    """Optimizer steps before this score."""
    samples: float
    """Inputs before this score, in `unit`, masks not counted."""
    unit: str
    seconds: float
    """Wall-clock seconds of training before this score, without validation, probes and saving."""
    score: float
    """In %."""
    low: float | None
    high: float | None
    """95 % interval over the tested rows, not over seeds; None if the score has none."""
    memory_gib: float
    """Peak memory of a rank so far; NaN before the first step."""

    @property
    def is_error(self) -> bool:
        """True if less is better."""
        return is_error(self.measure)


@dataclass(frozen=True)
class Passed:
    """Time, samples and memory of a run up to a step."""

    seconds: float
    samples: float
    memory_gib: float


def is_error(measure: str) -> bool:
    """True for a measure of which less is better."""
    return measure.replace("/", ".").rpartition(".")[2] in ERROR_MEASURES


def rows_of(sweep: Sweep, cell: Cell) -> list[Row]:
    """Read the scores of a cell that are there, in order of their steps; the first is that of the random start.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not is_there(cell.folder / "config.yaml", ConfigError):
        return []
    modality = next(iter(run_config(cell.folder).data.modalities))
    if sweep.score.probe is not None:
        modality = read_index(sweep.score.probe.shards).modality
    unit = known_modalities()[modality].unit
    records = list(read_metrics(cell.folder / "metrics.jsonl"))
    passed = passed_by_step(records, unit.total_metric, unit.total_size)
    found = [] if sweep.score.probe is None else list(_probe_scores(cell, sweep.score.probe, modality))
    if sweep.score.finetune is not None and passed:
        found += list(_tuned_scores(cell, sweep.score.finetune.measure, max(passed)))
    passed[0] = Passed(0.0, 0.0, math.nan)
    return [
        Row(
            cell=cell.name, setting=cell.setting, switches=cell.switches, seed=cell.seed, measure=measure, steps=step,
            samples=passed[step].samples, unit=unit.name, seconds=passed[step].seconds,
            score=score, low=low, high=high, memory_gib=passed[step].memory_gib,
        )
        for measure, step, score, low, high in found
        if step in passed
    ]  # fmt: skip


def passed_by_step(records: Sequence[Mapping[str, float]], amount: str, size: float) -> dict[int, Passed]:
    """Sum the time of the steps between records of metrics.

    Args:
        records: of `metrics.jsonl`; a resumed run has one for each part of its steps.
        amount: metric of the amount of data.
        size: units in one of that metric.
    """
    found: dict[int, Passed] = {}
    before, seconds, memory = 0, 0.0, 0.0
    for record in records:
        step = int(record["step"])
        if "perf/step_ms" not in record or step <= before:
            continue
        seconds += (step - before) * record["perf/step_ms"] / 1000
        memory = max(memory, record.get("perf/memory_gib", 0.0))
        found[step] = Passed(seconds, record.get(amount, 0.0) * size, memory)
        before = step
    return found


Scored = tuple[str, int, float, float | None, float | None]
"""(measure, step, score, low, high)."""


def _probe_scores(cell: Cell, probe: ProbeScore, modality: str) -> Iterator[Scored]:
    """Yield the probe's score at every step, that of the random start at step 0."""
    records: dict[int, dict[str, Any]] = {}
    for record in json_lines(cell.folder / PROBES, ConfigError):
        if (record.get("kind"), record.get("modality")) == (probe.kind, modality):
            records[int(record["step"])] = record
    for number, step in enumerate(sorted(records)):
        record = records[step]
        block, own = str(record["block"]), record["measure"]
        name = probe.measure or own
        if name not in record["student"][block]:
            known = ", ".join(one for one in record["student"][block] if one != "folds")
            raise ConfigError(f"score.probe.measure: expected one of {known}, found {name}")
        if number == 0:
            yield f"probe/{name}", 0, 100 * record["random_init"][block][name], None, None
        score = 100 * record["student"][block][name]
        margin = _NORMAL_95 * 100 * record["standard_error"]
        bounds = (score - margin, score + margin) if name == own else (None, None)
        yield f"probe/{name}", step, score, *bounds


def _tuned_scores(cell: Cell, measure: str, step: int) -> Iterator[Scored]:
    """Yield the score of the fine-tuned model, at the last step of the pretraining."""
    file = cell.folder / "finetune" / "evaluation" / "evaluation.json"
    if not is_there(file, ConfigError):
        return
    value: Any = read_json(file, ConfigError)
    for key in measure.split("."):
        if not isinstance(value, dict) or key not in value:
            known = ", ".join(value) if isinstance(value, dict) else "nothing below it"
            raise ConfigError(f"score.finetune.measure {measure}: {file} has no {key!r}, found {known}")
        value = value[key]
    yield f"finetune/{measure}", step, value["value"], *value["interval"]
