"""Tokenizers: ids by the model's contract, round trips, and GPT-2's encoding against a slow one."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.modalities.text.tokenizers import BytePairTokenizer, SentencePieceTokenizer, Tokenizer
from preprocessing.text.read import PIECE_CHARS, piece_end
from preprocessing.text.tokenization import read_tokenizer, token_dtype, train_sentencepiece
from tests.oracles import byte_pairs as oracle
from tests.preprocessing.texts import byte_pairs, sentencepiece_model, story, write_gpt2_files

TEXTS = [story(seed, 30) for seed in range(100, 130)] + [
    "",
    " ",
    "日本語 ﬁ ½ \u00a0 x",
    "a\tb\r\nc",
    "\x00\x07",
    "𝔘🏳️‍🌈",
]


def one_by_one(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0].tolist()


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def test_a_trained_model_has_the_contracts_ids_in_the_file_itself() -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [model.id_to_piece(id) for id in range(model.vocab_size())]
    assert pieces[:4] == ["<s>", "<pad>", "</s>", "<unk>"] and pieces[-1] == "<mask>" and len(pieces) == 420
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    assert tokenizer.vocab_size == 420 and [tokenizer.token(id) for id in (0, 1, 2, 3, 419)] == [*pieces[:4], "<mask>"]
    assert one_by_one(tokenizer, "the sea") == model.encode("the sea")


def test_a_batch_is_its_texts_one_by_one_and_nothing_is_unknown() -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    ids, lengths = tokenizer.encode(TEXTS)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for text, part in zip(TEXTS, parts, strict=True):
        assert part.tolist() == one_by_one(tokenizer, text)
    assert ids.min() > 3 and ids.max() < 419, "no special id comes out of text"
    assert tokenizer.encode([])[0].size == 0


@pytest.mark.parametrize("inside", [True, False], ids=["inside the library", "by its arrays"])
def test_ids_are_those_of_the_librarys_own_call(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    tokenizer = SentencePieceTokenizer(sentencepiece_model())
    expected = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode(TEXTS)
    public, calls = tokenizer._model, []

    class Watched:
        """The library's processor, with or without what the inner call needs."""

        _processor = public._processor if inside else None

        def encode(self, *args: object, **how: object) -> object:
            calls.append(args)
            return public.encode(*args, **how)

    monkeypatch.setattr(tokenizer, "_model", Watched())
    ids, lengths = tokenizer.encode(TEXTS)
    assert ids.tolist() == [id for text in expected for id in text] and lengths.tolist() == [len(x) for x in expected]
    assert bool(calls) != inside


def test_identity_gives_every_text_back_and_the_default_its_normal_form() -> None:
    exact = SentencePieceTokenizer(sentencepiece_model("identity"))
    normal = SentencePieceTokenizer(sentencepiece_model())
    for text in TEXTS:
        assert exact.decode(one_by_one(exact, text)) == text
    assert normal.decode(one_by_one(normal, " ﬁne \n\n sea ")) == "fine sea"
    assert normal.decode([0, 1, 2, 419, *one_by_one(normal, "sea")]) == "sea"


def test_training_gives_the_same_bytes_again() -> None:
    texts = [story(seed, 60) for seed in range(40)]
    assert train_sentencepiece(iter(texts), 400, "nmt_nfkc") == train_sentencepiece(iter(texts), 400, "nmt_nfkc")


@pytest.mark.parametrize(("texts", "vocab_size"), [(["a b"] * 9, 5000), ([story(1, 99)], 270), ([], 400)])
def test_a_vocabulary_that_the_text_cannot_give_is_refused(texts: list[str], vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size {vocab_size}: sentencepiece cannot train on this") as error:
        train_sentencepiece(texts, vocab_size, "nmt_nfkc")
    assert ("the input holds no text" in str(error.value)) == (texts == [])


def test_the_advised_vocabulary_is_possible_and_the_largest() -> None:
    texts = [story(seed, 60) for seed in range(40)]
    with pytest.raises(ConfigError, match=r"--vocab-size \d+ is possible") as error:
        train_sentencepiece(texts, 5000, "nmt_nfkc")
    most = int(str(error.value).split("--vocab-size ")[-1].split()[0])
    assert SentencePieceTokenizer(train_sentencepiece(texts, most, "nmt_nfkc")).vocab_size == most
    with pytest.raises(ConfigError):
        train_sentencepiece(texts, most + 1, "nmt_nfkc")


def foreign_model(**options: object) -> bytes:
    """A sentencepiece model with ids in another order."""
    import sentencepiece

    model = BytesIO()
    texts = iter([story(seed, 60) for seed in range(60)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=200, minloglevel=2, num_threads=1, **options
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},  # unk 0, <s> 1, </s> 2, no pad: XLM-R, Llama
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},  # T5
        {"user_defined_symbols": ["<mask>", "[SEP]"]},
    ],
)
def test_a_given_model_of_another_id_order_is_renumbered_in_fairseqs_order(options: dict[str, object]) -> None:
    import sentencepiece

    data = foreign_model(**options)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    special = {model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()}
    pieces = [model.id_to_piece(id) for id in range(200) if id not in special and model.id_to_piece(id) != "<mask>"]
    tokenizer = SentencePieceTokenizer(data)
    assert tokenizer.vocab_size == 4 + len(pieces) + 1
    assert [tokenizer.token(id) for id in range(4, tokenizer.vocab_size - 1)] == pieces
    text = "the ship 1851 Ω"
    expected = [3 if id == model.unk_id() else 4 + pieces.index(model.id_to_piece(id)) for id in model.encode(text)]
    assert one_by_one(tokenizer, text) == expected and 3 in expected
    assert tokenizer.decode(one_by_one(tokenizer, "the ship")) == "the ship"


