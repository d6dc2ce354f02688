"""Masks of whole inputs: masked tokens stay in the sequence, as in data2vec 1.0 (arXiv 2202.03555).

In: settings, the token counts of the rows, sample ids and the epoch. Out: (B, T) bool, True = masked. Rows differ in
their number of masked tokens. Needs numpy only. Every row is a pure function of (seed, epoch, sample id).

Source: `compute_mask_indices` of the official fairseq/data/data_utils.py for speech, the dataset of its masked language
model for text, and the block sampler of BEiT (arXiv 2106.08254, algorithm 1) for images.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.bounds import Bounds, Count, Share
from d2v2ds.masking import Spans, mark_spans, uniforms
from d2v2ds.rng import Stream, hash64

_TRIES = 10
"""Blocks that are drawn before a row of `GridBlocks` ends early."""


@dataclass(frozen=True, kw_only=True)
class SpanWholeMask:
    """Spans of tokens at random, different starts. They overlap, so that fewer tokens are masked."""

    kind: Literal["spans"] = "spans"
    fraction: Annotated[float, Bounds(gt=0, lt=1)]
    """Number of spans times their length, over the tokens."""
    length: Count
    """Tokens of a span."""
    starts_anywhere: bool = False
    """True: a span may begin at any token and is cut at the end, and a short row may get none (text). False: spans are
    whole, at least one (speech)."""

    @property
    def is_for_grids(self) -> bool:
        """True if masks are made for a grid of tokens."""
        return False

    @property
    def is_for_sequences(self) -> bool:
        """True if masks are made for a sequence of tokens."""
        return True

    def check(self) -> list[str]:
        """Return nothing: all settings fit each other."""
        return []

    def fault(self, num_tokens: int) -> str:
        """Return why rows of T tokens cannot be masked; empty if they can."""
        if self.starts_anywhere or num_tokens > self.length:
            return ""
        return f"{num_tokens} tokens cannot hold a span of {self.length}; use longer inputs or a smaller length"

    def expected(self, num_tokens: int) -> float:
        """Return the mean number of masked tokens of a row of T tokens, borders left aside."""
        spans = self.fraction * num_tokens / self.length
        return num_tokens * (1.0 - (1.0 - min(spans / num_tokens, 1.0)) ** self.length)


@dataclass(frozen=True, kw_only=True)
class GridBlocks:
    """Rectangles of a square grid, until enough cells are masked or ten rectangles in turn do not fit."""

    kind: Literal["grid_blocks"] = "grid_blocks"
    count: Count
    """Masked cells; a row may end with fewer."""
    least: Count = 16
    """Smallest area of a rectangle (cells), before it is cut to whole cells."""
    most: Count | None = None
    """Largest area of a rectangle; None: the cells that are still to be masked."""
    least_aspect: Share = 0.3
    """Smallest height over width; the largest is its inverse."""

    @property
    def is_for_grids(self) -> bool:
        """True if masks are made for a grid of tokens."""
        return True

    @property
    def is_for_sequences(self) -> bool:
        """True if masks are made for a sequence of tokens."""
        return False

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = []
        if self.most is not None and self.most < self.least:
            problems.append(f"mask: most {self.most} is below least {self.least}")
        if self.least_aspect <= 0.0:
            problems.append(f"mask: least_aspect is {self.least_aspect}, expected above 0")
        return problems

    def fault(self, num_tokens: int) -> str:
        """Return why images of T patches cannot be masked; empty if they can."""
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            return f"grid_blocks need a square grid, found {num_tokens} tokens"
        if self.count >= num_tokens:
            return f"count {self.count} leaves none of {num_tokens} tokens visible"
        return ""

    def expected(self, num_tokens: int) -> float:
        """Return the number of masked tokens of a row, at most."""
        return float(self.count)


WholeMask = SpanWholeMask | GridBlocks
"""Masks of whole inputs; `kind` chooses."""


def draw_whole_masks(
    config: WholeMask, lengths: NDArray[np.int64], *, seed: int, epoch: int, sample_ids: ArrayLike
) -> NDArray[np.bool_]:
    """Draw one mask for each row.

    Differs from the official code: each row has its own random numbers and keeps its own count. The official code for
    speech leaves masks unseeded, and unmasks tokens until all rows of a batch have the fewest that one of them has.

    Args:
        config: settings.
        lengths: (B,) tokens of each row.
        seed: of the run.
        epoch: of these samples.
        sample_ids: (B,) row numbers.

    Returns:
        (B, T) bool, True = masked, T the greatest length; nothing behind a row's length.
    """
    ids, num_tokens = np.asarray(sample_ids, dtype=np.int64), int(lengths.max())
    marked = np.zeros((len(ids), num_tokens), dtype=bool)
    if isinstance(config, GridBlocks):
        for row, length, key in zip(marked, lengths.tolist(), hash64(seed, epoch, Stream.MASK, ids), strict=True):
            mark_blocks(row[:length], config, np.random.default_rng(int(key)))
        return marked
    numbers = uniforms(seed=seed, epoch=epoch, sample_ids=ids, num_masks=1, num_draws=num_tokens + 2)[:, 0]
    spans, least = Spans(fraction=config.fraction, length=config.length), int(not config.starts_anywhere)
    for row, length, own in zip(marked, lengths.tolist(), numbers, strict=True):
        mark_spans(row[:length], spans, own, least, starts_anywhere=config.starts_anywhere)
    return marked


def mark_blocks(row: NDArray[np.bool_], config: GridBlocks, generator: np.random.Generator) -> None:
    """Mark rectangles on the cells of a square grid, in place.

    A rectangle is accepted if it adds at least one cell and no more than are still to be masked.

    Args:
        row: (T,) bool, cells row by row.
        config: settings.
        generator: of this row.
    """
    side = math.isqrt(len(row))
    grid, spread = row.reshape(side, side), -math.log(config.least_aspect)
    count = 0
    while count < config.count:
        wanted = config.count - count
        most = wanted if config.most is None else min(wanted, config.most)
        added = next(
            (n for _ in range(_TRIES) if (n := _try_block(grid, config.least, most, wanted, spread, generator))), 0
        )
        if not added:
            return
        count += added


def _try_block(
    grid: NDArray[np.bool_], least: int, most: int, wanted: int, spread: float, generator: np.random.Generator
) -> int:
    """Draw one rectangle; mark it if it fits. Returns the cells it adds."""
    area = least + (most - least) * generator.random()
    aspect = math.exp(spread * (2 * generator.random() - 1))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    side = len(grid)
    if not (height < side and width < side):
        return 0
    top, left = (int(generator.integers(0, side - size, endpoint=True)) for size in (height, width))
    block = grid[top : top + height, left : left + width]
    new = int(block.size - np.count_nonzero(block))
    if not 0 < new <= wanted:
        return 0
    block[:] = True
    return new
