"""Damaged shards: every changed byte is noticed or harmless, and what is gone is an error, never a crash."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from d2v2ds.data.shardfile import RowBatch
from d2v2ds.errors import MachineError, ShardError
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.image.shards import ImageShards
from d2v2ds.modalities.text.shards import TEXT_LAYOUT, TextShards
from preprocessing.driver import writer
from preprocessing.driver.packing import pack
from preprocessing.driver.team.local import LocalTeam
from preprocessing.formats import open_shards
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from tests.preprocessing.pictures import encoded, picture
from tests.preprocessing.tiny_text import TinyPacker, TinySettings

STEP = 11
"""Every so manieth byte of a file is changed: all bits of all fields in turn, in seconds."""
KINDS = ("pcm16", "flac", "image", "text", "documents")


class LabelledPacker(TinyPacker):
    """Rows with texts that are not null."""

    def rows(self, *arguments: Any) -> Any:
        for number, row in enumerate(super().rows(*arguments)):
            row.values = {**row.values, "id": f"däta{number}", "label": None if number == 1 else f"{number}" * number}
            yield row


def pack_folder(kind: str, folder: Path) -> Path:
    """Six small rows in two record batches or more, and a second shard where the packer makes one."""
    inputs, output = folder / "inputs", folder / kind
    inputs.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        if kind in ("pcm16", "flac"):
            samples = rng.normal(20, 900, 150 + 10 * number).astype(np.int16)
            soundfile.write(inputs / f"{number}.wav", samples, 16000)
        elif kind == "image":
            image = picture(30 + number, 24, seed=number)
            (inputs / f"{number}.jpg").write_bytes(encoded(image, "JPEG", quality=50))
    if kind == "image":
        assert pack_images(["--input", str(inputs), "--output", str(output), "--workers", "1"]) == 0
    elif kind in ("pcm16", "flac"):
        lines = [f"{n}.wav\t{'wörds' * n}\t{n % 2 or ''}\tspeaker{n}" for n in range(6)]
        (inputs / "list.tsv").write_text("\n".join(["path\ttext\tlabel\tspeaker", *lines]) + "\n")
        arguments = [
            "--input",
            str(inputs / "list.tsv"),
            "--output",
            str(output),
            "--codec",
            kind,
            "--min-seconds",
            "0",
        ]
        assert pack_audio([*arguments, "--workers", "1"]) == 0
    else:
        settings, team = TinySettings((40, 64, 8, 64, 64, 30)), LocalTeam(1)
        packer = TinyPacker(settings) if kind == "text" else LabelledPacker(settings)
        pack(team, packer.scan(team, []), output, packer)
    return output


def contents(shards: AudioShards | ImageShards | TextShards, row: int) -> tuple[Any, ...]:
    """Everything of a row, by all ways of reading it."""
    labels = shards.read_labels(row)
    if isinstance(shards, AudioShards):
        return labels, shards.read_stats(row), shards.read_audio(row).tobytes(), shards.read_audio(row, 7, 99).tobytes()
    if isinstance(shards, ImageShards):
        image = shards.read_image(row)
        return labels, bytes(image.data), image.orientation, image.width, image.height
    block = np.empty((1, shards.block_tokens), dtype=np.int64)
    shards.read_blocks(np.array([row]), block, pad_id=1)
    return labels, shards.read_tokens(row).tobytes(), block.tobytes()


def outcomes(folder: Path, num_rows: int) -> list[tuple[Any, ...] | None]:
    """What every row says; None where reading it is a `ShardError`."""
    try:
        shards = open_shards(folder)
    except ShardError:
        return [None] * num_rows
    found: list[tuple[Any, ...] | None] = []
    for row in range(num_rows):
        try:
            found.append(contents(shards, row))
        except ShardError:
            found.append(None)
    return found


def flip_bytes(folder: Path, name: str, step: int) -> dict[str, Any]:
    """Change every `step`-th byte of a file, one at a time, and read all rows each time."""
    path = folder / name
    original = path.read_bytes()
    num_rows = open_shards(folder).index.rows
    whole = outcomes(folder, num_rows)
    assert None not in whole
    noticed, silent = 0, []
    places = range(0, len(original), step)
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << (place // step) % 8
        path.write_bytes(damaged)
        found = outcomes(folder, num_rows)
        noticed += None in found
        if any(one is not None and one != expected for one, expected in zip(found, whole, strict=True)):
            silent.append(place)
    path.write_bytes(original)
    return {"tried": len(places), "noticed": noticed, "silent": silent}


def main() -> None:
    """In a program of its own, which a crash of Arrow would end alone: the parent sees its exit code."""
    folder, step, *names = sys.argv[1:]
    sys.stdout.write(json.dumps({name: flip_bytes(Path(folder), name, int(step)) for name in names}))


@pytest.mark.run
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_noticed_or_harmless(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_BYTES", 4000 if kind == "image" else 700)
    folder = pack_folder(kind, tmp_path)
    names = [open_shards(folder).index.shards[0].file, "rows.npy"]
    command = [sys.executable, "-m", "tests.data.test_damage", str(folder), str(STEP), *names]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-2000:]}"
    for name, found in json.loads(result.stdout).items():
        assert found["silent"] == [], f"{name}: bytes that change rows in silence"
        assert found["noticed"] > 0.3 * found["tried"]


# ---- files that change while they are mapped ----


def shard_of(folder: Path, row: int) -> Path:
    shards = open_shards(folder)
    return folder / shards.index.shards[int(shards.records["shard"][row])].file


def test_a_file_cut_off_while_mapped_is_an_error_and_is_read_again_once_it_is_whole(tmp_path: Path) -> None:
    """In a program of its own: a read behind the end of a mapped file kills the process."""
    folder = pack_folder("pcm16", tmp_path)
    program = """
