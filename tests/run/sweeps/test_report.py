"""Tables and pictures of a sweep from what its cells have left."""

import csv
import json
import sys
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.run.sweeps.cells import Cell, expand, settings_of
from d2v2ds.run.sweeps.report import last_rows, reach_table, report
from d2v2ds.run.sweeps.scores import Row, passed_by_step, rows_of
from d2v2ds.run.sweeps.settings import Sweep
from tests.run.sweeps.helpers import pack_classes, pretend, sweep_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def swept(tmp_path: Path, shards: Path) -> tuple[Sweep, list[Cell]]:
    """masks 1 takes 2 s for 20 steps, masks 4 twice as long and has better scores; the last cell is not there."""
    sweep = sweep_of(tmp_path, shards, reach=[20.0, 30.0, 5.0], title="Masks")
    cells = expand(sweep)
    pretend(cells[0], sweep, {0: 10.0, 10: 20.0, 20: 30.0})
    pretend(cells[1], sweep, {0: 10.0, 10: 30.0, 20: 40.0}, step_ms=200.0, memory=2.0)
    pretend(cells[2], sweep, {0: 10.0, 10: 15.0, 20: 25.0})
    return sweep, cells


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_a_row_for_each_score(swept: tuple[Sweep, list[Cell]], caplog: pytest.LogCaptureFixture) -> None:
    sweep, cells = swept
    with caplog.at_level("INFO", logger="d2v2ds"):
        report(sweep, cells)
    rows = lines_of(sweep.dir / "sweep.csv")
    assert len(rows) == 9
    assert rows[5] == {
        "cell": "masks_4-seed_1", "masks": "4", "seed": "1", "measure": "probe/logistic", "steps": "20",
        "samples": "320", "unit": "images", "seconds": "4", "score": "40", "low": "38.04", "high": "41.96",
        "memory_gib": "2",
    }  # fmt: skip
    assert [rows[3][name] for name in ("steps", "seconds", "score", "low", "memory_gib")] == ["0", "0", "10", "", ""]
    assert rows[4]["memory_gib"] == "1", "peak so far"
    lines = [record.message for record in caplog.records]
    assert any(
        line.startswith("masks_1  probe/logistic 27.5 (95 %: -4.3 to 59.3)  2.0 s") and "2 seeds" in line
        for line in lines
    )
    assert any(line.startswith("masks_4  probe/logistic 40.0  4.0 s") and line.endswith("1 seed") for line in lines)
    for name in ("time_probe_logistic.png", "switches_probe_logistic.png"):
        assert (sweep.dir / name).stat().st_size > 10_000


def test_times_to_scores_are_compared_seed_by_seed(swept: tuple[Sweep, list[Cell]]) -> None:
    sweep, cells = swept
    report(sweep, cells)
    rows = {(row["setting"], row["target"]): row for row in lines_of(sweep.dir / "reach.csv")}
    first = rows["masks_1", "20"]  # seed 1 after 1 s, seed 2 between 1 s and 2 s
    assert (first["seeds"], first["reached"], first["seconds"]) == ("2", "2", "1.25")
    assert (first["ratio"], first["pairs"]) == ("", "0"), "it is the reference"
    second = rows["masks_4", "20"]
    assert (second["reached"], second["seconds"], second["ratio"], second["ratio_low"]) == ("1", "1", "1", "")
    assert (rows["masks_1", "30"]["seeds"], rows["masks_1", "30"]["reached"]) == ("2", "1")
    start = rows["masks_1", "5"]
    assert (start["at_start"], start["reached"], start["seconds"], start["ratio"]) == ("2", "0", "", "")


def test_reference_may_be_chosen(swept: tuple[Sweep, list[Cell]], tmp_path: Path, shards: Path) -> None:
    _, cells = swept
    sweep = sweep_of(tmp_path, shards, reach=[30.0], reference="masks_4")
    rows = [row for cell in cells for row in rows_of(sweep, cell)]
    found = {one.setting: one for one in reach_table(sweep, rows, settings_of(cells))}
    assert found["masks_1"].ratio is not None and found["masks_1"].ratio.mean == pytest.approx(1.0)
    assert found["masks_1"].ratio.count == 1, "2 s over 2 s of the seed that both have"


