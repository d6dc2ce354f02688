"""Shipped sweeps: each resolves, names its origin, and checks every cell's configuration."""

from pathlib import Path

import pytest

from d2v2ds.config.load import read_config
from d2v2ds.errors import ConfigError
from d2v2ds.run.sweeps.cells import expand, total_steps
from d2v2ds.run.sweeps.settings import SWEEP_FOLDER, load_sweep

NAMES = sorted(path.stem for path in SWEEP_FOLDER.glob("*.yaml"))
GIVEN = ("data.shards=/train", "score.probe.shards=/labelled", "score.probe.test_shards=/valid")


def test_the_sweeps_of_the_papers_are_there() -> None:
    assert NAMES == [
        "block_length", "ema_schedule", "num_masks", "num_target_layers", "speed_against_accuracy_audio",
        "speed_against_accuracy_image", "speed_against_accuracy_text", "target_layer", "target_norm",
        "teacher_front_end",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_a_shipped_sweep_resolves(name: str) -> None:
    sweep = load_sweep(name, GIVEN)
    assert "arXiv" in sweep.origin and sweep.title and sweep.dir == Path("runs/sweeps") / name
    cells = expand(sweep)
    assert sweep.seeds == (1, 2, 3) and len(cells) >= 6
    for cell in cells:
        if cell.seed == 1:
            _, problems = read_config(cell.config, cell.overrides(sweep, total_steps(cell, sweep) or 1000))
            assert problems == [], cell.name


@pytest.mark.parametrize("name", NAMES)
def test_cells_of_one_seed_differ(name: str) -> None:
    sweep = load_sweep(name, GIVEN)
    cells = [cell for cell in expand(sweep) if cell.seed == 1]
    found = {(cell.config, *cell.settings) for cell in cells}
    assert len(found) == len(cells)


@pytest.mark.parametrize("name", NAMES)
def test_folders_that_a_user_gives_are_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"score\.probe\.shards: required, give score\.probe\.shards=FOLDER"):
        load_sweep(name)


@pytest.mark.parametrize("name", NAMES)
def test_each_file_says_how_the_full_one_differs(name: str) -> None:
    text = (SWEEP_FOLDER / f"{name}.yaml").read_text()
    assert f"python -m d2v2ds.sweep {name} " in text and "The full one:" in text