import os, sys
from pathlib import Path
from d2v2ds.errors import MachineError, ShardError
from d2v2ds.modalities.audio.shards import AudioShards

folder = Path(sys.argv[1])
shards, path = AudioShards(folder), folder / "audio-00000.arrow"
before, data = [shards.read_audio(row).tobytes() for row in range(6)], path.read_bytes()
os.truncate(path, 64)
for row in range(6):
    for read in (shards.read_audio, shards.read_stats, shards.read_labels):
        try:
            read(row)
        except ShardError as error:
            assert f"audio-00000.arrow: expected {len(data)} bytes, found 64" in str(error), error
        else:
            raise AssertionError(row)
path.write_bytes(data)
assert [shards.read_audio(row).tobytes() for row in range(6)] == before
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr[-2000:]


def test_a_file_deleted_while_mapped_is_read_to_the_end(tmp_path: Path) -> None:
    folder = pack_folder("pcm16", tmp_path)
    shards = open_shards(folder)
    before = [contents(shards, row) for row in range(6)]
    shard_of(folder, 0).unlink()
    assert [contents(shards, row) for row in range(6)] == before
    with pytest.raises(ShardError, match=r"audio-00000\.arrow: expected \d+ bytes, found: No such file"):
        contents(open_shards(folder), 0)


def test_two_rows_that_changed_places_are_noticed(tmp_path: Path) -> None:
    """Each has its own right checksums: only the place tells."""
    folder = pack_folder("text", tmp_path)
    rows = np.load(folder / "rows.npy")
    rows["row"][[1, 3]] = 3, 1  # both of 64 tokens
    np.save(folder / "rows.npy", rows)
    with pytest.raises(ShardError, match=r"rows\.npy: row 1 cannot be row 3 of shard 0"):
        open_shards(folder).read_labels(1)
    with pytest.raises(ShardError, match=r"text-00000\.arrow row 1: expected columns of CRC-32"):
        batch, row = _swapped(folder)
        batch.numbers(row)


def _swapped(folder: Path) -> tuple[RowBatch, int]:
    """Row 3 of a shard as if a damaged footer had put it into the place of row 1."""
    reader = pa.ipc.open_file(str(folder / "text-00000.arrow"))
    batch = pa.Table.from_batches([reader.get_batch(n) for n in range(reader.num_record_batches)]).combine_chunks()
    rows = batch.take([0, 3, 2, 1, 4, 5]).to_batches()[0]
    return RowBatch(rows, TEXT_LAYOUT, 0, 0, "text-00000.arrow"), 1


