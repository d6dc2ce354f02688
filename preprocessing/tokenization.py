"""Tokenizers of text shards: sentencepiece, trained here or given, and the byte-pair encoding of GPT-2 and RoBERTa.

All of them obey the model's contract (spec section 3.3): ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, and
``<mask>`` as the last id; `encode` adds none of these. One process uses one core: the packer has a process per core.
"""

import functools
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from d2v2ds.data.schema import TOKEN_DTYPES
from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.shapes import PAD_ID
from preprocessing.documents import piece_end

BOS, PAD, EOS, UNK = 0, PAD_ID, 2, 3
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")
MASK_NAME = "<mask>"
Normalization = Literal["nmt_nfkc", "identity"]
NORMALIZATIONS: tuple[Normalization, ...] = ("nmt_nfkc", "identity")
GPT2_FILES = ("encoder.json", "vocab.bpe", "dict.txt")

_SENTENCE_CHARS = 16 << 10
"""Longer documents are given to the trainer in pieces; it reads words, so nothing changes."""
_CONTROL = 3
"""Type of a piece that no text is encoded to, in sentencepiece's model.proto."""

Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    """A key of `TOKENIZERS`."""
    library: str
    """The package that does the work."""
    file_name: str
    """Under which it lies in a shard folder."""
    data: bytes
    """The file's contents."""
    vocab_size: int
    """Ids are below it; `vocab_size` - 1 is ``<mask>``."""

    def encode(self, texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of all texts, one after the other, and the number of ids of each; no special ids are added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ids are left out."""
        ...

    def token(self, id: int) -> str:
        """How the tokenizer itself writes an id."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model of any id order.

    Ids follow fairseq's dictionary: the four specials, then the model's other pieces in their order, ``<mask>`` last.
    A model that has this order itself (those trained here have) is used as it is, any other is renumbered.

    Raises:
        ConfigError: if the data is no sentencepiece model.
    """

    kind = library = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, data: bytes, place: str = "tokenizer.model") -> None:
        sentencepiece = _sentencepiece()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            count = self._model.vocab_size()
        except RuntimeError as error:
            raise ConfigError(f"{place}: expected a sentencepiece model, found none: {error}") from error
        self.data = data
        own = [self._model.bos_id(), self._model.pad_id(), self._model.eos_id(), self._model.unk_id()]
        mask = self._model.piece_to_id(MASK_NAME)
        own.append(mask if self._model.id_to_piece(mask) == MASK_NAME else -1)
        others = np.setdiff1d(np.arange(count), own)
        self.vocab_size = len(SPECIAL_NAMES) + len(others) + 1
        to_ours = np.full(count, UNK, dtype=np.int32)
        to_ours[others] = len(SPECIAL_NAMES) + np.arange(len(others))
        for ours, theirs in zip((BOS, PAD, EOS, UNK, self.vocab_size - 1), own, strict=True):
            if theirs >= 0:
                to_ours[theirs] = ours
        self._to_ours = None if np.array_equal(to_ours, np.arange(count)) else to_ours
        self._to_theirs = dict(
            zip((len(SPECIAL_NAMES) + np.arange(len(others))).tolist(), others.tolist(), strict=True)
        )

    def encode(self, texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        parts: list[Ids] = self._model.encode(texts, return_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        ids: Ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return ids if self._to_ours is None else self._to_ours[ids], lengths

    def decode(self, ids: Sequence[int]) -> str:
        theirs = [self._to_theirs[id] for id in map(int, ids) if id in self._to_theirs]
        text: str = self._model.decode(theirs)
        return text

    def token(self, id: int) -> str:
        return _special_name(id, self.vocab_size) or str(self._model.id_to_piece(self._to_theirs[id]))


class BytePairTokenizer:
    """A byte-level byte-pair encoding in the ``tokenizer.json`` of the `tokenizers` library.

    Special tokens that happen to be written in the text are encoded as the characters they are, as fairseq does.
    Ids behind ``<mask>`` (GPT-2 tokens that the dictionary lacks) become ``<unk>``.

    Raises:
        ConfigError: if the data is no tokenizer, or its special tokens have other ids than the contract's.
    """

    kind = "bpe"
    library = "tokenizers"
    file_name = "tokenizer.json"

    def __init__(self, data: bytes, place: str = "tokenizer.json") -> None:
        tokenizers = _tokenizers()
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises no narrower type
            raise ConfigError(f"{place}: expected a tokenizer.json, found none: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.data = data
        found = [self._model.token_to_id(name) for name in SPECIAL_NAMES]
        mask = self._model.token_to_id(MASK_NAME)
        if found != [BOS, PAD, EOS, UNK] or mask is None:
            ids = dict(zip((*SPECIAL_NAMES, MASK_NAME), (*found, mask), strict=True))
            raise ConfigError(
                f"{place}: expected the ids of RoBERTa (<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last), found {ids}; "
                f"for GPT-2's own files give the folder with {', '.join(GPT2_FILES)}"
            )
        self.vocab_size: int = mask + 1
        self._may_be_unknown = self._model.get_vocab_size() > self.vocab_size

    def encode(self, texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        parts = [part.ids for part in self._model.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        ids: Ids = np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=int(lengths.sum()))
        if self._may_be_unknown:
            ids[ids >= self.vocab_size] = UNK
        return ids, lengths

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(id) for id in ids], skip_special_tokens=True)
        return text

    def token(self, id: int) -> str:
        return str(self._model.id_to_token(id))


TOKENIZERS: dict[str, type[SentencePieceTokenizer] | type[BytePairTokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "bpe": BytePairTokenizer,
}


def _special_name(id: int, vocab_size: int) -> str | None:
    return {**dict(enumerate(SPECIAL_NAMES)), vocab_size - 1: MASK_NAME}.get(id)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that a user gives; a process reads it once.

    Args:
        path: a sentencepiece ``.model``, a Hugging Face ``.json`` with RoBERTa's ids, or a folder with GPT-2's
            ``encoder.json`` and ``vocab.bpe`` and fairseq's ``dict.txt``.

    Raises:
        ConfigError: if it is none of these, or its ids do not follow the contract and cannot be made to.
    """
    files = [path / name for name in GPT2_FILES] if path.is_dir() else [path]
    try:
        changed = tuple(file.stat().st_mtime_ns for file in files)
        return _given(path, changed)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--tokenizer {path}: expected a sentencepiece .model, a tokenizer.json, or a folder with "
            f"{', '.join(GPT2_FILES)}; found: {error}"
        ) from error


