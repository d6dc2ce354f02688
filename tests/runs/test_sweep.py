"""A whole sweep of two tiny cells, as a user starts it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.sweeps.helpers import pack_classes, write_sweep
from tests.runs.launching import ROOT, environment

pytestmark = pytest.mark.run

SMALL = [
    "engine.deepspeed=zero0_fp32_debug",
    "model.block.width=32",
    "model.shared_depth=2",
    "objective.modalities.image.decoder.width=16",
    "objective.modalities.image.target.num_layers=2",
    "data.image.global_batch_images=4",
    "data.image.micro_batch_images=4",
    "data.num_workers=0",
]


def sweep(file: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "d2v2ds.sweep", str(file)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def test_sweep_trains_scores_and_draws_and_its_second_start_has_nothing_to_do(tmp_path: Path) -> None:
    shards = pack_classes(tmp_path)
    probe = {"shards": str(shards), "test_shards": str(shards), "points": 2}
    file = write_sweep(
        tmp_path,
        shards,
        overrides=[f"data.shards={shards}", *SMALL],
        seeds=[1],
        budget={"samples": 16},
        launch={"threads": 1},
        score={"probe": probe},
        reach=[101.0],
    )
    said = sweep(file)
    folder = tmp_path / "sweep"
    assert "1/2 masks_1-seed_1: training, 4 steps" in said and "2/2 masks_4-seed_1: done in" in said
    with (folder / "sweep.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(row["masks"], row["steps"], row["samples"]) for row in rows] == [
        (masks, str(steps), str(4 * steps)) for masks in "14" for steps in (0, 2, 4)
    ]
    assert all(float(row["memory_gib"]) > 0 and float(row["low"]) <= float(row["score"]) for row in rows if row["low"])
    assert 0 < float(rows[1]["seconds"]) < float(rows[2]["seconds"])
    assert "reached by 0 of 1 seeds" in said
    cell = folder / "cells" / "masks_4-seed_1"
    assert [path.name for path in (cell / "checkpoints").glob("step*")] == ["step00000004"], "others are removed"
    assert json.loads((cell / "done.json").read_text())["steps"] == 4
    assert {path.name for path in folder.glob("*.png")} == {"time_probe_logistic.png", "switches_probe_logistic.png"}
    starts = (cell / "starts.jsonl").read_text()
    assert "2 cells, 2 of them done" in sweep(file)
    assert (cell / "starts.jsonl").read_text() == starts
