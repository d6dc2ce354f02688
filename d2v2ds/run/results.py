"""Results of several evaluations as one table: runs of a sweep, their seeds together, settings of a decoder."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import read_json, validate

FILE = "evaluation.json"
_SEED = re.compile(r"(?<![^/,])run\.seed=\d+(?![^/,])")


@dataclass(frozen=True)
class Score:
    """One number of an evaluation."""

    value: float
    interval: tuple[float, float]
    """Bounds of 95 % over rows; of a mean over seeds the least and the greatest value."""


def find_results(folders: Sequence[Path]) -> dict[str, dict[str, Score]]:
    """Read every evaluation.json in or below folders: scores by measure, by the name of the run or the setting.

    Results that would have one name have that of their whole folder.

    Raises:
        ConfigError: there is none, or one is damaged.
    """
    names: dict[Path, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob(FILE)):
            parts = [part for part in path.parent.relative_to(folder).parts if part != "evaluation"]
            names[path] = "/".join([folder.name, *parts] if len(folders) > 1 or not parts else parts)
    if not names:
        raise ConfigError(f"{', '.join(map(str, folders))}: expected {FILE} of d2v2ds.evaluate below it, found none")
    count = Counter(names.values())
    return {
        name if count[name] == 1 else str(path.parent): _scores(read_json(path, ConfigError), path)
        for path, name in names.items()
    }


def _scores(result: Mapping[str, Any], path: Path) -> dict[str, Score]:
    """Scores of one file by measure, such as `greedy wer` and `accuracy`."""
    plain: dict[str, Any] = dict(result.get("scores") or {})
    for decoder in ("greedy", "beam"):
        own = result.get(decoder) or {}
        plain |= {f"{decoder} {measure}": own[measure] for measure in ("wer", "cer") if measure in own}
    if not plain:
        raise ConfigError(f"{path}: expected scores of d2v2ds.evaluate, found {', '.join(result) or 'nothing'}")
    wanted = {
        name: {key: one.get(key) for key in ("value", "interval")} if isinstance(one, dict) else one
        for name, one in plain.items()
    }
    return {name: validate(Score, one, f"{path}: {name}", ConfigError) for name, one in wanted.items()}


def over_seeds(results: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Score]]:
    """Average runs whose names differ in `run.seed=N` alone, with their least and greatest values."""
    groups: dict[str, list[Mapping[str, Score]]] = {}
    for name, scores in results.items():
        parts = [",".join(filter(None, part.split(","))) for part in _SEED.sub("", name).split("/")]
        groups.setdefault("/".join(filter(None, parts)) or "all", []).append(scores)
    means: dict[str, dict[str, Score]] = {}
    for name, members in groups.items():
        if len(members) > 1:
            shared = [measure for measure in members[0] if all(measure in one for one in members)]
            values = {measure: [one[measure].value for one in members] for measure in shared}
            means[f"{name}, mean of {len(members)} seeds"] = {
                measure: Score(sum(own) / len(own), (min(own), max(own))) for measure, own in values.items()
            }
    return means


def table(results: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """Lines for a reader: a row for each result, a column for each measure."""
    measures = list(dict.fromkeys(measure for scores in results.values() for measure in scores))
    rows = [["", *measures]]
    for name, scores in results.items():
        rows.append([name, *(_said(scores.get(measure)) for measure in measures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths) for row in rows]


def _said(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.2f} ({score.interval[0]:.2f} to {score.interval[1]:.2f})"


def _line(row: Iterable[str], widths: Iterable[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
