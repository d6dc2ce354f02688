"""The driver, with a packer that knows no modality's libraries: what it adds up, lists beside the shards and checks."""

import json
import shutil
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from preprocessing.driver.command import parse_bytes
from preprocessing.driver.progress import MEBIBYTES, Measure, Progress
from preprocessing.driver.shard_plan import cut_shards
from preprocessing.verify import _file_faults
from tests.preprocessing.helpers import contents
from tests.preprocessing.tiny_text import TinyUnit, pack_tiny


def test_totals_counts_skips_and_files_beside_stand_in_the_index(tmp_path: Path) -> None:
    index = pack_tiny(tmp_path / "out", [100, 0, 300, 200] * 5, shard_bytes=500)
    assert len(index.shards) > 3
    assert (index.files, index.files_skipped, index.rows) == (20, 5, 15)
    assert index.totals == {"tokens": 3000, "documents": 30}
    assert [entry.file for entry in index.files_beside] == ["tokenizer.txt"]
    assert (tmp_path / "out" / "skipped.tsv").read_text().splitlines()[1:] == [
        f"{number}\tno tokens" for number in range(1, 20, 4)
    ]


def test_a_changed_file_beside_the_shards_is_a_fault(tmp_path: Path) -> None:
    index = pack_tiny(tmp_path / "out", [10])
    (entry,) = index.files_beside
    assert _file_faults(tmp_path / "out", entry) == []
    (tmp_path / "out" / "tokenizer.txt").write_text("nO tokenizer")
    (fault,) = _file_faults(tmp_path / "out", entry)
    assert fault.startswith(f"tokenizer.txt: crc32: expected {entry.crc32}")


@pytest.mark.distributed
def test_any_packer_writes_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        pack_tiny(tmp_path / f"{workers}", [64, 0, 100] * 9, workers, shard_bytes=400)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_counts_of_finished_shards_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    whole = pack_tiny(tmp_path / "whole", [50] * 12, shard_bytes=300)
    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.driver.packing.write_skipped", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_tiny(tmp_path / "out", [50] * 12, shard_bytes=300)
    (tmp_path / "out" / ".packing" / "text-00001.arrow.json").unlink()
    assert pack_tiny(tmp_path / "out", [50] * 12, shard_bytes=300).totals == whole.totals
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_another_modality_is_refused(tmp_path: Path) -> None:
    pack_tiny(tmp_path / "out", [10])
    values = json.loads((tmp_path / "out" / "index.json").read_text())
    values["modality"] = "image"
    values["format"] = {"shorter_side": None, "quality": None, "alpha_over": []}
    (tmp_path / "out" / "index.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="modality: the folder has 'image', this command 'text'"):
        pack_tiny(tmp_path / "out", [10])
    shutil.rmtree(tmp_path / "out")


def test_units_without_size_are_cut_too() -> None:
    shards = cut_shards([TinyUnit(number, 0) for number in range(3)], 100)
    assert sum(map(len, shards)) == 3


def test_progress_says_amounts_in_its_measure() -> None:
    progress = Progress("packing", 4, 8 << 20, MEBIBYTES)
    progress.add(1, 2 << 20)
    assert progress.line().startswith("packing: 1 of 4 files, 2 of 8 MiB, ")
    hours = Measure(amount=3600, amount_unit="h", amount_decimals=2, speed=1, speed_unit="x real time")
    progress = Progress("packing", 2, 7200, hours)
    progress.add(1, 1800)
    assert progress.line().startswith("packing: 1 of 2 files, 0.50 of 2.00 h, ") and "x real time" in progress.line()


def test_sizes_of_shards_are_parsed() -> None:
    assert [parse_bytes(text) for text in ("10", "64M", "2GiB", "1K")] == [10, 64 << 20, 2 << 30, 1024]
