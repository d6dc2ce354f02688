"""Tokenizers of an export that a stranger may have made."""

from pathlib import Path

import pytest

from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.modalities.text.inference import TextInference
from d2v2ds.modalities.text.network import TextNetwork
from tests.preprocessing.texts import sentencepiece_model


def inference(folder: Path, vocab_size: int = 420, **preprocessing: object) -> TextInference:
    given = {"tokenizer": "sentencepiece", "file": "tokenizer.model"} | preprocessing
    return TextInference(TextNetwork(vocab_size=vocab_size, prenet_depth=0), given, folder)


def test_a_tokenizer_of_the_export_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert inference(tmp_path).tokenizer.vocab_size == 420


@pytest.mark.parametrize("file", ["../other/tokenizer.model", "/etc/passwd", "..", 7, ["tokenizer.model"]])
def test_a_tokenizer_outside_of_the_export_is_refused(tmp_path: Path, file: object) -> None:
    with pytest.raises(CheckpointError, match="expected the name of a file of the export"):
        inference(tmp_path, file=file).tokenizer  # noqa: B018  (a property that checks)


@pytest.mark.parametrize("kind", ["words", ["bpe"], None])
def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path, kind: object) -> None:
    with pytest.raises(CheckpointError, match="tokenizer of kind"):
        inference(tmp_path, tokenizer=kind).tokenizer  # noqa: B018


def test_a_tokenizer_of_more_ids_than_the_model_embeds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    with pytest.raises(CheckpointError, match="has 420 ids, the model embeds 100"):
        inference(tmp_path, vocab_size=100).tokenizer  # noqa: B018


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.model: cannot be read: No such file"):
        inference(tmp_path).tokenizer  # noqa: B018
