"""Scores of a run's random start, kept for the run: its probes ask for the same ones at every interval."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.evals.probes import Score
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, read_json, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Stored:
    """A `Score` as plain values."""

    name: str
    parts: dict[str, list[float]]
    more: dict[str, float]
    is_error: bool


@dataclass(frozen=True)
class _File:
    """Content of a file of scores."""

    key: str
    scores: dict[str, _Stored]


def kept_scores(path: Path, depends_on: Mapping[str, Any], compute: Callable[[], dict[str, Score]]) -> dict[str, Score]:
    """Return the scores that a file keeps, or compute and write them.

    Args:
        path: of the file; one that is damaged, or made of other things, is written anew.
        depends_on: plain values of everything that the scores depend on.
        compute: returns the scores by row of the table.
    """
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    try:
        if is_there(path, ConfigError):
            found = validate(_File, read_json(path, ConfigError), path, ConfigError)
            if found.key == key:
                return {row: _score(one) for row, one in found.scores.items()}
    except D2V2Error as error:
        logger.warning("%s; written anew", error)
    scores = compute()
    plain = {row: asdict(_stored(score)) for row, score in scores.items()}
    durable.replace_text(path, json.dumps({"key": key, "scores": plain}) + "\n")
    return scores


def _stored(score: Score) -> _Stored:
    parts = {name: values.tolist() for name, values in score.parts.items()}
    return _Stored(score.name, parts, dict(score.more), score.is_error)


def _score(stored: _Stored) -> Score:
    parts = {name: np.array(values, dtype=np.float64) for name, values in stored.parts.items()}
    return Score(stored.name, parts, stored.more, stored.is_error)
