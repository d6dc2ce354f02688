"""GPT-2's byte-level byte-pair encoding, slow and obvious, with the ids of a fairseq dictionary.

Words by character classes, bytes as printable characters, and the best-ranked pair merged again and again: written from
the description of the method (arXiv 1909 05858, section 2.2 of the GPT-2 report, and fairseq's dictionary order).
"""

import unicodedata
from collections.abc import Sequence


def byte_characters() -> dict[int, str]:
    """How the vocabulary writes each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def words(text: str) -> list[str]:
    """GPT-2's split: contractions; a space with letters, numbers or signs; white space, less the last before a word."""
    found, at = [], 0
    while at < len(text):
        contraction = next(
            (end for end in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(end, at)), ""
        )
        if contraction:
            found.append(contraction)
            at += len(contraction)
            continue
        begin = at + 1 if text[at] == " " and at + 1 < len(text) and _class(text[at + 1]) != "white" else at
        kind, end = _class(text[begin]), begin
        while end < len(text) and _class(text[end]) == kind:
            end += 1
        if kind == "white" and end < len(text) and end - begin > 1:
            end -= 1
        found.append(text[at:end])
        at = end
    return found


def _class(character: str) -> str:
    if character.isspace():
        return "white"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "sign")


def encode(text: str, merges: Sequence[tuple[str, str]], ids: dict[str, int], unknown: int) -> list[int]:
    """Ids of a text."""
    rank = {pair: number for number, pair in enumerate(merges)}
    table, found = byte_characters(), []
    for word in words(text):
        parts = [table[byte] for byte in word.encode()]
        while True:
            pairs = [(rank[pair], at) for at, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in rank]
            if not pairs:
                break
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found.extend(ids.get(part, unknown) for part in parts)
    return found


def fairseq_ids(encoder: dict[str, int], dictionary: str) -> dict[str, int]:
    """Token to id: the number of its line in ``dict.txt``, behind four specials."""
    by_number = {str(number): token for token, number in encoder.items()}
    lines = [line.split()[0] for line in dictionary.splitlines()]
    return {by_number[name]: 4 + at for at, name in enumerate(lines) if name in by_number}
