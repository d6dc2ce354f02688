"""Ranks that assume different things do not start."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.run.agreement import compare
from d2v2ds.run.watchdog import ranges
from tests.ranks import run_distributed
from tests.runs.launching import arguments_of, environment, pack_clips, rank_variables


def _compare(values: list[dict[str, Any]]) -> str:
    from d2v2ds.distributed import comm

    try:
        compare(values[comm.rank()])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_fields_and_ranks_that_differ_are_named_on_all_ranks() -> None:
    same = {"optim.lr": 0.1, "data": [1, 2], "nothing": None}
    assert run_distributed(_compare, 2, [same, dict(same)]) == ["", ""]
    found = run_distributed(_compare, 3, [same, same | {"optim.lr": 0.2}, {"optim.lr": 0.1, "data": [1, 2]}])
    assert len(set(found)) == 1
    assert "optim.lr: 0.1 on rank 0, 2, 0.2 on rank 1" in found[0]
    assert "data:" not in found[0]


def test_many_ranks_are_named_in_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.run
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("optim.clip_norm=3", "optim.clip_norm: "),
        ("run.total_steps=5", "run.total_steps: "),
        ("engine.deepspeed=zero2_bf16", "DeepSpeed settings.zero_optimization.stage: "),
        ("data.shards=OTHER", "data.audio: folder.0.shards: "),
    ],
)
def test_ranks_of_a_run_that_differ_end_before_the_first_step(tmp_path: Path, other: str, expected: str) -> None:
    shards, run_dir = pack_clips(tmp_path / "clips"), tmp_path / "run"
    if "OTHER" in other:
        other = other.replace("OTHER", str(pack_clips(tmp_path / "more", "--min-seconds", "2", "--max-skipped", "1")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "d2v2ds.pretrain", *arguments_of(shards, run_dir), *([other] if rank else [])],
            env=environment() | variables, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )
        for rank, variables in enumerate(rank_variables(2))
    ]  # fmt: skip
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2, said[-3000:]
        assert expected in said
        assert "on rank 0" in said and "on rank 1" in said
    assert not (run_dir / "metrics.jsonl").exists()
    assert list(run_dir.iterdir()) == []
