"""`AudioShards`: what was packed comes back, lazily, and damage is named."""

import gc
import json
import pickle
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from d2v2ds.data import shards as shards_module
from d2v2ds.data.schema import ROW_DTYPE, FileEntry, Index, ShardEntry, write_index
from d2v2ds.errors import ShardError
from d2v2ds.modalities.audio.shards import AudioShards
from preprocessing.pack_audio import main as pack


@pytest.fixture
def clips(tmp_path: Path) -> dict[str, np.ndarray]:
    """Sixteen clips of 0.5-2 s and their manifest."""
    lines = ["path\ttext\tlabel\tspeaker"]
    samples = {}
    for number in range(16):
        name = f"{number:02d}.flac"
        rng = np.random.default_rng(number)
        samples[name] = (rng.normal(20, 900, 8000 + 1601 * number)).astype(np.int16)
        soundfile.write(tmp_path / name, samples[name], 16000)
        lines.append(f"{name}\t{'words ' * (number % 3)}\t{number % 4}\tspeaker{number % 2}")
    (tmp_path / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return samples


@pytest.fixture(params=["pcm16", "flac"])
def folder(request: pytest.FixtureRequest, clips: dict[str, np.ndarray], tmp_path: Path) -> Path:
    output = tmp_path / "out"
    options = ["--workers", "1", "--shard-bytes", "128K", "--codec", request.param]
    assert pack(["--input", str(tmp_path / "manifest.tsv"), "--output", str(output), *options]) == 0
    return output


def test_rows_come_back_as_they_were_packed(folder: Path, clips: dict[str, np.ndarray]) -> None:
    shards = AudioShards(folder)
    assert len(shards) == 16 and shards.sample_rate_hz == 16000 and len(shards.index.shards) > 1
    np.testing.assert_array_equal(shards.sizes, [len(samples) for samples in clips.values()])
    for number, (name, samples) in enumerate(clips.items()):
        row = shards[number]
        assert (row.index, row.id, row.label, row.speaker) == (number, name, str(number % 4), f"speaker{number % 2}")
        assert row.text == ("words " * (number % 3) or None)
        assert row.samples.dtype == np.int16
        np.testing.assert_array_equal(row.samples, samples)
        assert row.mean == pytest.approx((samples / 32768).mean(), rel=1e-12)
        assert row.var == pytest.approx((samples / 32768).var(), rel=1e-12)
        assert shards.read_stats(number) == (row.mean, row.var)


def test_crops_equal_slices_of_the_whole(folder: Path, clips: dict[str, np.ndarray]) -> None:
    shards = AudioShards(folder)
    for number, samples in enumerate(clips.values()):
        for start, stop in ((0, 10), (1, len(samples)), (4097, 7999), (len(samples), len(samples))):
            np.testing.assert_array_equal(shards.read_audio(number, start, stop), samples[start:stop])
    with pytest.raises(ValueError, match="samples 0 to 99999999"):
        shards.read_audio(0, 0, 99999999)
    with pytest.raises(IndexError):
        shards[16]


def test_pcm16_samples_are_views_of_the_mapped_file(folder: Path) -> None:
    shards = AudioShards(folder)
    if shards.index.format["codec"] != "pcm16":
        pytest.skip("flac rows are decoded")
    samples = shards[3].samples
    allocated = pa.total_allocated_bytes()
    assert not samples.flags.owndata and not samples.flags.writeable
    assert allocated == 0 or allocated < samples.nbytes


def test_rows_outlive_the_reader_and_its_open_shards(folder: Path, clips: dict[str, np.ndarray], monkeypatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 1)
    shards = AudioShards(folder)
    rows = [shards[number] for number in (0, 15, 7, 0)]
    assert len(shards._open) == 1
    del shards
    gc.collect()
    expected = list(clips.values())
    for row in rows:
        np.testing.assert_array_equal(row.samples, expected[row.index])


def test_no_shard_is_opened_before_it_is_needed(folder: Path) -> None:
    for path in folder.glob("*.arrow"):
        path.unlink()
    shards = AudioShards(folder)
    assert shards.sizes.sum() == shards.index.totals["samples"]
    with pytest.raises(ShardError, match=r"audio-00000\.arrow: expected \d+ bytes, found: No such file"):
        shards[0]


def _first_row(shards: AudioShards) -> int:
    return int(shards[0].samples.astype(np.int64).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_work_in_child_processes(folder: Path, method: str) -> None:
    shards = AudioShards(folder)
    expected = _first_row(shards)
    with get_context(method).Pool(1) as pool:
        assert pool.apply(_first_row, (shards,)) == expected
    assert len(pickle.dumps(shards)) < 10_000


def test_a_hundred_million_rows_open_without_being_read(tmp_path: Path) -> None:
    count = 100_000_000
    with (tmp_path / "rows.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(ROW_DTYPE), "fortran_order": False, "shape": (count,)}
        )
        size = file.tell() + count * ROW_DTYPE.itemsize
        file.truncate(size)  # a hole: reading it whole would need 1.6 GB
    write_index(
        tmp_path,
        Index(
            modality="audio", format={"sample_rate_hz": 16000, "codec": "pcm16"}, settings={}, files=0,
            files_skipped=0, plan_sha256="", rows=count, totals={"samples": 0, "hours": 0.0},
            shards=(ShardEntry(file="audio-00000.arrow", rows=count, size=0, bytes=0, crc32="00000000"),),
            rows_file=FileEntry(file="rows.npy", bytes=size, crc32=""),
        ),
    )  # fmt: skip
    before = _resident_bytes()
    shards = AudioShards(tmp_path)
    assert len(shards) == count
    assert isinstance(shards.sizes, np.memmap) and isinstance(shards.records, np.memmap)
    assert shards.sizes[[0, count // 2, count - 1]].tolist() == [0, 0, 0]
    assert _resident_bytes() - before < 50_000_000


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def change_index(folder: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))


def test_a_folder_without_an_index_is_unfinished(folder: Path, tmp_path: Path) -> None:
    (folder / "index.json").unlink()
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(ShardError, match=r"found no index\.json"):
            AudioShards(path)


def test_another_schema_version_is_refused(folder: Path) -> None:
    change_index(folder, lambda values: values.update(schema_version=99))
    with pytest.raises(ShardError, match=r"schema_version is 99.*reads 1"):
        AudioShards(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 1}'])
def test_a_damaged_index_is_named(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json"):
        AudioShards(folder)


def test_a_shard_of_another_size_is_named_with_expected_and_found(folder: Path) -> None:
    path = folder / "audio-00001.arrow"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    shards = AudioShards(folder)
    shards[0]
    with pytest.raises(ShardError, match=rf"audio-00001\.arrow: expected {size} bytes, found {size - 1}"):
        shards[15 if len(shards.index.shards) == 2 else int(np.flatnonzero(shards.records["shard"] == 1)[0])]


def test_a_shard_with_broken_structure_is_named(folder: Path) -> None:
    path = folder / "audio-00000.arrow"
    data = bytearray(path.read_bytes())
    data[-200:] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"audio-00000\.arrow: expected an Arrow IPC file"):
        AudioShards(folder)[0]


def test_a_shard_of_another_codec_or_rate_is_named(folder: Path) -> None:
    change_index(folder, lambda values: values["format"].update(sample_rate_hz=8000))
    with pytest.raises(ShardError, match=r"audio-00000\.arrow: .*sample_rate_hz: '8000'.*belongs to another folder"):
        AudioShards(folder)[0]


def test_a_truncated_rows_file_is_named(folder: Path) -> None:
    path = folder / "rows.npy"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ShardError, match=r"rows\.npy: expected \d+ bytes"):
        AudioShards(folder)
