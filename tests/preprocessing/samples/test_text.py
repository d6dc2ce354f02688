"""Python's documentation as a corpus: repeatable, labelled, apart from split to split, and usable by the packer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from preprocessing.pack_text import main as pack
from preprocessing.samples import text as sample_text
from preprocessing.samples.text import MIN_WORDS, TOPICS, collect, main, texts_of
from tests.preprocessing.helpers import contents, run_module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documentation")
    assert main(["--output", str(folder)]) == 0
    return folder


def documents(corpus: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.run
def test_every_topic_is_in_both_splits_and_no_text_in_both(corpus: Path) -> None:
    train, valid = documents(corpus, "train"), documents(corpus, "valid")
    assert {one["label"] for one in train} == {one["label"] for one in valid} == set(TOPICS)
    texts = [one["text"] for one in train + valid]
    ids = [one["id"] for one in train + valid]
    assert len(set(texts)) == len(texts) and len(set(ids)) == len(ids)
    assert 0.15 < len(valid) / len(texts) < 0.25
    assert sum(map(len, texts)) > 1_500_000 and min(len(text.split()) for text in texts) >= MIN_WORDS


@pytest.mark.run
def test_another_process_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    result = run_module("preprocessing.samples.text", "--output", tmp_path / "again")
    assert result.returncode == 0 and "documentation inside Python" in result.stdout
    assert contents(tmp_path / "again") == contents(corpus)


def test_source_is_read_without_running_it_and_compiled_modules_are_asked() -> None:
    sys.modules.pop("this", None)
    found = dict(texts_of("textwrap"))
    assert any(place.startswith("textwrap.dedent:") and "leading whitespace" in text for place, text in found.items())
    assert dict(texts_of("this")) == {} and "this" not in sys.modules  # it prints when it runs
    assert "natural logarithm" in dict(texts_of("math"))["math.log1p"]
    assert "Padding" in dict(texts_of("builtins"))["builtins.str.center"]
    assert any(place.startswith("http.server.") for place, _ in texts_of("http"))
    assert not any(".test" in place for place, _ in texts_of("unittest"))
    assert dict(texts_of("no_such_module_anywhere")) == {}


def test_a_text_that_occurs_twice_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(["word"] * MIN_WORDS)
    monkeypatch.setattr(sample_text, "texts_of", lambda name: [(f"{name}.a", words), (f"{name}.b", "too short")])
    assert [(one.id, one.label) for one in collect({"x": ("m",), "y": ("n",)})] == [("m.a", "x")]


@pytest.mark.run
def test_both_ways_of_packing_take_it(corpus: Path, tmp_path: Path) -> None:
    train = ["--input", str(corpus / "train.jsonl"), "--workers", "1", "--block-tokens", "128"]
    assert pack([*train, "--output", str(tmp_path / "train"), "--train-tokenizer", "--vocab-size", "2000"]) == 0
    tokenizer = next((tmp_path / "train").glob("*.model"))
    valid = ["--input", str(corpus / "valid.jsonl"), "--workers", "1", "--block-tokens", "128"]
    labelled = ["--one-row-per-document", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "valid")]
    assert pack([*valid, *labelled]) == 0