@pytest.mark.parametrize("bounds", [(-8, 10), (20, 10), (0, 1 << 40)])
def test_offsets_outside_of_the_batch_are_named(bounds: tuple[int, int], tmp_path: Path) -> None:
    batch, _ = _swapped(pack_folder("text", tmp_path))
    batch._offsets = np.array(bounds)
    with pytest.raises(ShardError, match=f"row 0: expected a place inside .* found bytes {bounds[0]} to {bounds[1]}"):
        batch.payload(0)


class Failing:
    """Raises an error of the system in the place of a function, the first `times` times, then calls it."""

    def __init__(self, real: Callable[..., Any], code: int, times: int = 99) -> None:
        self.real, self.code, self.left = real, code, times

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **named)


def patch(monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int = 99) -> None:
    """Let a function that opens shards fail."""
    monkeypatch.setattr("d2v2ds.io.machine_faults.time.sleep", lambda seconds: None)
    holder, attribute = {"stat": (os, "stat"), "map": (pa, "memory_map"), "rows": (np, "memmap")}[name]
    failing = Failing(getattr(holder, attribute), code, times)
    if name == "stat":
        monkeypatch.setattr(Path, "stat", lambda path, **named: failing(path, **named))
    else:
        monkeypatch.setattr(holder, attribute, failing)


@pytest.mark.parametrize("name", ["stat", "map"])
def test_an_error_of_the_file_names_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(pack_folder("text", tmp_path))
    patch(monkeypatch, name, errno.EACCES)
    with pytest.raises(ShardError, match=r"text-00000\.arrow: .*Permission denied"):
        contents(shards, 0)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENODEV])
@pytest.mark.parametrize("name", ["stat", "map", "rows"])
def test_an_error_of_the_machine_is_no_damaged_row(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack_folder("text", tmp_path)
    shards = open_shards(folder)
    patch(monkeypatch, name, code)
    with pytest.raises(MachineError, match=rf"(text-00000\.arrow|rows\.npy): cannot be read: {os.strerror(code)}"):
        open_shards(folder) if name == "rows" else contents(shards, 0)
    assert not issubclass(MachineError, ShardError) and MachineError.exit_code == 8


@pytest.mark.parametrize("name", ["stat", "map", "rows"])
def test_an_error_that_passes_is_tried_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_folder("text", tmp_path)
    expected = contents(open_shards(folder), 0)
    patch(monkeypatch, name, errno.ESTALE, times=2)
    assert contents(open_shards(folder), 0) == expected


def test_shards_are_closed_where_a_process_may_open_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(pack_folder("image", tmp_path))
    expected = [contents(shards, row) for row in range(len(shards))]
    shards = open_shards(tmp_path / "image")
    contents(shards, 0)
    shards._open[99] = shards._open.pop(0)  # another shard, in place of many
    patch(monkeypatch, "map", errno.EMFILE, times=1)
    assert [contents(shards, row) for row in range(len(shards))] == expected and 99 not in shards._open


def test_a_fifo_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    folder = pack_folder("text", tmp_path)
    shards = open_shards(folder)
    (folder / "text-00000.arrow").unlink()
    os.mkfifo(folder / "text-00000.arrow")
    with pytest.raises(ShardError, match=r"text-00000\.arrow: expected a file, found a FIFO"):
        contents(shards, 0)


if __name__ == "__main__":
    main()


def test_a_folder_that_vanishes_is_no_damage_of_its_rows(tmp_path: Path) -> None:
    """One shard that is gone from a folder is."""
    folder = pack_folder("pcm16", tmp_path)
    shards = AudioShards(folder)
    folder.rename(tmp_path / "moved")
    with pytest.raises(MachineError, match=f"{folder}: the folder was moved, removed or unmounted"):
        shards.locate(0)
    (tmp_path / "moved").rename(folder)
    shards.locate(0)
    (folder / shards.index.shards[0].file).unlink()
    with pytest.raises(ShardError):
        AudioShards(folder).locate(0)
