"""Scores of the random start that a run's probes share."""

from pathlib import Path

import numpy as np
import pytest

from d2v2ds.evals.probes import Score
from d2v2ds.run.probe_start import kept_scores


def scores() -> dict[str, Score]:
    parts = {"a": np.random.default_rng(0).random(5), "b": np.array([1 / 3])}
    return {"0": Score("logistic", parts, {"knn": 0.1}), "2": Score("cer", parts, is_error=True)}


def never() -> dict[str, Score]:
    raise AssertionError("they are kept")


def test_scores_are_computed_once_and_read_bit_for_bit(tmp_path: Path) -> None:
    given = {"folder": Path("x"), "rows": (1, 2)}
    kept_scores(tmp_path / "start.json", given, scores)
    found = kept_scores(tmp_path / "start.json", given, never)
    for row, one in scores().items():
        assert found[row].to_dict() == one.to_dict() and found[row].is_error == one.is_error
        assert all((found[row].parts[name] == part).all() for name, part in one.parts.items())


@pytest.mark.parametrize("content", ["{", "[]", '{"key": 1, "scores": {}}'])
def test_damaged_file_is_written_anew(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "start.json"
    path.write_text(content)
    assert kept_scores(path, {}, scores).keys() == scores().keys()
    assert str(path) in caplog.text
    kept_scores(path, {}, never)


def test_scores_of_other_folders_or_settings_are_not_taken(tmp_path: Path) -> None:
    kept_scores(tmp_path / "start.json", {"c": 1.0}, scores)
    other = kept_scores(tmp_path / "start.json", {"c": 2.0}, lambda: {"9": scores()["0"]})
    assert list(other) == ["9"]
    assert list(kept_scores(tmp_path / "start.json", {"c": 2.0}, never)) == ["9"]
