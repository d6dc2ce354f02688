"""The text packer from end to end: blocks, rows of documents, bad input, restarts, verify and inspect."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from d2v2ds.data.schema import FileEntry, Index, shard_schema
from d2v2ds.modalities.text.shards import TEXT_LAYOUT, TextShards
from d2v2ds.modalities.text.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from preprocessing import inspect
from preprocessing.driver.writer import PACKING_NAME
from preprocessing.formats import open_shards
from preprocessing.pack_text import main
from preprocessing.text import read, stream
from preprocessing.text.documents import DocumentKind, DocumentOptions, TextSpan
from preprocessing.text.find import find_text_files
from preprocessing.text.read import read_documents
from preprocessing.text.report import batch_faults
from preprocessing.text.shard_plan import TextSettings, make_plan, sample_texts
from preprocessing.verify import main as verify_main
from preprocessing.verify import verify
from tests.preprocessing.driver.test_parallel import mpirun, needs_mpi
from tests.preprocessing.helpers import clean_environment, contents, run_module
from tests.preprocessing.texts import sentencepiece_model, story, write_gpt2_files, write_stories

BLOCK = ("--block-tokens", "64")
TRAIN = ("--train-tokenizer", "--vocab-size", "420")


def pack(source: Path, output: Path, *options: object) -> int:
    """With the option's defaults behind, so that `options` win."""
    return main(["--workers", "1", *BLOCK, "--input", str(source), "--output", str(output), *map(str, options)])


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_stories(tmp_path / "stories")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "given.model").write_bytes(sentencepiece_model())
    return tmp_path / "given.model"


def index_of(folder: Path) -> dict:
    index: dict = json.loads((folder / "index.json").read_text())
    return index


def rows_of(folder: Path) -> list[dict]:
    found: list[dict] = []
    for shard in index_of(folder)["shards"]:
        table = pa.ipc.open_file(str(folder / shard["file"])).read_all()
        dtype = index_of(folder)["format"]["token_dtype"]
        found += [row | {"tokens": np.frombuffer(row["tokens"], dtype).tolist()} for row in table.to_pylist()]
    return found


def tokenizer_of(folder: Path) -> Tokenizer:
    form = index_of(folder)["format"]
    return load_tokenizer(form["tokenizer"], folder / form["tokenizer_file"])