# --- GPT-2's byte pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [0, 30])
def test_gpt2_files_give_the_ids_of_a_slow_encoder_and_fairseqs_dictionary(tmp_path: Path, left_out: int) -> None:
    folder = write_gpt2_files(tmp_path / "gpt2", left_out)
    encoder, merges = byte_pairs()
    ids = oracle.fairseq_ids(encoder, (folder / "dict.txt").read_text())
    tokenizer = read_tokenizer(folder)
    assert tokenizer.vocab_size == 4 + len(encoder) - left_out + 2 + 1
    for text in [*TEXTS, "don't we'll  HE'S\n\n\n x", "</s><mask><s> <|endoftext|>", "a\u3000b ² Ⅷ _x_"]:
        assert one_by_one(tokenizer, text) == oracle.encode(text, merges, ids, unknown=3), repr(text)
    unknown = sum((tokenizer.encode([text])[0] == 3).sum() for text in TEXTS)
    assert bool(unknown) == bool(left_out)
    assert [tokenizer.token(id) for id in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.token(tokenizer.vocab_size - 1) == "<mask>"


def test_byte_pairs_give_every_text_back_also_from_the_file_in_the_folder(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_gpt2_files(tmp_path / "gpt2"))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.data)
    again = read_tokenizer(tmp_path / "tokenizer.json")
    for text in [*TEXTS, "</s><mask>"]:
        assert tokenizer.decode([0, *one_by_one(tokenizer, text), 2]) == text
        assert one_by_one(again, text) == one_by_one(tokenizer, text)


def test_truncation_and_padding_of_a_given_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_gpt2_files(tmp_path / "gpt2"))
    values = json.loads(tokenizer.data)
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                         "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    other = BytePairTokenizer(json.dumps(values).encode())
    for text in ("a", story(1, 50)):
        assert one_by_one(other, text) == one_by_one(tokenizer, text)


def test_bad_gpt2_files_are_named_with_their_line(tmp_path: Path) -> None:
    folder = write_gpt2_files(tmp_path / "gpt2")
    good = (folder / "dict.txt").read_text()
    for line in ("99999 1", "", f"{good.split()[0]} 7"):
        (folder / "dict.txt").write_text(good + line + "\n")
        with pytest.raises(
            ConfigError, match=rf"dict\.txt line {good.count(chr(10)) + 1}: expected '<id of encoder.json>"
        ):
            read_tokenizer(folder)
    (folder / "dict.txt").write_text(good)
    with (folder / "vocab.bpe").open("a") as file:
        file.write("qq xx\n")
    with pytest.raises(ConfigError, match=r"vocab\.bpe line \d+: expected two tokens of encoder\.json"):
        read_tokenizer(folder)
    (folder / "encoder.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"encoder\.json: expected a JSON object, found list"):
        read_tokenizer(folder)
    (folder / "encoder.json").unlink()
    with pytest.raises(ConfigError, match="or a folder with encoder.json, vocab.bpe, dict.txt; found: .*encoder.json"):
        read_tokenizer(folder)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_text("no model")
    with pytest.raises(ConfigError, match="a.model: expected a sentencepiece model"):
        read_tokenizer(tmp_path / "a.model")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match="a.json: expected a tokenizer.json"):
        read_tokenizer(tmp_path / "a.json")
    encoder, merges = byte_pairs()
    from tokenizers import Tokenizer as Model
    from tokenizers import models

    Model(models.BPE(vocab=encoder, merges=merges)).save(str(tmp_path / "b.json"))
    with pytest.raises(ConfigError, match=r"b.json: expected the ids of RoBERTa .* found \{'<s>': None"):
        read_tokenizer(tmp_path / "b.json")


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(tmp_path: Path, kind: str) -> None:
    tokenizer = (
        SentencePieceTokenizer(sentencepiece_model())
        if kind == "sentencepiece"
        else read_tokenizer(write_gpt2_files(tmp_path))
    )
    text = story(7, 3000).replace(" -", " \n\n\t - ")
    for most in (17, 50, 1000):
        rest, pieces = text, []
        while len(rest) > most:
            cut = piece_end(rest, most)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        assert "".join([*pieces, rest]) == text and max(map(len, pieces)) <= most
        assert tokenizer.encode([*pieces, rest])[0].tolist() == one_by_one(tokenizer, text)
    assert piece_end("a b   c", 5) == 1, "not between two white spaces: GPT-2 has tokens for runs of them"
    assert piece_end("x" * 2 * PIECE_CHARS) == PIECE_CHARS


def test_ids_take_the_smallest_type_that_holds_them() -> None:
    assert [token_dtype(size).name for size in (300, 65536, 65537)] == ["uint16", "uint16", "uint32"]
