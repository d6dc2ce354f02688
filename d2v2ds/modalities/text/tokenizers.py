"""Tokenizers of text: a sentencepiece model, or the byte-pair encoding of GPT-2 and RoBERTa. NumPy only, no torch.

All use the ids of the official text models: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, and
``<mask>`` as the last id; `encode` adds none of these. `preprocessing.text.tokenization` trains and converts them.
A tokenizer may come from a stranger: whatever its library raises becomes a `ConfigError` that names the file.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2v2ds.errors import ConfigError, D2V2Error, MissingExtraError
from d2v2ds.io.machine_faults import reading_error
from d2v2ds.io.read import read_bytes
from d2v2ds.shapes import PAD_ID

BOS, PAD, EOS, UNK = 0, PAD_ID, 2, 3
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")
MASK_NAME = "<mask>"
TOKENIZER_BYTES = 256 << 20
"""Largest file of a tokenizer; those of 250,000 tokens have 20 MB."""
MOST_IDS = 1 << 24
"""Largest vocabulary; the id of a token is a number in a file, and sizes the embedding."""

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
        """Text of an id as the tokenizer itself writes it."""
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
        sentencepiece = sentencepiece_library()
        self._place = place
        if not data:
            raise ConfigError(f"{place}: expected a sentencepiece model, found an empty file")
        with library_faults(place, "expected a sentencepiece model, found none"):
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            count = self._model.vocab_size()
        if not {_TRAINER_SPEC, _NORMALIZER_SPEC} <= _protobuf_fields(data):
            raise ConfigError(
                f"{place}: expected a whole sentencepiece model, found one without settings or normalizer: it was cut "
                "off, fetch it again"
            )
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
        with library_faults(self._place, "the tokenizer fails on a text"):
            views = [memoryview(part) for part in self._encode_each(texts)]
        lengths = np.fromiter(map(len, views), dtype=np.int64, count=len(views))
        ids: Ids = np.frombuffer(bytearray().join(views), dtype=np.int32)
        return ids if self._to_ours is None else self._to_ours[ids], lengths

    def _encode_each(self, texts: list[str]) -> list[Any]:
        """Ids of each text as a buffer of int32.

        Inside the library, before it wraps every buffer into an array: a sixth of its time where documents are short.
        """
        sampling = (False, -1, 0.1)
        try:
            parts = self._model._processor._EncodeAsBufferBatch(texts, 1, None, *sampling, False, False, False)
        except (AttributeError, TypeError):  # another version of the library
            parts = self._model.encode(texts, return_type="numpy", num_threads=1)
        return list(parts)

    def decode(self, ids: Sequence[int]) -> str:
        theirs = [self._to_theirs[id] for id in map(int, ids) if id in self._to_theirs]
        text: str = self._model.decode(theirs)
        return text

    def token(self, id: int) -> str:
        return _special_name(id, self.vocab_size) or str(self._model.id_to_piece(self._to_theirs[id]))


class BytePairTokenizer:
    """A byte-level byte-pair encoding in the ``tokenizer.json`` of the `tokenizers` library.

    Special tokens that happen to be written in the text are encoded as the characters they are, as fairseq does.
    Ids behind ``<mask>`` (GPT-2 tokens that the dictionary lacks) become ``<unk>``; files of other producers, in which
    they are tokens like others, are renumbered by `preprocessing.text.tokenization` before they are used.

    Raises:
        ConfigError: if the data is no tokenizer, or its special tokens have other ids than the contract's.
    """

    kind = "bpe"
    library = "tokenizers"
    file_name = "tokenizer.json"

    def __init__(self, data: bytes, place: str = "tokenizer.json") -> None:
        self._model = tokenizer_model(data, place)
        self._place = place
        self.data = data
        found = [self._model.token_to_id(name) for name in SPECIAL_NAMES]
        mask = self._model.token_to_id(MASK_NAME)
        if found != [BOS, PAD, EOS, UNK] or mask is None or not UNK < mask < MOST_IDS:
            ids = dict(zip((*SPECIAL_NAMES, MASK_NAME), (*found, mask), strict=True))
            raise ConfigError(
                f"{place}: expected the ids of RoBERTa (<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last), found {ids}; "
                "GPT-2's own files are converted by python -m preprocessing.pack_text"
            )
        self.vocab_size: int = mask + 1
        self._may_be_unknown = self._model.get_vocab_size() > self.vocab_size

    def encode(self, texts: list[str]) -> tuple[Ids, NDArray[np.int64]]:
        with library_faults(self._place, "the tokenizer fails on a text"):
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


def load_tokenizer(kind: str, path: Path) -> Tokenizer:
    """The tokenizer of a shard folder; a process loads it once.

    Args:
        kind: `Index.format`'s `tokenizer`.
        path: the file.

    Raises:
        ConfigError: it is absent, no file, or no tokenizer of this kind.
        MachineError: the machine failed to read it.
    """
    try:
        changed_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise reading_error(path, error, ConfigError) from error
    return _loaded(kind, path, changed_ns)


@functools.lru_cache(maxsize=1)
def _loaded(kind: str, path: Path, changed_ns: int) -> Tokenizer:
    if kind not in TOKENIZERS:
        raise ConfigError(f"{path}: expected a tokenizer of kind {' or '.join(TOKENIZERS)}, found {kind!r}")
    return TOKENIZERS[kind](read_bytes(path, ConfigError, TOKENIZER_BYTES), str(path))


def tokenizer_model(data: bytes, place: str) -> Any:
    """Return a `tokenizers.Tokenizer` from a ``tokenizer.json``, set to encode all of a text as text.

    Raises:
        ConfigError: it is none, or it fails on the first text.
    """
    tokenizers = tokenizers_library()
    with library_faults(place, "expected a tokenizer.json, found none"):
        model = tokenizers.Tokenizer.from_str(data.decode())
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        model.encode_batch_fast(["A text."], add_special_tokens=False)  # some damage shows here only
    return model


@contextmanager
def library_faults(place: str, what: str) -> Iterator[None]:
    """Raise a `ConfigError` for whatever the library of a tokenizer raises.

    Args:
        place: file of the tokenizer.
        what: went wrong, for the message.
    """
    try:
        yield
    except D2V2Error:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise  # Ctrl-C
        said = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{place}: {what}: {said[0]}") from error


_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
"""Fields of sentencepiece's model.proto behind the pieces; every trainer writes them."""
_PANICS = "pyo3_runtime"
"""Module of the exception that a panic of Rust becomes; it is no `Exception`."""


def _protobuf_fields(data: bytes) -> set[int]:
    """Return the numbers of the outermost fields of a serialised model, which a library has parsed."""
    found, at = set(), 0
    while at < len(data):
        key, at = _varint(data, at)
        found.add(key >> 3)
        length, at = _varint(data, at) if key & 7 == 2 else (len(data), at)  # sentencepiece writes no other kind here
        at += length
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            break
    return value, at


def _special_name(id: int, vocab_size: int) -> str | None:
    return {**dict(enumerate(SPECIAL_NAMES)), vocab_size - 1: MASK_NAME}.get(id)


def sentencepiece_library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingExtraError("sentencepiece tokenizers need sentencepiece", "text") from error
    return sentencepiece


def tokenizers_library() -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process; the packer has a process for each
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("byte-pair tokenizers need tokenizers", "text") from error
    return tokenizers
