"""n-gram models of transcripts."""

from pathlib import Path

import pytest

from d2v2ds.decoding.beam import BeamDecoder, read_arpa_words
from d2v2ds.errors import ConfigError
from d2v2ds.ngram import main
from d2v2ds.tasks.vocabulary import Vocabulary

pytest.importorskip("kaldingram", reason="needs the extra `asr`")
pytest.importorskip("flashlight", reason="needs the extra `asr`")


def train(folder: Path, *options: str, lines: str = "ab b\nb ab b\nab ab b\n\nb b\n") -> int:
    (folder / "text").write_text(lines)
    return main(["--text", str(folder / "text"), "--to", str(folder / "lm.arpa"), *options])


def test_the_decoder_reads_what_was_trained(tmp_path: Path) -> None:
    assert train(tmp_path, "--order", "3") == 0
    assert sorted(read_arpa_words(tmp_path / "lm.arpa")) == ["ab", "b"]
    decoder = BeamDecoder(Vocabulary(["|", "a", "b"]), tmp_path / "lm.arpa")
    assert decoder.log10(["ab", "b"]) > decoder.log10(["b", "ab"]) > decoder.log10(["x", "x"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pruning_makes_it_smaller(tmp_path: Path) -> None:
    assert train(tmp_path, "--order", "3") == 0
    whole = (tmp_path / "lm.arpa").read_text()
    assert train(tmp_path, "--order", "3", "--prune", "0.5") == 0
    assert len((tmp_path / "lm.arpa").read_text()) < len(whole)


@pytest.mark.parametrize(
    ("options", "lines", "said"),
    [
        (("--order", "1"), "a b\n", "order 1: expected 2 to 9"),
        (("--prune", "-1"), "a b\n", "prune -1.0: expected 0 or more"),
        ((), "\n \n", "expected sentences, found none"),
    ],
)
def test_what_cannot_be_trained_is_an_error(
    tmp_path: Path, options: tuple[str, ...], lines: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, *options, lines=lines) == 2
    assert said in caplog.text
    assert not (tmp_path / "lm.arpa").exists()


def test_a_file_of_another_encoding_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    assert main(["--text", str(tmp_path / "latin"), "--to", str(tmp_path / "lm.arpa")]) == ConfigError.exit_code
    assert "latin: expected UTF-8" in caplog.text