def documents_of(folder: Path, options: DocumentOptions) -> list[str]:
    spans = [TextSpan(file=file) for file in find_text_files([folder], options)]
    return [text for span in spans for batch in read_documents(span, options) for text in batch.texts]


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_blocks_are_all_documents_joined_and_cut(
    stories: Path, model: Path, tmp_path: Path, kind: str, document: DocumentKind
) -> None:
    given = model if kind == "sentencepiece" else write_gpt2_files(tmp_path / "gpt2")
    assert pack(stories, tmp_path / "out", "--tokenizer", given, "--document", document) == 0
    tokenizer = tokenizer_of(tmp_path / "out")
    texts = documents_of(stories, DocumentOptions(document=document))
    stream = [id for text in texts for id in [*tokenizer.encode([text])[0].tolist(), 2]]
    expected = [[0, *stream[start : start + 63]] for start in range(0, len(stream), 63)]
    rows = rows_of(tmp_path / "out")
    assert [row["tokens"] for row in rows] == expected
    assert {len(row["tokens"]) for row in rows[:-1]} == {64} and 1 < len(rows[-1]["tokens"]) <= 64
    assert [row["start"] for row in rows] == list(range(len(rows)))
    assert {row["id"] for row in rows} == {row["label"] for row in rows} == {None}
    index = index_of(tmp_path / "out")
    assert index["totals"] == {
        "tokens": len(stream) + len(rows),
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    special = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": tokenizer.vocab_size - 1}
    assert (index["format"]["special"], index["format"]["token_dtype"]) == (special, "uint16")
    assert index["format"]["tokenizer"] == kind


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_documents_in_pieces_give_the_same_bytes(
    stories: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given = model if kind == "sentencepiece" else write_gpt2_files(tmp_path / "gpt2")
    options = ("--tokenizer", given, "--document", "file")
    pack(stories, tmp_path / "whole", *options)
    monkeypatch.setattr(read, "PIECE_CHARS", 200)
    pack(stories, tmp_path / "pieces", *options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert index_of(tmp_path / "whole")["totals"]["documents"] == 6


def test_the_source_of_a_block_is_that_of_its_first_token(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, count in (("a", 40), ("b", 3), ("c", 200)):
        (tmp_path / "in" / f"{name}.txt").write_text(" ".join(["sea"] * count))
    pack(tmp_path / "in", tmp_path / "out", "--tokenizer", model, "--block-tokens", "11")
    length = len(SentencePieceTokenizer(sentencepiece_model()).encode(["sea " * 9 + "sea"])[0])
    assert length == 10, "the word is one token"
    ends = np.cumsum([41, 4, 201])
    rows = rows_of(tmp_path / "out")
    assert [row["source"] for row in rows] == ["abc"[int((ends <= 10 * at).sum())] + ".txt" for at in range(len(rows))]


def test_decoding_the_blocks_gives_the_documents_back(stories: Path, tmp_path: Path) -> None:
    assert pack(stories, tmp_path / "out", *TRAIN, "--normalization", "identity", "--shard-bytes", "2K") == 0
    shards = open_shards(tmp_path / "out")
    assert isinstance(shards, TextShards) and len(shards.index.shards) > 3
    tokenizer = load_tokenizer("sentencepiece", shards.tokenizer_file)
    stream = np.concatenate([shards.read_tokens(row)[1:] for row in range(len(shards))])
    pieces = np.split(stream, np.flatnonzero(stream == 2))
    assert [tokenizer.decode(piece.tolist()) for piece in pieces[:-1]] == documents_of(stories, DocumentOptions())
    assert pieces[-1].tolist() == [2]


def test_every_shard_begins_anew_and_only_its_last_block_is_shorter(stories: Path, model: Path, tmp_path: Path) -> None:
    pack(stories, tmp_path / "out", "--tokenizer", model, "--shard-bytes", "3K")
    first = 0
    rows = rows_of(tmp_path / "out")
    assert len(index_of(tmp_path / "out")["shards"]) > 3
    for shard in index_of(tmp_path / "out")["shards"]:
        own = rows[first : first + shard["rows"]]
        assert [row["start"] for row in own] == list(range(len(own)))
        assert {len(row["tokens"]) for row in own[:-1]} <= {64} and own[-1]["tokens"][-1] == 2
        first += shard["rows"]


def test_a_large_vocabulary_takes_wider_ids(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(story(1, 300))
    monkeypatch.setattr("preprocessing.pack_text.token_dtype", lambda size: np.dtype("<u4"))
    monkeypatch.setattr("preprocessing.text.rows.token_dtype", lambda size: np.dtype("<u4"))
    pack(tmp_path / "a.txt", tmp_path / "wide", "--tokenizer", model)
    monkeypatch.undo()
    pack(tmp_path / "a.txt", tmp_path / "narrow", "--tokenizer", model)
    wide, narrow = (rows_of(tmp_path / name) for name in ("wide", "narrow"))
    for row in (*wide, *narrow):
        del row["crc32"], row["fields_crc32"]  # of the bytes, which are twice as many
    assert wide == narrow and index_of(tmp_path / "wide")["format"]["token_dtype"] == "uint32"
    assert verify(tmp_path / "wide") == []


# --- many processes, restarts -----------------------------------------------------------------------------------------


def write_large(folder: Path) -> Path:
    """One plain and one JSON file that are divided, a compressed one and small ones."""
    write_stories(folder, files=3)
    (folder / "large.txt").write_text("\n \n".join(story(seed, 30) for seed in range(300)), encoding="utf-8")
    lines = "".join(json.dumps({"text": story(seed, 25)}) + "\n" for seed in range(200))
    (folder / "large.jsonl").write_text(lines)
    (folder / "packed.jsonl.zst").write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.mark.distributed
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = write_large(tmp_path / "in")
    for workers in (1, 2, 3):
        options = (*TRAIN, "--shard-bytes", "6K", "--max-skipped", "1", "--workers", workers)
        assert pack(source, tmp_path / f"{workers}", *options) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(index_of(tmp_path / "1")["shards"]) > 8
    texts = {text for row in rows_of(tmp_path / "1") for text in [row["source"]]}
    assert texts == {"book0.txt", "book1.txt", "book2.txt", "large.txt", "large.jsonl", "packed.jsonl.zst"}
    assert index_of(tmp_path / "1")["totals"]["documents"] == 60 + 300 + 200 + 200


@needs_mpi
@pytest.mark.distributed
def test_mpi_ranks_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    source = write_large(tmp_path / "in")
    options = (*TRAIN, "--shard-bytes", "6K", "--max-skipped", "1", *BLOCK)
    result = mpirun(3, "--input", source, "--output", tmp_path / "mpi", *options, module="preprocessing.pack_text")
    assert result.returncode == 0, result.stderr
    assert pack(source, tmp_path / "one", *options) == 0
    assert contents(tmp_path / "mpi") == contents(tmp_path / "one")


@pytest.mark.run
@pytest.mark.distributed
@pytest.mark.parametrize("finished", [1, 9])
def test_killed_and_started_again_ends_with_the_same_bytes(tmp_path: Path, finished: int) -> None:
    source, output = write_large(tmp_path / "in"), tmp_path / "killed"
    options = (*TRAIN, "--shard-bytes", "1K", "--max-skipped", "1")
    assert pack(source, tmp_path / "whole", *options) == 0
    command = [sys.executable, "-m", "preprocessing.pack_text", "--input", source, "--output", output, *options, *BLOCK]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], env=clean_environment(), stderr=subprocess.DEVNULL
    )
    while len(list(output.glob("*.arrow"))) < finished and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "index.json").exists()
    kept = [output / path.stem for path in (output / PACKING_NAME).glob("*.arrow.json")]
    times = {path: path.stat().st_mtime_ns for path in [*kept, output / "tokenizer.model"]}
    assert pack(source, output, *options) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in times} == times, "finished shards and the tokenizer are kept"


def test_other_settings_or_another_tokenizer_are_never_mixed(
    stories: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(stories, tmp_path / "out", "--tokenizer", model) == 0
    before = contents(tmp_path / "out")
    assert pack(stories, tmp_path / "out", "--tokenizer", model) == 0
    (tmp_path / "other.model").write_bytes(sentencepiece_model("identity"))
    options = ("--tokenizer", tmp_path / "other.model", "--document", "line")
    assert pack(stories, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert "document: the folder has 'paragraph', this command 'line'" in message and "tokenizer: the folder" in message
    assert pack(stories, tmp_path / "out", *TRAIN) == 2
    (stories / "book9.txt").write_text("more")
    assert pack(stories, tmp_path / "out", "--tokenizer", model) == 2
    assert contents(tmp_path / "out") == before


# --- rows of documents ------------------------------------------------------------------------------------------------


def test_one_row_per_document_keeps_labels_and_cuts(model: Path, tmp_path: Path) -> None:
    texts = [story(seed, words) for seed, words in enumerate([3, 200, 8, 1])] + [""]
    lines = [json.dumps({"text": text, "topic": at % 2}) for at, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]))
    options = ("--tokenizer", model, "--one-row-per-document", "--label-field", "topic", "--shard-bytes", "100")
    assert pack(tmp_path / "a.jsonl", tmp_path / "out", *options) == 0
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    rows = rows_of(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"a.jsonl#{line}" for line in (1, 2, 4, 5, 6)]
    assert [row["label"] for row in rows] == ["0", "1", "0", "1", "0"]
    for row, text in zip(rows, texts, strict=True):
        assert row["tokens"] == [0, *tokenizer.encode([text])[0].tolist()[:62], 2]
    assert max(len(row["tokens"]) for row in rows) == 64
    shards = TextShards(tmp_path / "out")
    assert (shards.read_labels(1).id, shards.read_labels(1).label) == ("a.jsonl#2", "1")
    assert verify(tmp_path / "out") == []


def test_one_row_per_document_of_tsv_and_of_a_manifest(
    stories: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "PIECE_CHARS", 100)  # long documents are cut to their first piece, not doubled
    options = ("--tokenizer", model, "--one-row-per-document", "--block-tokens", "9")
    (tmp_path / "a.tsv").write_text("label\ttext\nneg\tthe sea\npos\told ship\n")
    assert pack(tmp_path / "a.tsv", tmp_path / "tsv", *options) == 0
    assert [(row["id"], row["label"]) for row in rows_of(tmp_path / "tsv")] == [("a.tsv#2", "neg"), ("a.tsv#3", "pos")]
    (stories / "m.tsv").write_text("path\tauthor\nbook1.txt\tmelville\nbook0.txt\tverne\n")
    assert pack(stories / "m.tsv", tmp_path / "books", *options, "--label-column", "author") == 0
    rows = rows_of(tmp_path / "books")
    expected = [("book1.txt", "melville"), ("book0.txt", "verne")]
    assert [(row["source"], row["label"]) for row in rows] == [pair for pair in expected for _ in range(20)]
    assert [row["id"] for row in rows[:3]] == ["book1.txt#0", "book1.txt#1", "book1.txt#2"]
    assert len({row["id"] for row in rows}) == 40


def test_the_same_source_twice_cannot_name_rows(
    stories: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokenizer", model, "--one-row-per-document", "--input", stories, stories)
    assert pack(stories, tmp_path / "out", *options) == 2
    assert "'book0.txt'" in capsys.readouterr().err


# --- training on a sample ---------------------------------------------------------------------------------------------


def test_a_tokenizer_of_a_large_corpus_is_trained_on_a_seeded_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_large(tmp_path / "in")

    def sample(**changes: int) -> list[str]:
        settings = TextSettings(vocab_size=420, shard_bytes=3000, **changes)
        spans = [span for shard in make_plan([source], settings).shards for span in shard]
        return list(sample_texts(spans, settings))

    everything = sample()
    texts = documents_of(source, DocumentOptions(document="line"))
    assert everything == texts and len(texts) > 1000, "all of a small corpus; of plain text lines are enough"
    monkeypatch.setattr("preprocessing.text.shard_plan.SAMPLE_BYTES", 500)
    some = sample(train_bytes=10_000)
    assert 5_000 < sum(map(len, some)) < 20_000 and set(some) < set(everything)
    assert some == sample(train_bytes=10_000) != sample(train_bytes=10_000, seed=1)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert pack(tmp_path / "a.txt", tmp_path / "out", "--block-tokens", "2", "--train-bytes", "0") == 2
    message = capsys.readouterr().err
    for words in ("either --tokenizer PATH, or --train-tokenizer", "--block-tokens 2", "--train-bytes 0"):
        assert words in message
    assert pack(tmp_path / "a.txt", tmp_path / "out", "--train-tokenizer", "--vocab-size", "100") == 2
    assert "--vocab-size 100: expected at least 300" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        pack(tmp_path / "a.txt", tmp_path / "out", "--train-tokenizer")
    assert "--train-tokenizer and --vocab-size N belong together" in capsys.readouterr().err
    assert pack(tmp_path / "a.txt", tmp_path / "out", *TRAIN) == 2
    assert "sentencepiece cannot train on this text" in capsys.readouterr().err
    assert pack(tmp_path / "a.txt", tmp_path / "none", "--tokenizer", tmp_path / "gone.model") == 2
    assert "gone.model" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_empty_files_are_skipped_with_their_reason(
    stories: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stories / "empty.txt").write_bytes(b"")
    (stories / "blank.txt").write_bytes(b" \n\n \t\n")
    assert pack(stories, tmp_path / "out", "--tokenizer", model) == 3
    assert "--max-skipped" in capsys.readouterr().err
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()[1:]
    assert lines == ["blank.txt\tno text but white space", "empty.txt\tempty file (0 bytes)"]
    assert (index_of(tmp_path / "out")["files"], index_of(tmp_path / "out")["files_skipped"]) == (8, 2)
    only = tmp_path / "only"
    only.mkdir()
    (only / "empty.txt").write_bytes(b"")
    assert pack(only, tmp_path / "nothing", "--tokenizer", model) == 3
    assert verify(tmp_path / "nothing") == [] and index_of(tmp_path / "nothing")["rows"] == 0
    assert inspect.main([str(tmp_path / "nothing")]) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_ends_the_packing_with_its_place_and_no_traceback(model: Path, tmp_path: Path, workers: int) -> None:
    source = write_large(tmp_path / "in")
    data = (source / "large.txt").read_bytes()
    at = data.index(b"sea", len(data) // 2)
    (source / "large.txt").write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    arguments = ["--input", source, "--output", tmp_path / "out", "--tokenizer", model, "--shard-bytes", "3K"]
    arguments += ["--workers", workers, "--max-skipped", "1"]
    result = run_module("preprocessing.pack_text", *arguments)
    assert result.returncode == 2, result.stderr
    assert f"error: large.txt: expected UTF-8 text, found invalid start byte at byte {at} (ff" in result.stderr
    assert "Traceback" not in result.stderr
    shutil.rmtree(tmp_path / "out")
    assert run_module("preprocessing.pack_text", *arguments, "--errors", "replace").returncode == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"body": "x"}\n', "a.jsonl line 1: expected text in field 'text', found the fields ['body']"),
        ("a.tsv", "body\nx\n", "a.tsv line 1: expected tab-separated column names with 'text'"),
    ],
)
def test_a_wrong_field_name_stops_before_anything_is_packed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    assert pack(tmp_path / name, tmp_path / "out", "--tokenizer", model) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert pack(tmp_path / name, tmp_path / "out", "--tokenizer", model, "--text-field", "body") == 0


