"""A small sweep of images, and cells that look as if they had been run."""

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from d2v2ds.config.load import load_config, to_yaml
from d2v2ds.run.sweeps.cells import Cell
from d2v2ds.run.sweeps.settings import Sweep, load_sweep
from preprocessing.pack_images import main as pack_images
from tests.data.fake_images import photo


def pack_classes(folder: Path) -> Path:
    """Twelve labelled pictures of two classes, packed."""
    for number in range(12):
        path = folder / "raw" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(36, 40, number)).save(path)
    arguments = ["--input", str(folder / "raw"), "--output", str(folder / "packed"), "--workers", "1"]
    assert pack_images(arguments) == 0
    return folder / "packed"


def write_sweep(folder: Path, shards: Path, **given: Any) -> Path:
    """Write a sweep of two numbers of masks with two seeds; `given` replaces whole sections."""
    values = {
        "dir": str(folder / "sweep"),
        "config": "image_tiny",
        "overrides": [f"data.shards={shards}", "engine.deepspeed=zero0_fp32_debug"],
        "fractions": {"lr.warmup_steps": 0.1},
        "grid": {"masks": {"field": "objective.modalities.image.mask.num_masks", "values": [1, 4]}},
        "seeds": [1, 2],
        "budget": {"steps": 20},
        "score": {"probe": {"shards": str(shards), "test_shards": str(shards), "points": 2}},
    } | given
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False)
    )
    return path


def sweep_of(folder: Path, shards: Path, **given: Any) -> Sweep:
    return load_sweep(str(write_sweep(folder, shards, **given)))


def pretend(cell: Cell, sweep: Sweep, scores: dict[int, float], step_ms: float = 100.0, memory: float = 1.0) -> None:
    """Write what the run and the probes of a cell would have left.

    Args:
        cell: of the sweep.
        sweep: gives the settings.
        scores: score by step, that of the random start at 0.
        step_ms: pace of the run.
        memory: of the last record; half of it before.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    config = load_config(cell.config, cell.overrides(sweep, max(scores)))
    (cell.folder / "config.yaml").write_text(to_yaml(config))
    steps = [step for step in scores if step]
    records = [
        {"step": step, "perf/step_ms": step_ms, "data/images": 16.0 * step,
         "perf/memory_gib": memory if step == max(steps) else memory / 2}
        for step in steps
    ]  # fmt: skip
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    probes = [
        {
            "step": step, "kind": "one", "modality": "image", "block": 6, "measure": "logistic", "standard_error": 0.01,
            "student": {"6": {"logistic": scores[step] / 100, "knn": 0.125, "folds": {}}},
            "random_init": {"6": {"logistic": scores[0] / 100, "knn": 0.1, "folds": {}}},
        }
        for step in steps
    ]  # fmt: skip
    (cell.folder / "probes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in probes))
