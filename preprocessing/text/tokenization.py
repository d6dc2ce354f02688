"""Makes the tokenizers of text shards: trains sentencepiece here, reads one that is given (`byte_pairs` renumbers it).

What they obey and how they encode: `d2v2ds.modalities.text.tokenizers`. One process uses one core: the packer has a
process per core.
"""

import errno
import functools
import re
import struct
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io.machine_faults import ADVICE, is_out_of_memory, reading_error
from d2v2ds.io.read import read_bytes, read_text
from d2v2ds.modalities.text.shards import TOKEN_DTYPES
from d2v2ds.modalities.text.tokenizers import (
    BOS,
    EOS,
    MASK_NAME,
    PAD,
    SPECIAL_NAMES,
    TOKENIZER_BYTES,
    UNK,
    BytePairTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    sentencepiece_library,
)
from preprocessing.text.byte_pairs import GPT2_FILES, contract_json, gpt2_tokenizer_json
from preprocessing.text.read import piece_end

Normalization = Literal["nmt_nfkc", "identity"]
NORMALIZATIONS: tuple[Normalization, ...] = ("nmt_nfkc", "identity")

_SENTENCE_CHARS = 16 << 10
"""Longer documents are given to the trainer in pieces; it reads words, so nothing changes."""
_CONTROL = 3
"""Type of a piece that no text is encoded to, in sentencepiece's model.proto."""


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that a user gives; a process reads it once.

    Args:
        path: a sentencepiece ``.model``, a ``tokenizer.json`` of the library `tokenizers`, or a folder with GPT-2's
            ``encoder.json`` and ``vocab.bpe`` and fairseq's ``dict.txt``. Ids that are not those of the contract are
            renumbered.

    Raises:
        ConfigError: if it is none of these, or its ids do not follow the contract and cannot be made to.
        MachineError: the machine failed to read it.
    """
    files = [path / name for name in GPT2_FILES] if path.is_dir() else [path]
    try:
        changed = tuple(file.stat().st_mtime_ns for file in files)
    except OSError as error:
        what = f"a sentencepiece .model, a tokenizer.json, or a folder with {', '.join(GPT2_FILES)}"
        raise reading_error(
            f"--tokenizer {path}: expected {what}; found: {error.filename}", error, ConfigError
        ) from error
    return _given(path, changed)


@functools.lru_cache(maxsize=1)
def _given(path: Path, changed_ns: tuple[int, ...]) -> Tokenizer:
    place = f"--tokenizer {path}"
    if path.is_dir():
        encoder, merges, dictionary = (read_text(path / name, ConfigError, TOKENIZER_BYTES) for name in GPT2_FILES)
        return BytePairTokenizer(gpt2_tokenizer_json(encoder, merges, dictionary, path), place)
    data = read_bytes(path, ConfigError, TOKENIZER_BYTES)
    if path.suffix == ".json":
        return BytePairTokenizer(contract_json(data, place), place)
    return SentencePieceTokenizer(data, place)


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
        MachineError: if memory runs out.
    """
    keeps_all = normalization == "identity"
    model = BytesIO()
    try:
        sentencepiece_library().SentencePieceTrainer.train(
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
        if is_out_of_memory(error):
            raise MachineError(f"--train-tokenizer: {error}; {ADVICE[errno.ENOMEM]}") from error
        most = re.search(r"<= (\d+)", str(error))  # it was asked for one less: ``<mask>`` comes last
        advice = f"; --vocab-size {int(most[1]) + 1} is possible" if most else ""
        if "sentences_.empty()" in str(error):
            advice = "; the input holds no text"
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
