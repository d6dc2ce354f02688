"""Settings of a sweep: every fault is reported at once, with its place."""

from pathlib import Path
from typing import Any

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.run.sweeps.settings import load_sweep
from tests.run.sweeps.helpers import sweep_of, write_sweep


def refusal(folder: Path, *words: str, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(str(write_sweep(folder, Path("/data"), **given)), words)
    return str(caught.value)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    said = refusal(
        tmp_path,
        "colour=red",
        "lr.peak",
        "run.seed=4",
        grid={"masks": {"fild": "x", "values": [1]}},
        budget={"steps": 10, "minutes": 2},
        seeds=[1, 1],
        launch={"ranks": 0},
    )
    for part in (
        "grid.masks.fild: unknown key; did you mean grid.masks.field?",
        "grid.masks: expected either field and values, or choices",
        "colour: unknown key",
        "budget: expected one of steps, samples, minutes; found steps, minutes",
        "seeds: expected different seeds, one or more, found [1, 1]",
        "launch.ranks: Input should be greater than or equal to 1, found 0",
        "overrides: run.seed is set by the sweep itself",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": None}, "expected either grid or cells"),
        ({"cells": {"a": {}}}, "expected either grid or cells"),
        ({"score": {}}, "score: expected probe or finetune, found neither"),
        ({"budget": {}}, "found none"),
        ({"score": {"probe": {"shards": "???"}}}, "score.probe.shards: required, give score.probe.shards=FOLDER"),
        ({"score": {"probe": {"shards": "x", "points": 0}}}, "score.probe.points: Input should be greater"),
        ({"overrides": ["probe.audio=x"]}, "overrides: probe.audio is set by the sweep itself"),
        ({"grid": {"a": {"field": "run.total_steps", "values": [1]}}}, "grid.a: run.total_steps is set by the sweep"),
        ({"grid": {"a": {"choices": {"b": {"overrides": ["run.dir=x"]}}}}}, "grid.a.choices.b: run.dir is set"),
        ({"grid": {"a": {"field": "lr.peak", "choices": {"b": {}}}}}, "grid.a: expected either field and values"),
        ({"max_failures": "many"}, "max_failures: Input should be a valid integer"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, **given)


def test_words_of_the_command_line_reach_the_sweep_or_every_run(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, Path("/data"))
    words = ["dir=/a #b", "seeds=[7]", "score.probe.shards=/c 010", "lr.peak=2e-3", "data.shards=/d", "reach=[40, 50]"]
    found = load_sweep(str(path), words)
    assert (str(found.dir), found.seeds, found.reach) == ("/a #b", (7,), (40.0, 50.0))
    assert found.score.probe is not None and str(found.score.probe.shards) == "/c 010"
    assert found.overrides[-2:] == ("lr.peak=2e-3", "data.shards=/d")


def test_unknown_file_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*nothing\.yaml; give a YAML file or one of: block_length, "):
        load_sweep("nothing")


def test_a_good_file_is_taken(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, Path("/data")).score.finetune is None
