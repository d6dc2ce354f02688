"""Byte-pair tokenizers of others as one ``tokenizer.json`` with the ids of the contract: any such file, GPT-2's files.

The contract (`d2v2ds.modalities.text.tokenizers`): ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, the other tokens,
``<mask>`` last. Trainers number as they are told: after the usual recipe ``<mask>`` is 4, and all words lie behind it.
"""

import json
from pathlib import Path
from typing import Any

from d2v2ds.errors import ConfigError
from d2v2ds.io.read import parse_json
from d2v2ds.modalities.text.tokenizers import (
    MASK_NAME,
    SPECIAL_NAMES,
    library_faults,
    tokenizer_model,
    tokenizers_library,
)

GPT2_FILES = ("encoder.json", "vocab.bpe", "dict.txt")
NO_TOKENS_BEHIND = "<tokens behind this one are unknown>"
"""Token behind ``<mask>`` of a file converted here, in front of what merges need but the dictionary does not know."""
_MOST_DIGITS = 10
"""Digits of an id that are read; Python refuses numbers of thousands."""
_UNKNOWN = SPECIAL_NAMES[3]


def contract_json(data: bytes, place: str) -> bytes:
    """A ``tokenizer.json`` whose ids follow the contract: the same bytes if they do, else with the tokens renumbered.

    The five special tokens get their ids, all others keep their order. What the vocabulary lacks becomes ``<unk>``,
    where the library would leave it out; text is encoded the same way each time.

    Args:
        data: the file.
        place: how messages call it.

    Raises:
        ConfigError: it is no such file, lacks one of the special tokens, or cannot be renumbered.
    """
    library = tokenizer_model(data, place)
    values = parse_json(data, place, ConfigError)
    ids: dict[str, int] = library.get_vocab(with_added_tokens=True)
    specials = (*SPECIAL_NAMES, MASK_NAME)
    model = values["model"]
    unknown = _unknown_name(model)
    found = {name: ids.get(name) for name in specials}
    if None in found.values() or unknown not in (None, _UNKNOWN):
        raise ConfigError(
            f"{place}: expected the special tokens of RoBERTa ({', '.join(specials)}) and {_UNKNOWN} for unknown text, "
            f"found {found} and {unknown!r}; GPT-2's own files are converted by python -m preprocessing.pack_text"
        )
    if not len(specials) < len(ids) == len(set(ids.values())):
        raise ConfigError(
            f"{place}: expected tokens besides the special ones, each with an id of its own, found {len(ids):,} tokens "
            f"with {len(set(ids.values())):,} ids"
        )
    changes: dict[str, Any] = {"dropout": None} if model.get("dropout") else {}
    if model.get("type", "BPE") == "BPE" and unknown is None and not _encodes_all_bytes(values, ids):
        changes["unk_token"] = _UNKNOWN
    others = sorted(ids.keys() - {*specials}, key=ids.__getitem__)
    behind = [token for token in others if ids[token] > ids[MASK_NAME]]
    is_in_order = [ids[name] for name in SPECIAL_NAMES] == list(range(len(SPECIAL_NAMES)))
    is_in_order = is_in_order and behind[:1] in ([], [NO_TOKENS_BEHIND])
    if is_in_order and not changes:
        return data
    if not isinstance(model.get("vocab"), dict):
        raise ConfigError(
            f"{place}: expected the ids of RoBERTa (<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last), found "
            f"{found}, and a {model.get('type')} cannot be renumbered; give the "
            "sentencepiece .model that it was made from"
        )
    unknown_tokens = behind if is_in_order else []
    known = others[: len(others) - len(unknown_tokens)]
    new = {token: id for id, token in enumerate((*SPECIAL_NAMES, *known, MASK_NAME, *unknown_tokens))}
    added = [one | {"id": new[one["content"]]} for one in values.get("added_tokens", ()) if one["content"] in new]
    return _dumped(
        values
        | {"model": model | changes | {"vocab": new}, "added_tokens": sorted(added, key=lambda one: one["id"])}
        | dict.fromkeys(("post_processor", "truncation", "padding"))  # they name ids, and none of them is used
    )


def _unknown_name(model: dict[str, Any]) -> str | None:
    """Return the token that a model uses for text that it does not know; None for none."""
    if isinstance(model.get("unk_id"), int):  # of Unigram
        return str(model["vocab"][model["unk_id"]][0])
    name: str | None = model.get("unk_token")
    return name


def _encodes_all_bytes(values: dict[str, Any], ids: dict[str, int]) -> bool:
    """Return True if texts are read as bytes and the vocabulary has all 256 of them."""
    is_byte_level = '"ByteLevel"' in json.dumps([values.get("pre_tokenizer"), values.get("normalizer")])
    return is_byte_level and ids.keys() >= set(tokenizers_library().pre_tokenizers.ByteLevel.alphabet())


def _dumped(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode()


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
    tokenizers = tokenizers_library()
    token_of = _tokens_by_id(encoder, place / GPT2_FILES[0])
    vocabulary = {name: id for id, name in enumerate(SPECIAL_NAMES)}
    for number, line in enumerate(dictionary.splitlines()):
        name = line.split(" ")[0]
        token = token_of.pop(int(name[:_MOST_DIGITS]), None) if name.isdecimal() else name
        if token is None or token in vocabulary or len(line.split(" ")) < 2:
            raise ConfigError(
                f"{place / GPT2_FILES[2]} line {number + 1}: expected '<id of {GPT2_FILES[0]}> <count>', each id once, "
                f"found {line!r:.60}"
            )
        vocabulary[token] = len(vocabulary)
    behind = [NO_TOKENS_BEHIND, *(token_of[id] for id in sorted(token_of))] if token_of else []
    for token in (MASK_NAME, *behind):
        if token in vocabulary:
            raise ConfigError(f"{place}: expected each token once, found {token!r} in {GPT2_FILES[2]} or as a special")
        vocabulary[token] = len(vocabulary)
    pairs = _pairs(merges, vocabulary, place / GPT2_FILES[1])
    with library_faults(str(place), "these files make no tokenizer"):
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.add_special_tokens([*SPECIAL_NAMES, MASK_NAME])
        text: str = model.to_str()
    return text.encode()


def _tokens_by_id(encoder: str, place: Path) -> dict[int, str]:
    """Return the tokens of ``encoder.json`` by GPT-2's id."""
    values = parse_json(encoder.encode(), place, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(values).__name__}")
    if odd := [(token, id) for token, id in values.items() if type(id) is not int or id < 0]:
        raise ConfigError(f"{place}: expected a whole number for each token, found {odd[0][1]!r:.40} for {odd[0][0]!r}")
    tokens = {id: token for token, id in values.items()}
    if len(tokens) < len(values):
        raise ConfigError(f"{place}: expected one id for each token, found {len(tokens)} ids of {len(values)} tokens")
    return tokens


def _pairs(merges: str, vocabulary: dict[str, int], place: Path) -> list[tuple[str, str]]:
    """Return the pairs of ``vocab.bpe``, all of whose tokens are in the vocabulary."""
    pairs = []
    for number, line in enumerate(merges.splitlines(), start=1):
        if line.startswith("#version") or not line:
            continue
        first, _, second = line.partition(" ")
        if not {first, second, first + second} <= vocabulary.keys():
            raise ConfigError(
                f"{place} line {number}: expected two tokens of {GPT2_FILES[0]} whose union is one, found {line!r:.60}"
            )
        pairs.append((first, second))
    return pairs
