"""Whatever a small file, a word or a name holds: a value of the right kind, or one of the project's errors."""

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v2ds.config.words import read_word
from d2v2ds.data.schema import FileEntry, Index, ShardEntry, read_index, write_index
from d2v2ds.distributed.checkpoint.format import COUNTERS, FORMAT_VERSION, Manifest, _checksum
from d2v2ds.errors import CheckpointError, ConfigError, ShardError
from d2v2ds.io import read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
QUICK = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


@QUICK
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_an_error_with_the_name(folder: Path, data: bytes) -> None:
    file = folder / "any.json"
    file.write_bytes(data)
    try:
        value = read.read_json(file, ShardError)
    except ShardError as error:
        assert str(error).startswith(f"{file}: expected")
    else:
        assert isinstance(value, dict)
        assert all(math.isfinite(leaf) for leaf in value.values() if isinstance(leaf, float))


@QUICK
@given(lines=st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), max_size=6))
def test_any_lines_give_objects_alone(folder: Path, lines: list[bytes]) -> None:
    file = folder / "any.jsonl"
    file.write_bytes(b"\n".join(lines))
    found = list(read.json_lines(file, ConfigError))
    assert all(isinstance(record, dict) for record in found)
    assert len(found) <= sum(line.count(b"\n") + 1 for line in lines)


@QUICK
@given(text=st.text(max_size=200))
def test_any_text_is_yaml_or_an_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read.parse_yaml(text, "any.yaml", ConfigError)


@QUICK
@given(name=st.text(max_size=30) | st.sampled_from(["..", ".", "", "/etc/passwd", "../x", "a/../b", "a\0b", "a\\b"]))
def test_an_accepted_name_stays_in_its_folder(folder: Path, name: str) -> None:
    with contextlib.suppress(ShardError):
        read.check_name(name, "index.json", ShardError)
        assert (folder / name).resolve().parent == folder.resolve()


@QUICK
@given(
    word=st.text(max_size=30), field=st.sampled_from(["run.dir", "data.audio.shards", "valid.audio", "init.weights"])
)
def test_a_path_keeps_every_character(field: str, word: str) -> None:
    with contextlib.suppress(ConfigError):
        found = read_word(word, field.split("."))
        is_list = word.startswith("[") or (field == "init.weights" and word in ("", "null"))
        assert is_list or found == word


@QUICK
@given(word=st.text(max_size=30))
@pytest.mark.parametrize(
    "field", ["run.total_steps", "lr.peak", "run.async_checkpoints", "engine.deepspeed", "no.field"]
)
def test_any_word_is_a_value_or_an_error(field: str, word: str) -> None:
    with contextlib.suppress(ConfigError):
        read_word(word, field.split("."))


MANIFEST = Manifest(
    format_version=FORMAT_VERSION, tag="step00000004", stage=3, compute_dtype="torch.float32", world_size=2,
    counters=dict.fromkeys(COUNTERS, 4), parameters={"w": [3, 2]}, teacher_parameters=["w"], num_teacher_updates=4,
    optimizer_keys=["exp_avg"], optimizer_scalars={"step": {"kind": "number", "value": 4}},
    files={"student.rank00000.safetensors": {"bytes": 8, "crc32": 1}}, validation_loss=0.5,
)  # fmt: skip
INDEX = Index(
    modality="audio", format={"codec": "pcm16"}, settings={}, files=3, files_skipped=1, plan_sha256="0" * 64, rows=2,
    totals={"samples": 8, "hours": 0.1}, rows_file=FileEntry(file="rows.npy", bytes=160, crc32="00000000"),
    files_beside=(FileEntry(file="tokenizer.json", bytes=2, crc32="00000000"),),
    shards=(ShardEntry(file="audio-00000.arrow", rows=2, size=8, bytes=99, crc32="00000000"),),
)  # fmt: skip


def changed(content: Any, draw: Any) -> Any:
    """Replace one value somewhere inside, remove it, or add a key."""
    content = copy.deepcopy(content)
    place = content
    while True:
        if isinstance(place, dict) and draw(st.integers(0, 9)) == 0:
            place[draw(st.text(max_size=5))] = draw(JSON)
            return content
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return content
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            if isinstance(place, dict) and draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON)
            return content
        place = place[key]


@QUICK
@given(data=st.data())
def test_a_changed_manifest_is_whole_or_refused(data: st.DataObject) -> None:
    content = changed(json.loads(MANIFEST.to_json()), data.draw)
    content.pop("checksum", None)
    with contextlib.suppress(CheckpointError, ValueError):
        text = json.dumps({"checksum": _checksum(content), **content})
        manifest = Manifest.from_json(text.encode(), "manifest.json")
        assert isinstance(manifest.world_size, int) and isinstance(manifest.counters["global_steps"], int)
        assert all("/" not in name and set(record) == {"bytes", "crc32"} for name, record in manifest.files.items())


@QUICK
@given(data=st.data())
def test_a_changed_index_is_whole_or_refused(folder: Path, data: st.DataObject) -> None:
    packed = folder / "packed"
    packed.mkdir(exist_ok=True)
    write_index(packed, INDEX)
    assert read_index(packed) == INDEX
    content = changed(json.loads((packed / "index.json").read_text()), data.draw)
    (packed / "index.json").write_text(json.dumps(content))
    try:
        index = read_index(packed)
    except ShardError as error:
        assert str(packed) in str(error)
    else:
        assert index.rows == sum(entry.rows for entry in index.shards) and min(index.files, index.rows) >= 0
        assert all("/" not in entry.file for entry in (*index.shards, index.rows_file, *index.files_beside))