# --- verify and inspect -----------------------------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(stories: Path, model: Path, tmp_path: Path) -> None:
    pack(stories, tmp_path / "out", "--tokenizer", model)
    assert verify_main([str(tmp_path / "out"), "--workers", "1"]) == 0
    tokenizer = tmp_path / "out" / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-1] + b"x")
    (fault,) = verify(tmp_path / "out")
    assert fault.startswith("tokenizer.model: crc32: expected")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [[7, 8, 2]] * 2}, ["row 0: first token: expected 0 (<s>), found 7", "row 1: first token"]),
        ({"tokens": [[0, 8, 2], [0, 5, 420]]}, ["row 1: token 2: expected an id below 420, found 420"]),
        ({"num_tokens": [3, 4]}, ["row 1: tokens: expected 4 of 2 bytes, found 6 bytes"]),
        ({"tokens": [[0], [0] * 65]}, ["row 1: num_tokens: expected 1 to 64, found 65"]),
        ({"tokens": [[], [0]]}, ["row 0: num_tokens: expected 1 to 64, found 0"]),
        (
            {"sentences": 2, "tokens": [[0, 5, 2, 2, 6, 2], [0, 5, 2]]},
            ["row 1: tokens: expected <s> A </s> </s> B </s>"],
        ),
        ({}, []),
    ],
)
def test_faults_of_rows_are_named(change: dict, words: list[str]) -> None:
    special = {"bos": 0, "pad": 1, "eos": 2, "unk": 3}
    form = {"token_dtype": "uint16", "vocab_size": 420, "block_tokens": 64, "special": special}
    form |= {"sentences": 2} if "sentences" in change else {}
    entry = FileEntry(file="", bytes=0, crc32="")
    index = Index(modality="text", format=form, settings={}, files=1, files_skipped=0, plan_sha256="", rows=2,
                  totals={}, rows_file=entry, shards=())  # fmt: skip
    tokens = change.get("tokens", [[0, 5, 2], [0, 6, 2]])
    columns = {"id": [None] * 2, "tokens": [np.array(row, dtype="<u2").tobytes() for row in tokens],
               "num_tokens": change.get("num_tokens", [len(row) for row in tokens]), "label": [None] * 2,
               "source": ["a"] * 2, "start": [0, 1],
               "crc32": [0] * 2, "texts_crc32": [0] * 2, "fields_crc32": [0] * 2}  # fmt: skip
    batch = pa.record_batch(columns, schema=shard_schema(TEXT_LAYOUT, form))
    found = list(batch_faults(batch, index, "text-00000.arrow", 0))
    assert len(found) == len(words)
    for fault, word in zip(found, words, strict=True):
        assert fault.startswith(f"text-00000.arrow {word}")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_inspect_shows_fill_frequent_tokens_and_text(
    stories: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(stories, tmp_path / "out", "--tokenizer", model)
    capsys.readouterr()
    assert inspect.main([str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    for words in (
        "sentencepiece of 420 ids as uint16, rows of 64",
        "documents 120, ",
        "fill ",
        "frequent  ",
        "median 100.0",
    ):
        assert words in report
    assert " ".join(documents_of(stories, DocumentOptions())[0].split())[:25] in report and "</s>" in report
    pytest.importorskip("matplotlib")
    assert inspect.main([str(tmp_path / "out"), "--plot", str(tmp_path / "report.png")]) == 0
    assert (tmp_path / "report.png").stat().st_size > 10_000


# --- what is lost on the way ------------------------------------------------------------------------------------------


def notes_of(folder: Path) -> dict[str, list[str]]:
    """Kind of note -> details."""
    lines = (folder / "notes.tsv").read_text(encoding="utf-8").splitlines()[1:]
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line.split("\t")[1], []).append(line.split("\t")[2])
    return found


@pytest.fixture
def narrow_model(tmp_path: Path) -> Path:
    """A sentencepiece model that knows letters and no bytes."""
    from io import BytesIO

    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the sea the ship the whale"] * 50),
        model_writer=model,
        vocab_size=13,
        model_type="char",
        minloglevel=2,
    )
    (tmp_path / "narrow.model").write_bytes(model.getvalue())
    return tmp_path / "narrow.model"


@pytest.mark.parametrize("rows", [(), ("--one-row-per-document",)])
def test_a_tokenizer_that_does_not_know_the_text_is_an_error_beyond_a_share(
    tmp_path: Path, narrow_model: Path, rows: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "known.txt").write_text("the sea\n\nthe ship")
    (tmp_path / "in" / "unknown.txt").write_text("日 本 語 日")
    options = (tmp_path / "in", tmp_path / "out", "--tokenizer", narrow_model, *rows)
    assert pack(*options) == 3
    said = capsys.readouterr()
    assert "unknown tokens 25.00%), --max-noted allows 1.00%" in said.err
    assert "1 unknown tokens (25.00% of the content)" in said.out
    assert notes_of(tmp_path / "out") == {"unknown tokens": ["4 of 8 tokens"]}
    assert pack(*options, "--max-noted", "0.5") == 0


def test_the_usual_recipe_of_byte_pairs_packs_its_own_text_without_an_unknown_token(
    stories: Path, tmp_path: Path
) -> None:
    from tokenizers import ByteLevelBPETokenizer

    recipe = ByteLevelBPETokenizer()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    recipe.train([str(path) for path in stories.iterdir()], vocab_size=400, special_tokens=names, show_progress=False)
    recipe.save(str(tmp_path / "recipe.json"))
    assert pack(stories, tmp_path / "out", "--tokenizer", tmp_path / "recipe.json") == 0
    assert index_of(tmp_path / "out")["format"]["vocab_size"] == 400 and not (tmp_path / "out" / "notes.tsv").exists()
    assert {3, 399}.isdisjoint({id for row in rows_of(tmp_path / "out") for id in row["tokens"]})
    assert verify_main([str(tmp_path / "out"), "--workers", "1"]) == 0


def test_lines_whose_text_is_null_are_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    good, null = '{"text": "the sea"}\n', '{"text": null}\n'
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "some.jsonl").write_text(good * 3 + null)
    (tmp_path / "in" / "none.jsonl").write_text(null * 2)
    options = (tmp_path / "in", tmp_path / "out", "--tokenizer", model, "--max-skipped", "0.5")
    assert pack(*options) == 3 and pack(*options, "--max-noted", "0.2") == 0
    assert index_of(tmp_path / "out")["totals"]["documents"] == 3
    assert notes_of(tmp_path / "out") == {"null texts": ["1 of 4 lines"]}
    assert "none.jsonl\tonly lines whose text is null" in (tmp_path / "out" / "skipped.tsv").read_text()