def load_tokenizer(kind: str, path: Path) -> Tokenizer:
    """The tokenizer of a shard folder; a process loads it once.

    Args:
        kind: `Index.format`'s `tokenizer`.
        path: the file.
    """
    return _loaded(kind, path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _given(path: Path, changed_ns: tuple[int, ...]) -> Tokenizer:
    if path.is_dir():
        encoder, merges, dictionary = ((path / name).read_text(encoding="utf-8") for name in GPT2_FILES)
        return BytePairTokenizer(gpt2_tokenizer_json(encoder, merges, dictionary, path), str(path))
    kind = BytePairTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return kind(path.read_bytes(), f"--tokenizer {path}")


@functools.lru_cache(maxsize=1)
def _loaded(kind: str, path: Path, changed_ns: int) -> Tokenizer:
    return TOKENIZERS[kind](path.read_bytes(), str(path))


# --- GPT-2's files ----------------------------------------------------------------------------------------------------


def gpt2_tokenizer_json(encoder: str, merges: str, dictionary: str, place: Path) -> bytes:
    """GPT-2's byte-pair encoding with the ids of a fairseq dictionary, as one ``tokenizer.json``.

    Args:
        encoder: contents of ``encoder.json``: token -> GPT-2's id.
        merges: contents of ``vocab.bpe``: a version line, then one pair a line.
        dictionary: contents of ``dict.txt``: lines ``GPT-2's id, count``; a token's id is 4 + its line number from 0.
            Names that are no number (``madeupword0000``) hold a place.
        place: how messages name the folder.

    Raises:
        ConfigError: naming file and line of what does not fit.
    """
    tokenizers = _tokenizers()
    token_of = {id: token for token, id in _json_object(encoder, place / GPT2_FILES[0]).items()}
    vocabulary = {name: id for id, name in enumerate(SPECIAL_NAMES)}
    for number, line in enumerate(dictionary.splitlines()):
        name = line.split(" ")[0]
        token = token_of.pop(int(name), None) if name.isdecimal() else name
        if token is None or token in vocabulary or len(line.split(" ")) < 2:
            raise ConfigError(
                f"{place / GPT2_FILES[2]} line {number + 1}: expected '<id of {GPT2_FILES[0]}> <count>', each id once, "
                f"found {line!r:.60}"
            )
        vocabulary[token] = len(vocabulary)
    vocabulary[MASK_NAME] = len(vocabulary)
    for id in sorted(token_of):  # what merges may need on the way, but the dictionary does not know
        vocabulary[token_of[id]] = len(vocabulary)
    pairs = []
    for number, line in enumerate(merges.splitlines(), start=1):
        if line.startswith("#version") or not line:
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ConfigError(
                f"{place / GPT2_FILES[1]} line {number}: expected two tokens of {GPT2_FILES[0]} whose union is one, "
                f"found {line!r:.60}"
            )
        pairs.append(pair)
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([*SPECIAL_NAMES, MASK_NAME])
    text: str = model.to_str()
    return text.encode()


def _json_object(text: str, place: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: expected JSON, found {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(values).__name__}")
    return values


# --- training ---------------------------------------------------------------------------------------------------------


def train_sentencepiece(texts: Iterable[str], vocab_size: int, normalization: Normalization) -> bytes:
    """Train a unigram model; the same texts give the same bytes.

    Args:
        texts: documents.
        vocab_size: ids, specials and ``<mask>`` included.
        normalization: identity keeps every character and all white space, so that decoding gives back the text;
            nmt_nfkc unifies characters (NFKC) and makes every run of white space one space.

    Characters that the vocabulary lacks are encoded as their UTF-8 bytes, so nothing is unknown.

    Raises:
        ConfigError: if the texts do not allow such a vocabulary.
    """
    keeps_all = normalization == "identity"
    model = BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size - 1,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=not keeps_all,
            add_dummy_prefix=not keeps_all,
            allow_whitespace_only_pieces=keeps_all,
            max_sentence_length=8 * _SENTENCE_CHARS,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_piece=SPECIAL_NAMES[BOS],
            pad_piece=SPECIAL_NAMES[PAD],
            eos_piece=SPECIAL_NAMES[EOS],
            unk_piece=SPECIAL_NAMES[UNK],
            num_threads=1,  # sums of several threads would come in any order
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"<= (\d+)", str(error))  # it was asked for one less: ``<mask>`` comes last
        advice = f"; --vocab-size {int(most[1]) + 1} is possible" if most else ""
        raise ConfigError(
            f"--train-tokenizer --vocab-size {vocab_size}: sentencepiece cannot train on this text: {error}{advice}"
        ) from error
    return model.getvalue() + _piece(MASK_NAME, _CONTROL)


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        while len(text) > _SENTENCE_CHARS:
            cut = piece_end(text, _SENTENCE_CHARS)
            yield text[:cut]
            text = text[cut:]
        yield text


def _piece(name: str, kind: int) -> bytes:
    """One more piece for the end of a serialised model: protocol buffers may be joined, lists then go on."""
    encoded = name.encode()
    fields = b"\x0a" + bytes([len(encoded)]) + encoded + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(fields)]) + fields


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of `d2v2ds.data.schema.TOKEN_DTYPES` for ids below `vocab_size`."""
    return next(dtype for dtype in TOKEN_DTYPES.values() if vocab_size - 1 <= np.iinfo(dtype).max)


def special_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Ids by the names that `Index.format` gives them."""
    return {"bos": BOS, "pad": PAD, "eos": EOS, "unk": UNK, "mask": tokenizer.vocab_size - 1}


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingExtraError("sentencepiece tokenizers need sentencepiece: pip install 'd2v2ds[text]'") from error
    return sentencepiece


def _tokenizers() -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; the packer has a process for each
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("byte-pair tokenizers need tokenizers: pip install 'd2v2ds[text]'") from error
    return tokenizers
