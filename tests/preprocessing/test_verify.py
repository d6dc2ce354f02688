"""`verify` finds every damage and names shard, expected and found; `inspect` prints totals and draws."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2v2ds.data.schema import ROW_DTYPE
from d2v2ds.errors import ShardError
from preprocessing import inspect
from preprocessing.pack_audio import main as pack
from preprocessing.verify import main, verify


@pytest.fixture(params=["pcm16", "flac"])
def packed(request: pytest.FixtureRequest, recordings: Path, tmp_path: Path) -> Path:
    output = tmp_path / "out"
    options = ["--shard-bytes", "256K", "--workers", "1", "--codec", request.param]
    assert pack(["--input", str(recordings), "--output", str(output), *options]) == 0
    return output


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))


def accept_checksum(folder: Path, number: int) -> None:
    """Let the index agree with a damaged file, so that only the deeper checks can see the damage."""
    from d2v2ds.data.schema import file_crc32

    def change(values: dict) -> None:
        entry = values["shards"][number]
        entry["crc32"] = file_crc32(folder / entry["file"])

    edit_index(folder, change)


def test_a_whole_folder_has_no_faults(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed), "--workers", "1"]) == 0
    assert "24 rows" in capsys.readouterr().out


def test_a_flipped_byte_is_named_with_expected_and_found(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((packed / "index.json").read_text())["shards"][1]["crc32"]
    flip_byte(packed / "audio-00001.arrow", 50_000)
    assert main([str(packed), "--workers", "1"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"audio-00001.arrow: crc32: expected {expected}, found ")


def test_a_flipped_byte_under_a_forged_checksum_is_seen_in_the_audio(packed: Path) -> None:
    flip_byte(packed / "audio-00001.arrow", 50_000)
    accept_checksum(packed, 1)
    faults = verify(packed)
    assert any(re.search(r"audio-00001.arrow row \d+: expected audio of CRC-32 ", fault) for fault in faults)
    assert any(re.search(r"audio-00001.arrow row \d+: (mean and variance|audio): ", fault) for fault in faults)


def test_a_truncated_shard_is_named(packed: Path) -> None:
    path = packed / "audio-00000.arrow"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    faults = verify(packed)
    assert f"audio-00000.arrow: bytes: expected {size}, found {size - 100}" in faults


def test_a_missing_shard_is_named(packed: Path) -> None:
    (packed / "audio-00001.arrow").unlink()
    (fault,) = verify(packed)
    assert fault.startswith("audio-00001.arrow: file: expected ") and fault.endswith("found no such file")


def test_wrong_rows_file_is_named(packed: Path) -> None:
    rows = np.load(packed / "rows.npy")
    assert rows.dtype == ROW_DTYPE
    rows["size"][5] += 1
    np.save(packed / "rows.npy", rows)
    faults = verify(packed)
    assert any(fault.startswith("rows.npy: crc32") for fault in faults)
    assert any(fault.startswith("rows.npy record 5: size") for fault in faults)


def test_wrong_totals_are_named(packed: Path) -> None:
    edit_index(packed, lambda values: values["shards"][0].update(rows=values["shards"][0]["rows"] + 1))
    with pytest.raises(ShardError, match="rows in all shards, found"):
        verify(packed)
    edit_index(packed, lambda values: values.update(rows=values["rows"] + 1))
    assert any("audio-00000.arrow: rows" in fault for fault in verify(packed))
    edit_index(packed, lambda values: values["totals"].update(samples=1))
    assert any("total samples" in fault for fault in verify(packed))


def test_an_unfinished_folder_is_an_error_of_its_own(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed / "index.json").unlink()
    assert main([str(packed)]) == 2
    assert "run the same packing command again" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.distributed
def test_two_workers_find_the_same_faults(packed: Path) -> None:
    flip_byte(packed / "audio-00001.arrow", 50_000)
    assert verify(packed, workers=2) == verify(packed, workers=1)


def test_inspect_prints_totals_and_draws(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(packed), "--plot", str(tmp_path / "report.png")]) == 0
    printed = capsys.readouterr().out
    assert "24 in" in printed and "longest 1.6" in printed
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_column_name_that_is_not_utf8_is_a_fault(packed: Path) -> None:
    path = packed / "audio-00000.arrow"
    data = path.read_bytes()
    assert data.rfind(b"speaker") > 0
    path.write_bytes(data.replace(b"speaker", b"\xffpeaker"))
    assert any("audio-00000.arrow" in fault for fault in verify(packed))
