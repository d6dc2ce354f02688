"""Cells of a sweep: which there are, the settings of each, and whether they may go on."""

import json
from pathlib import Path

import pytest

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError
from d2v2ds.run.sweeps.cells import (
    IDENTITY,
    check_cells,
    expand,
    score_steps,
    settings_of,
    total_steps,
    word_of,
    write_identity,
)
from d2v2ds.run.sweeps.settings import ProbeScore
from tests.run.sweeps.helpers import pack_classes, sweep_of

NUM_MASKS = "objective.modalities.image.mask.num_masks"
BATCHES = {
    "8": {"overrides": ["data.image.global_batch_images=8"]},
    "16": {"overrides": ["data.image.global_batch_images=16"], "fractions": {"lr.warmup_steps": 0.5}},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_classes(tmp_path_factory.mktemp("classes"))


def test_grid_is_every_combination_all_with_the_first_seed_first(tmp_path: Path, shards: Path) -> None:
    grid = {"masks": {"field": NUM_MASKS, "values": [1, 4]}, "batch": {"choices": BATCHES}}
    sweep = sweep_of(tmp_path, shards, grid=grid)
    cells = expand(sweep)
    assert [cell.name for cell in cells] == [
        f"masks_{masks}-batch_{batch}-seed_{seed}" for seed in (1, 2) for masks in (1, 4) for batch in (8, 16)
    ]
    assert [cell.number for cell in cells] == list(range(8))
    assert settings_of(cells) == [cell.setting for cell in cells[:4]]
    config = load_config(cells[7].config, cells[7].overrides(sweep, 20))
    assert config.objective.modalities["image"].mask.num_masks == 4  # type: ignore[attr-defined]
    assert config.data.modalities["image"].global_batch_images == 16
    assert (config.run.seed, config.run.total_steps, config.run.dir) == (2, 20, cells[7].folder)
    assert config.lr.warmup_steps == 10, "of the choice, not the sweep's tenth"
    assert load_config(cells[0].config, cells[0].overrides(sweep, 20)).lr.warmup_steps == 2
    assert (config.run.save_every_steps, config.run.keep_checkpoints) == (10, 0), "what is probed afterwards stays"


def test_listed_cells_may_have_configurations_of_their_own(tmp_path: Path, shards: Path) -> None:
    listed = {"small": {"config": "image_tiny"}, "base": {"config": "image_base", "overrides": ["lr.peak=1e-4"]}}
    sweep = sweep_of(tmp_path, shards, grid=None, cells=listed, seeds=[5])
    assert [(cell.name, cell.config, cell.switches) for cell in expand(sweep)] == [
        ("small-seed_5", "image_tiny", {"setting": "small"}),
        ("base-seed_5", "image_base", {"setting": "base"}),
    ]


def test_published_lengths_give_way_to_the_budget(tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards, config="image_base", budget={"samples": 51_200})
    cell = expand(sweep)[0]
    assert total_steps(cell, sweep) == 51_200 // load_config("image_base").data.modalities["image"].global_batch
    assert load_config(cell.config, cell.overrides(sweep, 7)).total_steps == 7


def test_faults_of_a_grid_are_named(tmp_path: Path, shards: Path) -> None:
    grid = {
        "a": {"choices": {"x": {"config": "image_tiny"}, "x!": {}}},
        "b": {"choices": {"y": {"config": "image_base"}}},
    }
    with pytest.raises(ConfigError) as caught:
        expand(sweep_of(tmp_path, shards, grid=grid, reference="z"))
    said = str(caught.value)
    assert "a_x-b_y: expected one configuration, found image_tiny and image_base" in said
    assert "reference z: no such cell; there are a_x-b_y, a_x_-b_y" in said
    with pytest.raises(ConfigError, match="a_x-seed_1: 2 cells have this name"):
        expand(sweep_of(tmp_path, shards, grid={"a": {"choices": {"x": {}, "x!": {}}}}))
    with pytest.raises(ConfigError, match=r"expected at most 10,000 cells, found 20,000"):
        expand(sweep_of(tmp_path, shards, seeds=list(range(10_000))))


@pytest.mark.parametrize(
    ("value", "word"),
    [(None, "null"), (True, "true"), (0.5, "0.5"), (1e-5, "1e-05"), (["layer"], "[layer]"), ([], "[]"), ("a", "a")],
)
def test_values_become_words_of_the_command_line(value: object, word: str) -> None:
    assert word_of(value) == word


@pytest.mark.parametrize(
    ("points", "total", "steps"),
    [
        (1, 60, [60]),
        (2, 60, [30, 60]),
        (3, 100, [33, 66, 100]),
        (4, 3, [1, 2, 3]),
        (8, 601, [*range(75, 526, 75), 601]),
    ],
)
def test_scores_are_equally_far_apart_and_the_last_is_at_the_end(points: int, total: int, steps: list[int]) -> None:
    assert score_steps(ProbeScore(shards=Path("x"), points=points), total) == steps


def test_every_cell_is_checked_before_the_first_one_starts(tmp_path: Path, shards: Path) -> None:
    grid = {"layers": {"field": "objective.modalities.image.target.num_layers", "values": [6, 7]}}
    sweep = sweep_of(tmp_path, shards, grid=grid, overrides=[f"data.shards={shards}", "lr.peek=1"])
    with pytest.raises(ConfigError) as caught:
        check_cells(sweep, expand(sweep))
    said = str(caught.value)
    assert "all cells: lr.peek: unknown key; did you mean lr.peak?" in said
    assert "layers_7-seed_1, layers_7-seed_2: objective: modalities.image: target.num_layers is 7" in said


def test_data_and_labels_are_opened(tmp_path: Path, shards: Path) -> None:
    probe = {"probe": {"shards": str(shards), "test_shards": str(shards), "label": "colour"}}
    sweep = sweep_of(tmp_path, shards, overrides=["data.shards=/nowhere"], score=probe)
    with pytest.raises(ConfigError) as caught:
        check_cells(sweep, expand(sweep))
    assert "/nowhere" in str(caught.value) and "no annotation 'colour'" in str(caught.value)


def test_fine_tuning_is_checked_without_the_weights_that_it_waits_for(tmp_path: Path, shards: Path) -> None:
    tuning = {"config": "finetune/image_classify_tiny", "shards": str(shards), "test_shards": str(shards),
              "measure": "scores.accuracy"}  # fmt: skip
    sweep = sweep_of(tmp_path, shards, score={"finetune": tuning})
    check_cells(sweep, expand(sweep))
    sweep = sweep_of(tmp_path, shards, score={"finetune": tuning | {"overrides": ["objective.layer_decay=3"]}})
    with pytest.raises(ConfigError, match="objective.layer_decay"):
        check_cells(sweep, expand(sweep))


def test_a_changed_cell_is_refused_by_name_and_a_moved_sweep_is_not(tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards)
    cells = expand(sweep)
    check_cells(sweep, cells)
    write_identity(sweep, cells[1])
    check_cells(sweep, cells)
    changed = sweep_of(tmp_path, shards, overrides=[*sweep.overrides, "lr.peak=2e-3"])
    with pytest.raises(ConfigError) as caught:
        check_cells(changed, expand(changed), [])
    said = str(caught.value)
    assert f"masks_4-seed_1: {cells[1].folder}: made with other settings (config.lr.peak: 0.001 -> 0.002)" in said
    assert "masks_1" not in said, "a cell that has not begun may change"
    probe = {"probe": {"shards": str(shards), "test_shards": str(shards), "points": 2, "label": "other"}}
    scored = sweep_of(tmp_path, shards, score=probe)
    with pytest.raises(ConfigError, match=r"score.probe.label: None -> 'other'"):
        check_cells(scored, expand(scored), [])
    sweep.dir.rename(tmp_path / "moved")
    moved = sweep_of(tmp_path, shards, dir=str(tmp_path / "moved"), reach=[3.0])
    assert (expand(moved)[1].folder / IDENTITY).exists()
    check_cells(moved, expand(moved), [])


def test_identity_is_written_once(tmp_path: Path, shards: Path) -> None:
    sweep = sweep_of(tmp_path, shards)
    cell = expand(sweep)[0]
    write_identity(sweep, cell)
    found = json.loads((cell.folder / IDENTITY).read_text())
    assert found["switches"] == {"masks": "1"} and "dir" not in found["config"]["run"]
    (cell.folder / IDENTITY).write_text("{}")
    write_identity(sweep, cell)
    assert (cell.folder / IDENTITY).read_text() == "{}"
