"""Results of a sweep as one table: names, intervals, means over seeds, damaged files."""

import json
from pathlib import Path
from typing import Any

import pytest

from d2v2ds.results import main


def evaluated(folder: Path, scores: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(scores))


def score(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 1, value + 2.5], "wanted": 9}


def test_runs_stand_beside_each_other_and_seeds_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("lr.peak=1,run.seed=1", 60), ("lr.peak=1,run.seed=12", 70), ("lr.peak=2,run.seed=1", 50)):
        evaluated(tmp_path / name / "evaluation", {"scores": {"accuracy": score(value), "f1": score(value / 2)}})
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "                            accuracy                f1",
        "lr.peak=1,run.seed=1        60.00 (59.00 to 62.50)  30.00 (29.00 to 32.50)",
        "lr.peak=1,run.seed=12       70.00 (69.00 to 72.50)  35.00 (34.00 to 37.50)",
        "lr.peak=2,run.seed=1        50.00 (49.00 to 52.50)  25.00 (24.00 to 27.50)",
        "lr.peak=1, mean of 2 seeds  65.00 (60.00 to 70.00)  32.50 (30.00 to 35.00)",
    ]


def test_error_rates_of_several_folders_have_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "a", {"greedy": {"wer": score(9), "cer": score(4), "worst": []}})
    evaluated(tmp_path / "b" / "w=1", {"greedy": {"wer": score(9)}, "beam": {"wer": score(7)}})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("  beam wer") and lines[1].startswith("a ") and lines[2].startswith("b/w=1 ")
    assert lines[2].endswith("7.00 (6.00 to 9.50)") and "4.00 (3.00" in lines[1] and "4.00 (3.00" not in lines[2]


def test_seeds_are_averaged_within_each_of_several_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a/run.seed=1,x=1", 1), ("a/run.seed=2,x=1", 3), ("b/run.seed=1/y", 5), ("b/run.seed=2/y", 9)):
        evaluated(tmp_path / name, {"scores": {"accuracy": score(value)}})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[5:]] == ["a/x=1, mean of 2 seeds", "b/y, mean of 2 seeds"]
    assert "2.00 (1.00 to 3.00)" in lines[5] and "7.00 (5.00 to 9.00)" in lines[6]


def test_results_of_one_name_are_all_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a/run", 1), ("b/run", 3), ("b/run/evaluation", 5)):
        evaluated(tmp_path / name, {"scores": {"accuracy": score(value)}})
    assert main([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split("  ")[0] for line in lines) == [
        str(tmp_path / name) for name in ("a/run", "b/run", "b/run/evaluation")
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected evaluation.json of d2v2ds.evaluate below it, found none"),
        ({"rows": 3}, "evaluation.json: expected scores of d2v2ds.evaluate, found rows"),
        ({"scores": {"accuracy": {"value": "much"}}}, "evaluation.json: accuracy"),
        ({"scores": {"accuracy": 3}}, "evaluation.json: accuracy"),
    ],
)
def test_folders_without_results_are_named(
    tmp_path: Path, content: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        evaluated(tmp_path / "a", content)
    assert main([str(tmp_path)]) == 2
    assert said in caplog.text
