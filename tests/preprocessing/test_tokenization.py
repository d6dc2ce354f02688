"""Tokenizers: ids by the model's contract, round trips, and GPT-2's encoding against a slow one."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.modalities.text.tokenizers import (
    TOKENIZER_BYTES,
    BytePairTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
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


def test_memory_that_runs_out_is_no_fault_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    def fail(**_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", fail)
    with pytest.raises(MachineError, match="bad_alloc; .* no memory left"):
        train_sentencepiece(TEXTS, 300, "nmt_nfkc")


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
    with pytest.raises(ConfigError, match=r"b.json: expected the special tokens of RoBERTa .* found \{'<s>': None"):
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


# --- files of other producers -----------------------------------------------------------------------------------------

RECIPE = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def recipe_json(specials: tuple[str, ...] = RECIPE, alphabet: bool = True) -> dict[str, Any]:
    """Values of a byte-level tokenizer.json trained with these special tokens first, as the usual recipe does."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    model.train_from_iterator([story(seed, 60) for seed in range(60)], trainer)
    values: dict[str, Any] = json.loads(model.to_str())
    return values


def given(tmp_path: Path, values: Any) -> Tokenizer:
    path = tmp_path / "given.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_tokenizer(path)


@pytest.mark.parametrize(
    "specials", [RECIPE, tuple(reversed(RECIPE)), ("<mask>", "<unk>", "<s>", "</s>", "<pad>", "<extra>")]
)
def test_a_byte_pair_file_of_another_id_order_is_renumbered(tmp_path: Path, specials: tuple[str, ...]) -> None:
    from tokenizers import Tokenizer as Model

    values = recipe_json(specials)
    theirs, ours = Model.from_str(json.dumps(values)), given(tmp_path, values)
    assert ours.vocab_size == theirs.get_vocab_size() and ours.token(ours.vocab_size - 1) == "<mask>"
    assert [ours.token(id) for id in range(4)] == list(RECIPE[:4])
    for text in (story(1, 50), "plain words", "日本語"):
        ids = one_by_one(ours, text)
        assert [ours.token(id) for id in ids] == theirs.encode(text).tokens and min(ids) > 3
        assert ours.decode(ids) == text
    (tmp_path / "tokenizer.json").write_bytes(ours.data)
    assert load_tokenizer("bpe", tmp_path / "tokenizer.json").encode(["sea"])[0].tolist() == one_by_one(ours, "sea")
    assert read_tokenizer(tmp_path / "tokenizer.json").data == ours.data, "what follows the contract stays as it is"


def test_tokens_that_a_converted_file_marks_as_unknown_stay_unknown(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_gpt2_files(tmp_path / "gpt2", 30))
    again = given(tmp_path, tokenizer.data.decode())
    assert again.data == tokenizer.data and again.vocab_size == tokenizer.vocab_size
    assert 3 in one_by_one(again, story(1, 200))


def test_bytes_that_the_vocabulary_lacks_become_unknown_tokens_and_are_not_lost(tmp_path: Path) -> None:
    tokenizer = given(tmp_path, recipe_json(alphabet=False))
    assert one_by_one(tokenizer, "\x07\x07") == [3, 3]


def test_dropout_of_a_given_file_is_switched_off(tmp_path: Path) -> None:
    values = recipe_json(("<s>", "<pad>", "</s>", "<unk>"))
    values["model"] |= {"dropout": 0.5, "vocab": values["model"]["vocab"] | {"<mask>": 500}}
    tokenizer = given(tmp_path, values)
    assert len({tuple(one_by_one(tokenizer, story(1, 50))) for _ in range(9)}) == 1


def changed(**changes: Any) -> dict[str, Any]:
    values = recipe_json()
    values["model"] |= changes.pop("model", {})
    return values | changes


UNIGRAM = {"type": "Unigram", "unk_id": 4, "vocab": [[name, -1.0] for name in ("<mask>", *RECIPE[:4], "a")]}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "", "expected a tokenizer.json, found none"),
        (lambda: "[" * 100_000, "expected a tokenizer.json, found none"),
        (lambda: changed(model={"vocab": {}, "merges": []}), "expected tokens besides the special ones"),
        (lambda: changed(model={"vocab": dict.fromkeys(recipe_json()["model"]["vocab"], 7)}), "tokens with 1 ids"),
        (lambda: changed(model={"unk_token": "[UNK]"}), r"found .*'\[UNK\]'"),
        (
            lambda: changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "found none: Precompiled",  # a panic, which is no Exception
        ),
        (lambda: changed(model=UNIGRAM | {"merges": []}), "a Unigram cannot be renumbered"),
        (lambda: changed(model=UNIGRAM | {"unk_id": None}), "found none: Encountered an unknown token"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_named(tmp_path: Path, make: Callable[[], Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"given.json: .*{expected}"):
        given(tmp_path, make())


def test_an_id_that_no_vocabulary_has_is_refused(tmp_path: Path) -> None:
    values = recipe_json(("<s>", "<pad>", "</s>", "<unk>"))
    values["model"]["vocab"]["<mask>"] = 4_000_000_000
    with pytest.raises(ConfigError, match="given.json: expected the ids of RoBERTa"):
        given(tmp_path, values)


def test_a_library_that_fails_on_one_text_is_an_error_of_the_file(tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = given(tmp_path, changed(pre_tokenizer=pattern))
    with pytest.raises(ConfigError, match="given.json: the tokenizer fails on a text: Onig"):
        tokenizer.encode(["a" * 40 + "b"])


def pieces_only(data: bytes) -> bytes:
    """A sentencepiece model cut off behind its pieces, without the one that names bytes."""
    end = data.index(b"\x12", data.index("▁".encode()) + 1)
    return data[:end]


@pytest.mark.parametrize("cut", [lambda data: b"", lambda data: data[:500], lambda data: bytes(500), pieces_only])
def test_a_sentencepiece_model_that_is_not_whole_is_named(tmp_path: Path, cut: Callable[[bytes], bytes]) -> None:
    (tmp_path / "given.model").write_bytes(cut(foreign_model()))
    with pytest.raises(ConfigError, match=r"given.model: expected a (whole )?sentencepiece model, found"):
        read_tokenizer(tmp_path / "given.model")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("encoder.json", '{"a": [1]}', "expected a whole number for each token"),
        ("encoder.json", '{"a": 1, "b": 1}', "expected one id for each token"),
        ("encoder.json", '{"a": ' + "1" * 5000 + "}", "expected JSON"),
        ("dict.txt", "9" * 5000 + " 1", "line 1: expected '<id of encoder.json>"),
        ("dict.txt", b"\xff 1", "expected UTF-8"),
        ("vocab.bpe", "a b c", "line 1: expected two tokens"),
    ],
)
def test_gpt2_files_that_contradict_each_other_are_named(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    folder = write_gpt2_files(tmp_path / "gpt2")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"{name}.*{expected}"):
        read_tokenizer(folder)


def test_a_token_of_gpt2_that_is_a_special_one_is_refused(tmp_path: Path) -> None:
    folder = write_gpt2_files(tmp_path / "gpt2")
    encoder = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(encoder | {"<pad>": 9999}))
    with pytest.raises(ConfigError, match="expected each token once, found '<pad>'"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["given.json", "given.model"])
def test_a_fifo_or_an_endless_file_given_as_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="expected a file, found a FIFO"):
        read_tokenizer(tmp_path / name)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(TOKENIZER_BYTES + 1)
    with pytest.raises(ConfigError, match="expected at most"):
        read_tokenizer(tmp_path / name)
