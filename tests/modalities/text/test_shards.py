"""`TextShards`: what was packed comes back without a copy, and damage is named."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from d2v2ds.data.schema import write_index
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.image.shards import ImageShards
from d2v2ds.modalities.known import open_shards
from d2v2ds.modalities.text.shards import TextShards
from preprocessing import formats
from tests.preprocessing.tiny_text import SPECIAL, pack_tiny, tokens_of

LENGTHS = [512, 17, 512, 400, 1, 512, 333] * 8


@pytest.fixture(params=["uint16", "uint32"])
def text(request: pytest.FixtureRequest, tmp_path: Path) -> TextShards:
    pack_tiny(tmp_path / "text", LENGTHS, dtype=request.param, shard_bytes=8000)
    shards = open_shards(tmp_path / "text")
    assert isinstance(shards, TextShards)
    return shards


def test_tokens_come_back_in_the_smallest_type_and_are_no_copy(text: TextShards) -> None:
    assert len(text) == len(LENGTHS) and len(text.index.shards) > 3
    np.testing.assert_array_equal(text.sizes, LENGTHS)
    for row, length in enumerate(LENGTHS):
        tokens = text.read_tokens(row)
        assert tokens.dtype == text.index.format["token_dtype"] and not tokens.flags.owndata
        np.testing.assert_array_equal(tokens, tokens_of(row, length, 1000))
    assert (text.vocab_size, text.block_tokens, text.special) == (1000, 512, SPECIAL)
    assert text.tokenizer_file.read_text() == "no tokenizer"
    assert (text.read_labels(3).id, text.read_labels(3).label) == (None, None)


def test_blocks_are_rows_in_any_order_padded_to_the_right(text: TextShards) -> None:
    rows = np.random.default_rng(0).permutation(len(text))[:40]
    out = np.full((40, 520), -7)
    text.read_blocks(rows, out, pad_id=1)
    for line, row in enumerate(rows):
        length = LENGTHS[row]
        np.testing.assert_array_equal(out[line, :length], text.read_tokens(int(row)))
        assert (out[line, length:] == 1).all()
    text.read_blocks(rows[:0], out[:0], pad_id=1)


def test_blocks_that_do_not_fit_or_do_not_exist_are_errors(text: TextShards) -> None:
    with pytest.raises(ValueError, match="row 2 has 512 tokens, the batch has room for 500"):
        text.read_blocks(np.array([1, 2]), np.zeros((2, 500), dtype=np.int64), pad_id=1)
    for rows in ([0, len(text)], [-1, 0]):
        with pytest.raises(IndexError):
            text.read_blocks(np.array(rows), np.zeros((2, 512), dtype=np.int64), pad_id=1)


def change_index(folder: Path, change: Callable[[dict], None]) -> None:
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))


def test_rows_file_and_shards_that_disagree_are_named(text: TextShards) -> None:
    rows = np.load(text.folder / "rows.npy")
    rows["size"][1] += 1
    np.save(text.folder / "rows.npy", rows)
    damaged = TextShards(text.folder)
    width = text.index.format["token_dtype"] == "uint16" and 2 or 4
    message = rf"text-00000\.arrow row 1: expected 18 tokens of {width} bytes, found {17 * width} bytes"
    with pytest.raises(ShardError, match=message):
        damaged.read_tokens(1)
    with pytest.raises(ShardError, match=message):
        damaged.read_blocks(np.array([0, 1]), np.zeros((2, 512), dtype=np.int64), pad_id=1)


def test_an_unknown_token_type_or_modality_is_named(text: TextShards) -> None:
    change_index(text.folder, lambda values: values["format"].update(token_dtype="int8"))
    with pytest.raises(ShardError, match="token_dtype is 'int8', expected one of uint16, uint32"):
        open_shards(text.folder)
    change_index(text.folder, lambda values: values.update(modality="smell"))
    for opened_by in (open_shards, formats.open_shards):
        with pytest.raises(ConfigError, match="modality 'smell' is not known here, expected one of audio, image, text"):
            opened_by(text.folder)


def test_a_format_without_what_the_reader_needs_is_named(text: TextShards) -> None:
    change_index(text.folder, lambda values: values["format"].pop("special"))
    with pytest.raises(ShardError, match="expected special in 'format'"):
        open_shards(text.folder)


@pytest.mark.parametrize("reader", [AudioShards, ImageShards])
def test_readers_refuse_other_modalities(text: TextShards, reader: type[AudioShards] | type[ImageShards]) -> None:
    with pytest.raises(ShardError, match=f"expected a folder of {reader.layout.name}, found modality 'text'"):
        reader(text.folder)


def _sum_of(shards: TextShards) -> int:
    return int(shards.read_tokens(5).sum(dtype=np.int64))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_travel_to_child_processes(text: TextShards, method: str) -> None:
    expected = _sum_of(text)
    with get_context(method).Pool(1) as pool:
        assert pool.apply(_sum_of, (text,)) == expected
    assert len(pickle.dumps(text)) < 10_000


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("token_dtype", ["uint16"], "token_dtype is"),
        ("token_dtype", "int64", "token_dtype is 'int64'"),
        ("vocab_size", "1000", "vocab_size is '1000', expected 6 to"),
        ("vocab_size", 10**400, "vocab_size is 1000"),
        ("vocab_size", None, "vocab_size is None"),
        ("block_tokens", 1 << 40, "block_tokens is 1099511627776, expected 3 to"),
        ("block_tokens", -1, "block_tokens is -1"),
        ("special", {"unk": 5000}, "special is"),
        ("special", {"unk": "3"}, "special is"),
        ("special", [0, 1], "special is"),
        ("special", None, "special is None"),
        ("special", {"unk": 3}, "expected ids of bos, eos, pad, unk below 1000"),
    ],
)
def test_values_of_an_index_that_cannot_be_true_are_named(
    tmp_path: Path, name: str, value: object, expected: str
) -> None:
    index = pack_tiny(tmp_path / "text", [5, 6])
    write_index(tmp_path / "text", replace(index, format={**index.format, name: value}))
    with pytest.raises(ShardError, match=expected):
        open_shards(tmp_path / "text")


@pytest.mark.parametrize("name", ["../secret.model", "/etc/passwd", "other.txt", ["tokenizer.txt"], None, ".."])
def test_a_tokenizer_outside_of_the_folder_is_not_taken(tmp_path: Path, name: object) -> None:
    index = pack_tiny(tmp_path / "text", [5, 6])
    write_index(tmp_path / "text", replace(index, format={**index.format, "tokenizer_file": name}))
    with pytest.raises(ShardError, match="expected a tokenizer among its files"):
        open_shards(tmp_path / "text").tokenizer_file  # noqa: B018  (a property that checks)


@pytest.mark.parametrize("totals", [{"tokens": "many"}, {"tokens": -1}, {"tokens": None}, {"bytes": [1]}, {"x": True}])
def test_totals_that_are_no_amounts_are_named(tmp_path: Path, totals: dict[str, object]) -> None:
    index = pack_tiny(tmp_path / "text", [5, 6])
    write_index(tmp_path / "text", replace(index, totals={**index.totals, **totals}))
    with pytest.raises(ShardError, match="expected numbers as 'totals' of its index, found"):
        open_shards(tmp_path / "text")


def test_ids_that_the_tokenizer_lacks_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_tiny(tmp_path / "text", [50, 60])
    shards = open_shards(tmp_path / "text")
    most = max(int(shards.read_tokens(row).max()) for row in (0, 1))
    monkeypatch.setattr(TextShards, "vocab_size", most)
    with pytest.raises(ShardError, match=f"rows .0, 1.: expected ids below {most}, found {most}"):
        shards.read_blocks(np.array([0, 1]), np.zeros((2, 60), dtype=np.int64), pad_id=1)
    with pytest.raises(ShardError, match=rf"arrow row [01]: expected ids below {most}, found {most}"):
        [shards.read_tokens(row) for row in (0, 1)]
