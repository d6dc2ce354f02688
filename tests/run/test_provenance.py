"""What a run notes of each of its starts."""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from d2v2ds.run import provenance


@pytest.mark.parametrize("given", [["--local_rank=0"], ["--local_rank", "1"], ["--local-rank=3"], []])
def test_the_command_is_one_to_type_again(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers start a file of the package, and the deepspeed one adds a rank."""
    typed = ["--config", "audio_tiny", "data.shards=a b"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/d2v2ds/pretrain.py", *given, *typed])
    provenance.write(tmp_path, "run: {}\n", {})
    (start,) = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert start["command"] == ["python", "-m", "d2v2ds.pretrain", *typed]


def test_a_start_has_its_time_and_number_of_ranks(tmp_path: Path) -> None:
    for _ in range(2):
        provenance.write(tmp_path, "run: {}\n", {})
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert provenance.count_starts(tmp_path) == len(starts) == 2
    for start in starts:
        assert start["world_size"] == 1
        time = datetime.fromisoformat(start["time"])
        assert time.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