def test_replaced_characters_and_cut_documents_are_counted(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"caf\xe9 sea\n\n" + b"sea " * 100)
    options = ("--tokenizer", model, "--one-row-per-document", "--errors", "replace")
    assert pack(tmp_path / "in", tmp_path / "out", *options) == 0
    characters = len("cafe sea") + 4 * 100 - 1
    assert notes_of(tmp_path / "out") == {
        "invalid characters": [f"1 of {characters} characters are U+FFFD"],
        "cut documents": ["1 of 2 documents"],
    }


# --- special files and the machine's faults --------------------------------------------------------------------------


def test_special_files_are_refused_by_name(
    stories: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert pack(tmp_path / "a.txt", tmp_path / "out", "--tokenizer", model) == 2
    assert "a.txt: expected a folder or a file, found a FIFO" in capsys.readouterr().err
    os.mkfifo(stories / "pipe.jsonl.gz")
    assert pack(stories, tmp_path / "out", "--tokenizer", model) == 2
    assert "pipe.jsonl.gz: expected a file, found a FIFO; remove it" in capsys.readouterr().err
    (tmp_path / "m.tsv").write_text("path\na.txt\n")
    assert pack(tmp_path / "m.tsv", tmp_path / "out", "--tokenizer", model) == 2
    assert "a.txt: expected a file, found a FIFO" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["stat", "open", "read"])
def test_a_fault_of_the_machine_ends_the_packing_and_is_tried_again_before(
    stories: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], call: str, code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("d2v2ds.io.machine_faults.time.sleep", lambda seconds: None)
    left = [99]

    def fail(path: object) -> None:
        if str(path).endswith("book3.txt") and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(path))

    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            fail(self.name)
            return super().read(size)

    real = {"stat": os.stat, "open": os.open}
    if call == "read":
        monkeypatch.setitem(stream._OPENERS, None, Failing)
    else:
        monkeypatch.setattr(os, call, lambda path, *rest, **named: (fail(path), real[call](path, *rest, **named))[1])
    options = (stories, tmp_path / "out", "--tokenizer", model)
    assert pack(*options) == 4
    assert f"book3.txt: cannot be read: {os.strerror(code)}" in capsys.readouterr().err
    left[0] = 2 if code in (errno.EIO, errno.ESTALE) else 0
    assert pack(*options) == 0 and left == [0]
