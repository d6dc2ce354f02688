"""Pairs of sentences from packer to batch: special ids, labels, rows that are left out, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v2ds.data.order import MicroBatch
from d2v2ds.data.schema import read_index
from d2v2ds.errors import ShardError
from d2v2ds.modalities.known import open_reader
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.reader import TextDataConfig
from d2v2ds.modalities.text.shards import TextShards
from d2v2ds.modalities.text.tokenizers import SentencePieceTokenizer
from preprocessing.text.documents import DocumentOptions
from preprocessing.text.report import headline
from preprocessing.text.shard_plan import TextSettings, make_plan, sample_texts
from preprocessing.verify import verify
from tests.preprocessing.helpers import contents
from tests.preprocessing.test_pack_text import index_of, pack, rows_of
from tests.preprocessing.texts import sentencepiece_model, story

PAIRS = [(story(seed, 4), story(seed + 50, 6), "entailed" if seed % 3 else "not") for seed in range(12)]
OPTIONS = ("--pair-columns", "premise", "claim")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "given.model").write_bytes(sentencepiece_model())
    return tmp_path / "given.model"


def line(text: str) -> str:
    return " ".join(text.split())


def write_tsv(path: Path, rows: list[tuple[str, str, str]] = PAIRS) -> Path:
    lines = [f"{number}\t{line(b)}\t{label}\t{line(a)}" for number, (a, b, label) in enumerate(rows)]
    path.write_text("\n".join(["index\tclaim\tlabel\tpremise", *lines]) + "\n", encoding="utf-8")
    return path


def write_json(path: Path, rows: list[tuple[Any, Any, Any]] = PAIRS) -> Path:
    lines = [json.dumps({"premise": a, "claim": b, "label": label}) for a, b, label in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def expected(rows: list[tuple[str, str, str]], flat: bool) -> list[list[int]]:
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    return [
        [0, *tokenizer.encode([line(a) if flat else a])[0], 2, 2, *tokenizer.encode([line(b) if flat else b])[0], 2]
        for a, b, _ in rows
    ]


@pytest.mark.parametrize(("write", "name"), [(write_tsv, "a.tsv"), (write_json, "a.jsonl")])
def test_a_row_is_both_sentences_with_their_label(write: Any, name: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(write(tmp_path / name), out, "--tokenizer", model, *OPTIONS, "--block-tokens", "128") == 0
    rows = rows_of(out)
    assert [row["tokens"] for row in rows] == expected(PAIRS, flat=name == "a.tsv")
    assert [row["label"] for row in rows] == [label for *_, label in PAIRS]
    first = 2 if name == "a.tsv" else 1
    assert [row["id"] for row in rows] == [f"{name}#{number + first}" for number in range(12)]
    assert index_of(out)["format"]["sentences"] == 2 and index_of(out)["notes"] == {}
    assert verify(out) == [] and "pairs of up to 128" in headline(read_index(out))


def test_single_sentences_have_one_pair_of_specials(model: Path, tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "a.tsv")
    options = ("--tokenizer", model, "--one-row-per-document", "--text-field", "claim", "--block-tokens", "128")
    assert pack(source, tmp_path / "out", *options) == 0
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    wanted = [[0, *tokenizer.encode([line(b)])[0], 2] for _, b, _ in PAIRS]
    assert [row["tokens"] for row in rows_of(tmp_path / "out")] == wanted
    assert "sentences" not in index_of(tmp_path / "out")["format"]
    assert "pair_field" not in index_of(tmp_path / "out")["settings"], "folders without pairs stay as they were"


def test_pairs_that_are_too_long_or_empty_are_left_out_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*PAIRS, ("", "alone", "not"), ("alone", "  ", "not"), (story(7, 90), "short", "not")]
    source, out = write_tsv(tmp_path / "a.tsv", rows), tmp_path / "out"
    options = ("--tokenizer", model, *OPTIONS, "--block-tokens", "128")
    assert pack(source, out, *options) == 3, "more than one in a hundred"
    assert "pairs with an empty sentence 13.33%" in capsys.readouterr().err
    assert pack(source, tmp_path / "more", *options, "--max-noted", "0.2") == 0
    assert [row["tokens"] for row in rows_of(tmp_path / "more")] == expected(PAIRS, flat=True)
    index = index_of(tmp_path / "more")
    assert index["totals"]["documents"] == 12
    assert {kind: round(15 * note["lost"]) for kind, note in index["notes"].items()} == {
        "pairs with an empty sentence": 2,
        "pairs longer than a row": 1,
    }
    exact = max(map(len, expected(PAIRS, flat=True)))
    assert pack(write_tsv(tmp_path / "b.tsv"), tmp_path / "exact", *options, "--block-tokens", exact) == 0
    assert len(rows_of(tmp_path / "exact")) == 12, "the longest fits exactly"


def test_null_sentences_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    rows = [(None, "b", 1), *PAIRS, ("a", None, 1)]
    source = write_json(tmp_path / "a.jsonl", rows)
    options = ("--tokenizer", model, *OPTIONS, "--block-tokens", "128", "--max-noted", "0.2")
    assert pack(source, tmp_path / "out", *options) == 0
    assert len(rows_of(tmp_path / "out")) == 12
    assert index_of(tmp_path / "out")["notes"]["null texts"]["lost"] == pytest.approx(2 / 14)
    source.write_text("\n" + source.read_text())  # a blank line: decoded one by one
    assert pack(source, tmp_path / "slow", *options) == 0
    assert [row["tokens"] for row in rows_of(tmp_path / "slow")] == expected(PAIRS, flat=False)


def test_numbers_of_json_are_labels(model: Path, tmp_path: Path) -> None:
    source = write_json(tmp_path / "a.jsonl", [(a, b, number / 5) for number, (a, b, _) in enumerate(PAIRS)])
    assert pack(source, tmp_path / "out", "--tokenizer", model, *OPTIONS, "--block-tokens", "128") == 0
    assert [row["label"] for row in rows_of(tmp_path / "out")[:3]] == ["0.0", "0.2", "0.4"]


def test_quotes_are_characters_and_fields_that_look_quoted_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [('"the sea"', 'an "old" ship', "x"), ('"the ""old"" sea"', '" and the ship', "x")]
    source = write_tsv(tmp_path / "a.tsv", rows)
    assert pack(source, tmp_path / "out", "--tokenizer", model, *OPTIONS, "--block-tokens", "128") == 0
    assert [row["tokens"] for row in rows_of(tmp_path / "out")] == expected(rows, flat=True)
    assert index_of(tmp_path / "out")["notes"] == {"quoted fields": {"files": 1, "lost": 0.0}}
    assert "1 fields" in (tmp_path / "out" / "notes.tsv").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("premise\tlabel\na\tx\n", "a.tsv line 1: expected tab-separated column names with 'claim', found"),
        ("premise\tclaim\na\tb\n", "expected tab-separated column names with 'label', found"),
        ("premise\tclaim\tlabel\na\tb\tx\na\tx\n", "a.tsv line 3: expected 3 tab-separated fields, found 2"),
        (
            'premise\tclaim\tlabel\n"a\tb"\tc\tx\n',
            "expected 3 tab-separated fields, found 4; quotes do not protect tabs or line ends here",
        ),
    ],
)
def test_bad_tables_are_named(
    text: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tsv").write_text(text)
    assert pack(tmp_path / "a.tsv", tmp_path / "out", "--tokenizer", model, *OPTIONS) == 2
    printed = capsys.readouterr().err
    assert said in printed
    if "line 1" in said:
        assert "name the columns by --pair-columns" in printed


def test_a_json_line_without_the_second_sentence_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"premise": "a", "claim": "b"}\n{"premise": "a"}\n')
    assert pack(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", model, *OPTIONS) == 2
    assert "line 2: expected text in field 'claim', found the fields ['premise']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pair-columns", "claim", "claim"), "--pair-columns: expected two columns, found 'claim' twice"),
        ((*OPTIONS, "--block-tokens", "5"), "expected at least 6: four special ids and two tokens"),
        ((*OPTIONS, "--input", "{stories}"), "expected JSON lines or TSV files, found plain text: a.txt"),
    ],
)
def test_settings_of_pairs_are_checked(
    options: tuple[str, ...], said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.txt").write_text("one text")
    options = tuple(word.format(stories=tmp_path / "stories") for word in options)
    assert pack(write_tsv(tmp_path / "a.tsv"), tmp_path / "out", "--tokenizer", model, *options) == 2
    assert said in capsys.readouterr().err


def test_two_names_of_the_text_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        pack(write_tsv(tmp_path / "a.tsv"), tmp_path / "out", "--tokenizer", model, *OPTIONS, "--text-field", "claim")


def test_a_tokenizer_is_trained_on_both_sentences(tmp_path: Path) -> None:
    documents = DocumentOptions(text_field="premise", pair_field="claim", label_field="label")
    settings = TextSettings(documents=documents, vocab_size=420, one_row_per_document=True)
    spans = [span for shard in make_plan([write_tsv(tmp_path / "a.tsv")], settings).shards for span in shard]
    assert sorted(sample_texts(spans, settings)) == sorted(line(text) for a, b, _ in PAIRS for text in (a, b))


def test_pretraining_reads_pairs_as_rows_of_tokens(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(write_tsv(tmp_path / "a.tsv"), out, "--tokenizer", model, *OPTIONS, "--block-tokens", "128") == 0
    data = TextDataConfig(shards=out, global_batch_tokens=512, micro_batch_tokens=512)
    reader = open_reader("text", data, TextNetwork(vocab_size=420, prenet_depth=0), None)
    assert reader.faults() == []
    wanted = expected(PAIRS, flat=True)
    read = reader.read(MicroBatch(0, np.array([3, 5]), max(len(wanted[3]), len(wanted[5]))), 0)
    assert [row[row != 1].tolist() for row in read.source] == [wanted[3], wanted[5]]


def test_an_index_with_another_number_of_sentences_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(write_tsv(tmp_path / "a.tsv"), out, "--tokenizer", model, *OPTIONS, "--block-tokens", "128") == 0
    index = index_of(out)
    index["format"]["sentences"] = 3
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="sentences is 3, expected 2, or no such entry"):
        TextShards(out)


def test_bytes_do_not_depend_on_the_number_of_workers(model: Path, tmp_path: Path) -> None:
    source = [str(write_tsv(tmp_path / f"{name}.tsv")) for name in "abcd"]
    options = ("--tokenizer", model, *OPTIONS, "--block-tokens", "128", "--shard-bytes", "900", "--input", *source)
    for workers in ("1", "2"):
        assert pack(Path(source[0]), tmp_path / workers, *options, "--workers", workers) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert read_index(tmp_path / "1").num_shards > 1
