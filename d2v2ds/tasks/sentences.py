"""One or two sentences as one sequence of tokens."""

from collections.abc import Sequence

from d2v2ds.shapes import PAD_ID

START_ID = 0
"""`<s>` of the official dictionaries."""
END_ID = 2
"""`</s>`."""
assert PAD_ID == 1


def join_sentences(first: Sequence[int], second: Sequence[int] | None = None) -> list[int]:
    """Join token ids without special ones: `<s> A </s>`, or `<s> A </s> </s> B </s>`."""
    joined = [START_ID, *first, END_ID]
    return joined if second is None else [*joined, END_ID, *second, END_ID]