def test_another_measure_of_the_probe_has_no_interval(tmp_path: Path, shards: Path) -> None:
    probe = {"shards": str(shards), "test_shards": str(shards), "points": 2, "measure": "knn"}
    sweep = sweep_of(tmp_path, shards, score={"probe": probe})
    cell = expand(sweep)[0]
    pretend(cell, sweep, {0: 10.0, 20: 30.0})
    assert [(row.measure, row.score, row.low) for row in rows_of(sweep, cell)] == [
        ("probe/knn", 10.0, None),
        ("probe/knn", 12.5, None),
    ]
    sweep = sweep_of(tmp_path, shards, score={"probe": probe | {"measure": "f1"}})
    with pytest.raises(ConfigError, match=r"score.probe.measure: expected one of logistic, knn, found f1"):
        rows_of(sweep, cell)


def test_score_of_a_fine_tuning_comes_with_its_interval(tmp_path: Path, shards: Path) -> None:
    tuning = {"config": "finetune/image_classify_tiny", "shards": "x", "test_shards": "y", "measure": "scores.accuracy"}
    sweep = sweep_of(tmp_path, shards, score={"finetune": tuning})
    cell = expand(sweep)[0]
    pretend(cell, sweep, {0: 1.0, 20: 2.0})
    assert rows_of(sweep, cell) == []
    folder = cell.folder / "finetune" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(
        json.dumps({"scores": {"accuracy": {"value": 7.0, "interval": [6.0, 8.5]}}})
    )
    (row,) = rows_of(sweep, cell)
    assert (row.measure, row.steps, row.score, row.low, row.high) == ("finetune/scores.accuracy", 20, 7.0, 6.0, 8.5)
    assert not row.is_error
    sweep = sweep_of(tmp_path, shards, score={"finetune": tuning | {"measure": "scores.wer"}})
    with pytest.raises(ConfigError, match=r"has no 'wer', found accuracy"):
        rows_of(sweep, cell)


def test_time_is_that_of_steps_and_survives_a_resume(tmp_path: Path) -> None:
    records = [
        {"step": 1, "perf/step_ms": 500.0, "data/hours": 0.1, "perf/memory_gib": 3.0},
        {"step": 5, "perf/step_ms": 100.0, "data/hours": 0.5, "perf/memory_gib": 1.0},
        {"step": 5, "other": 3.0},
        {"step": 7, "perf/step_ms": 200.0, "data/hours": 0.7, "perf/memory_gib": 1.0},  # after a resume
    ]
    found = passed_by_step(records, "data/hours", 3600.0)
    assert {step: one.seconds for step, one in found.items()} == {1: 0.5, 5: 0.9, 7: pytest.approx(1.3)}
    assert found[7].samples == pytest.approx(2520.0) and found[7].memory_gib == 3.0


def row(setting: str, seed: int, steps: int, score: float, measure: str = "probe/cer") -> Row:
    return Row(
        cell=f"{setting}-seed_{seed}", setting=setting, switches={"setting": setting}, seed=seed, measure=measure,
        steps=steps, samples=steps, unit="seconds", seconds=float(steps), score=score, low=None, high=None,
        memory_gib=0.0,
    )  # fmt: skip


def test_errors_are_reached_from_above(tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, reach=[50.0])
    rows = [row("a", 1, 0, 100.0), row("a", 1, 10, 40.0), row("b", 1, 0, 100.0), row("b", 1, 10, 75.0)]
    found = {one.setting: one for one in reach_table(sweep, rows, ["a", "b"])}
    assert found["a"].seconds is not None and found["a"].seconds.mean == pytest.approx(10 * 50 / 60)
    assert (found["b"].reached, found["b"].ratio) == (0, None)
    assert [(one.cell, one.steps) for one in last_rows(rows)] == [("a-seed_1", 10), ("b-seed_1", 10)]


def test_without_matplotlib_the_table_is_written_and_one_line_says_so(
    swept: tuple[Sweep, list[Cell]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, cells = swept
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("INFO", logger="d2v2ds"):
        report(sweep, cells)
    assert len(lines_of(sweep.dir / "sweep.csv")) == 9 and not list(sweep.dir.glob("*.png"))
    said = [record.message for record in caplog.records if "need matplotlib" in record.message]
    assert len(said) == 1 and "pip install '.[eval]'" in said[0]


def test_sweep_without_scores_has_an_empty_table(tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards)
    sweep.dir.mkdir()
    report(sweep, expand(sweep))
    assert (sweep.dir / "sweep.csv").read_text().startswith("cell,masks,seed,measure,steps,samples,unit,seconds,score")
