"""Manifests of fairseq's speech recipes."""

import json
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from preprocessing.audio.clips import find_clips
from preprocessing.pack_audio import main
from tests.odd_sounds import encoded, hum


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two recordings of 1 s and 2 s."""
    (tmp_path / "corpus" / "a").mkdir(parents=True)
    (tmp_path / "corpus" / "a" / "x.wav").write_bytes(encoded(hum(1.0)))
    (tmp_path / "corpus" / "y.flac").write_bytes(encoded(hum(2.0), "FLAC"))
    return tmp_path / "corpus"


@pytest.mark.parametrize("root", ["{corpus}", "corpus", "./corpus/"])
def test_the_first_line_is_the_folder_of_the_others(corpus: Path, root: str) -> None:
    manifest = corpus.parent / "train.tsv"
    manifest.write_text(f"{root.format(corpus=corpus)}\na/x.wav\t16000\ny.flac\t32000\n")
    first, second = find_clips([manifest])
    assert (first.id, first.source, first.samples) == ("a/x.wav", "a/x.wav", 16000)
    assert Path(first.path).samefile(corpus / "a" / "x.wav") and second.id == "y.flac"
    assert second.place == f"{manifest} line 3: y.flac"


def test_a_length_that_differs_from_the_files_is_noted(corpus: Path, tmp_path: Path) -> None:
    manifest = corpus.parent / "train.tsv"
    manifest.write_bytes(f"{corpus}\r\na/x.wav\t16000\r\ny.flac\t7\r\n".encode())
    assert main(["--input", str(manifest), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert json.loads((tmp_path / "out" / "index.json").read_text())["rows"] == 2
    lines = (tmp_path / "out" / "notes.tsv").read_text().splitlines()[1:]
    assert lines == ["y.flac\tother length\tthe manifest says 7 samples, the file has 32000\t0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{corpus}\na/x.wav\t16000\ny.flac\n", r"line 3: \['y.flac'\]"),
        ("{corpus}\na/x.wav\t16000\ny.flac\t3.5\n", r"line 3: \['y.flac', '3.5'\]"),
        ("{corpus}\na/x.wav\t16000\ny.flac\t-1\n", r"line 3"),
        ("{corpus}\na/x.wav\t16000\ny.flac\t1\t2\n", r"line 3"),
        ("{corpus}\na/x.wav\n", r"line 1 is a folder(?s:.*)line 2: \['a/x.wav'\]"),
        ("{corpus}\na/x.wav\t16000\n\t16000\n", r"line 3"),
        ("{corpus}\na/x.wav\t16000\ny.flac\t" + "9" * 5000 + "\n", r"line 3"),
        (
            "/none/such\na/x.wav\t16000\n",
            r"line 1: expected the folder of the recordings, found no folder '/none/such'",
        ),
        ("{corpus}\na/x.wav\t16000\na/x.wav\t16000\n", r"more than once"),
        ("file\na.wav\n", r"line 1.*'path'"),
    ],
)
def test_odd_lines_are_named(corpus: Path, text: str, message: str) -> None:
    manifest = corpus.parent / "train.tsv"
    manifest.write_text(text.replace("{corpus}", str(corpus)))
    with pytest.raises(ConfigError, match=message):
        find_clips([manifest])


def test_files_that_are_missing_are_named_with_their_lines(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = corpus.parent / "train.tsv"
    manifest.write_text(f"{corpus}\na/x.wav\t16000\nnone.wav\t1\n")
    assert main(["--input", str(manifest), "--output", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert f"{manifest} line 3: none.wav" in capsys.readouterr().err


def test_a_label_column_is_not_in_it(corpus: Path) -> None:
    manifest = corpus.parent / "train.tsv"
    manifest.write_text(f"{corpus}\na/x.wav\t16000\n")
    with pytest.raises(ConfigError, match="no column 'digit'"):
        find_clips([manifest], label_column="digit")
