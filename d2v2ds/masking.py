"""Masks: exact counts, drawn for many rows at once from counter-based random numbers.

In: the settings of one modality, a token count T, sample ids and the epoch. Out: `masked` (B, M, T) bool and the
visible positions `keep` (B, M, K). Needs numpy only, so that workers and tools can draw masks without torch.

Every number is a pure function of (seed, epoch, sample id, mask index, draw index). A mask therefore does
not depend on the batch around it, on the number of workers or ranks, or on whether the run was resumed.

Sources: arXiv 2212.07525, "Inverse block masking", and the official fairseq/data/data_utils.py.
Differs from the official code: masks are drawn after cropping, for exactly the tokens that the model reads, so that
every row has the same number of masked tokens (the official code crops masks of the whole utterance).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.bounds import Bounds, Count
from d2v2ds.rng import GAMMA, Stream, hash64, mix64, to_unit_interval

MaskKind = Literal["block_1d", "block_2d", "random"]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Settings of one modality's masks."""

    masked_fraction: Annotated[float, Bounds(gt=0, lt=1)]
    """Fraction of tokens masked (strictly between 0 and 1), also for inverse masks."""
    num_masks: Count
    """M, masked versions of each sample in one step (count)."""
    kind: MaskKind = "block_1d"
    """Blocks along the token sequence, square blocks on a grid, or single tokens."""
    block_length: Count = 1
    """Length of a block, or side of a square block (tokens); not used by `random`."""
    adjust: float = 0.0
    """Added to the fraction that sets the number of blocks. The number of masked tokens stays the same: single tokens
    are added to the blocks, or removed, until the count is exact."""
    inverse: bool = False
    """Draw blocks of visible tokens and mask the rest; not used by `random`."""
    columns: Count | None = None
    """Tokens in a row of the grid of `block_2d`, whose rows follow from the number of tokens; None: a square grid."""

    def check(self) -> list[str]:
        """Return a message if the fields together leave no blocks to draw."""
        if self.drawn_fraction + self.adjust < 0.0:
            return [f"adjust {self.adjust} makes the drawn fraction negative ({self.drawn_fraction:g} + adjust)"]
        return []

    def grid_faults(self, columns: int | None) -> list[str]:
        """Return a message if a grid of tokens with so many columns is not that of the blocks.

        Args:
            columns: of the network's grid; None for a sequence, which readers refuse.
        """
        if self.kind != "block_2d" or self.columns is None or columns is None or self.columns == columns:
            return []
        return [f"mask.columns is {self.columns}, the network has {columns} tokens in a row; set it to that"]

    @property
    def is_for_grids(self) -> bool:
        """True if masks can be drawn on a grid of tokens."""
        return self.kind in ("block_2d", "random")

    @property
    def is_for_sequences(self) -> bool:
        """True if masks can be drawn on a sequence of tokens."""
        return self.kind != "block_2d"

    def fault(self, num_tokens: int) -> str:
        """Return why rows of T tokens cannot be masked; empty if they can."""
        try:
            masked_count(self, num_tokens)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def complemented(self) -> bool:
        """True if the sampler chooses the visible tokens and masks the rest."""
        return self.inverse or self.kind == "random"

    @property
    def drawn_fraction(self) -> float:
        """Fraction of tokens that the sampler chooses: masked ones, or visible ones if complemented."""
        return 1 - self.masked_fraction if self.complemented else self.masked_fraction


def masked_count(config: MaskConfig, num_tokens: int) -> int:
    """Return the number of masked tokens in every row of T tokens.

    The product is truncated in floating point as in the official code: 0.8 of 196 masks 157, because the
    kept fraction 1 - 0.8 is just below 0.2.

    Args:
        config: the mask settings.
        num_tokens: T.

    Raises:
        ValueError: if T tokens leave nothing masked or nothing visible, or do not hold one block.
    """
    rows, columns = _grid(config, num_tokens)
    shortest = columns if config.kind == "block_1d" else min(rows, columns)
    if config.kind != "random" and shortest < config.block_length:
        raise ValueError(
            f"{num_tokens} tokens ({rows} x {columns}) cannot hold a block of length {config.block_length}; "
            "use longer inputs or a smaller block_length"
        )
    drawn = int(num_tokens * config.drawn_fraction)
    if not 0 < drawn < num_tokens:
        raise ValueError(
            f"masked_fraction {config.masked_fraction} of {num_tokens} tokens leaves nothing "
            f"{'masked' if (drawn == 0) != config.complemented else 'visible'}; use longer inputs or another fraction"
        )
    return num_tokens - drawn if config.complemented else drawn


def draw_masks(
    config: MaskConfig, num_tokens: int, *, seed: int, epoch: int, sample_ids: ArrayLike
) -> NDArray[np.bool_]:
    """Draw M masks for each sample.

    Args:
        config: the mask settings.
        num_tokens: T, the tokens of every sample in this batch.
        seed: of the run.
        epoch: of these samples.
        sample_ids: (B,) integers, row numbers in the dataset.

    Returns:
        (B, M, T) bool, True = masked; exactly `masked_count(config, T)` in every row.

    Raises:
        ValueError: see `masked_count`.
    """
    masked_count(config, num_tokens)
    numbers = uniforms(
        seed=seed,
        epoch=epoch,
        sample_ids=sample_ids,
        num_masks=config.num_masks,
        num_draws=num_draws(config, num_tokens),
    )
    return masks_from_uniforms(config, num_tokens, numbers)


def masks_from_uniforms(config: MaskConfig, num_tokens: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Compute masks from given random numbers; `kind` chooses the sampler.

    Args:
        config: the mask settings.
        num_tokens: T.
        numbers: (..., num_draws(config, T)) float64 in [0, 1).

    Returns:
        (..., T) bool, True = masked.
    """
    return _SAMPLERS[config.kind](config, num_tokens, numbers)


def block_mask_1d(config: MaskConfig, num_tokens: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Choose blocks along the sequence, then single tokens up to the exact count.

    Arguments and result as `masks_from_uniforms`.
    """
    centres = num_blocks(config, num_tokens)
    chosen = blocks_1d(numbers[..., :centres], num_tokens, config.block_length)  # (..., T)
    chosen = _adjust_count(chosen, int(num_tokens * config.drawn_fraction), numbers[..., centres:])
    return ~chosen if config.inverse else chosen


def block_mask_2d(config: MaskConfig, num_tokens: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Choose square blocks on a grid, then single cells up to the exact count.

    Arguments and result as `masks_from_uniforms`; T = rows * columns, row by row.
    """
    centres = num_blocks(config, num_tokens)
    chosen = blocks_2d(numbers[..., :centres], _grid(config, num_tokens), config.block_length)  # (..., T)
    chosen = _adjust_count(chosen, int(num_tokens * config.drawn_fraction), numbers[..., centres:])
    return ~chosen if config.inverse else chosen


def random_mask(config: MaskConfig, num_tokens: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Choose single tokens; every subset of the right size is equally likely.

    Arguments and result as `masks_from_uniforms`.
    """
    nothing = np.zeros((*numbers.shape[:-1], num_tokens), dtype=bool)
    return ~_adjust_count(nothing, int(num_tokens * config.drawn_fraction), numbers)


_SAMPLERS = {"block_1d": block_mask_1d, "block_2d": block_mask_2d, "random": random_mask}


def visible_positions(masked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the positions of the visible tokens, ascending.

    Args:
        masked: (B, M, T) bool with the same number of masked tokens in every row.

    Returns:
        (B, M, K) int64.
    """
    num_visible = masked.shape[-1] - int(np.count_nonzero(masked[0, 0]))
    return np.nonzero(~masked)[-1].reshape(*masked.shape[:-1], num_visible)


def num_blocks(config: MaskConfig, num_tokens: int) -> int:
    """Number of blocks drawn for each row; they may overlap."""
    if config.kind == "random":
        return 0
    tokens_per_block = config.block_length**2 if config.kind == "block_2d" else config.block_length
    return int(num_tokens * (config.drawn_fraction + config.adjust) / tokens_per_block)


def num_draws(config: MaskConfig, num_tokens: int) -> int:
    """Number of random numbers for each row: one for each block centre, then one for each token to adjust the count."""
    return num_blocks(config, num_tokens) + num_tokens


def blocks_1d(numbers: NDArray[np.float64], num_tokens: int, block_length: int) -> NDArray[np.bool_]:
    """Return the union of blocks around uniform centres; positions outside the sequence are clamped onto its ends.

    Args:
        numbers: (..., c) float64 in [0, 1), one for each centre; centres may repeat.
        num_tokens: T.
        block_length: tokens per block.

    Returns:
        (..., T) bool, True = covered.
    """
    centres = (numbers * num_tokens).astype(np.int64)  # (..., c)
    offsets = np.arange(block_length) - block_length // 2
    covered = np.clip(centres[..., None] + offsets, 0, num_tokens - 1)  # (..., c, l)
    return _mark(covered, num_tokens)


def blocks_2d(numbers: NDArray[np.float64], grid: tuple[int, int], block_length: int) -> NDArray[np.bool_]:
    """Return the union of square blocks around uniform cells, clamped onto the border of a grid.

    Args:
        numbers: (..., c) float64 in [0, 1), one for each centre; centres may repeat.
        grid: rows and columns.
        block_length: side of a block, in cells.

    Returns:
        (..., rows * columns) bool, True = covered; row by row.
    """
    height, width = grid
    centres = (numbers * (height * width)).astype(np.int64)  # (..., c)
    offsets = np.arange(block_length) - block_length // 2
    rows = np.clip(centres[..., None] // width + offsets, 0, height - 1)  # (..., c, l)
    columns = np.clip(centres[..., None] % width + offsets, 0, width - 1)  # (..., c, l)
    covered = rows[..., :, None] * width + columns[..., None, :]  # (..., c, l, l)
    return _mark(covered.reshape(*centres.shape, block_length**2), height * width)


def _mark(covered: NDArray[np.int64], num_tokens: int) -> NDArray[np.bool_]:
    """(..., c, l) positions -> (..., T) bool."""
    marked = np.zeros((*covered.shape[:-2], num_tokens), dtype=bool)
    positions = covered.shape[-2] * covered.shape[-1]  # -1 would fail if c is 0
    np.put_along_axis(marked, covered.reshape(*covered.shape[:-2], positions), True, axis=-1)
    return marked


def _adjust_count(chosen: NDArray[np.bool_], count: int, numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Add or remove uniformly random single tokens until exactly `count` are chosen.

    Keys of chosen tokens are below all others. The `count` smallest keys are thus a random subset of the chosen
    tokens if these are too many, and all of them with random others if they are too few.
    """
    keys = numbers - chosen  # (..., T), chosen in [-1, 0), others in [0, 1)
    smallest = np.argpartition(keys, count - 1, axis=-1)[..., :count]
    adjusted = np.zeros_like(chosen)
    np.put_along_axis(adjusted, smallest, True, axis=-1)
    return adjusted


def _grid(config: MaskConfig, num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the tokens; a sequence is one row."""
    if config.kind != "block_2d":
        return 1, num_tokens
    if config.columns is not None:
        if num_tokens % config.columns:
            raise ValueError(f"block_2d masks need whole rows of {config.columns} tokens, found {num_tokens} tokens")
        return num_tokens // config.columns, config.columns
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"block_2d masks need a square grid, found {num_tokens} tokens")
    return side, side


def uniforms(*, seed: int, epoch: int, sample_ids: ArrayLike, num_masks: int, num_draws: int) -> NDArray[np.float64]:
    """Compute random numbers for masks, a pure function of the arguments and of each number's index.

    Args:
        seed: of the run.
        epoch: of these samples.
        sample_ids: (B,) integers.
        num_masks: M.
        num_draws: numbers for each mask.

    Returns:
        (B, M, num_draws) float64 in [0, 1).
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    keys = hash64(seed, epoch, Stream.MASK, ids[:, None], np.arange(num_masks))  # (B, M)
    return _numbers(keys, num_draws)


def _numbers(keys: NDArray[np.uint64], num_draws: int) -> NDArray[np.float64]:
    """Compute `num_draws` random numbers of each key, (...) -> (..., num_draws)."""
    steps = (np.arange(1, num_draws + 1, dtype=np.uint64)) * np.uint64(GAMMA)
    return to_unit_interval(mix64(keys[..., None] + steps))


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Settings of spans along one axis."""

    fraction: Annotated[float, Bounds(ge=0, lt=1)]
    """Number of spans times their length, over the axis. Spans overlap, so that fewer positions are masked."""
    length: Count
    """Positions of a span."""


@dataclass(frozen=True, kw_only=True)
class SpanMaskConfig:
    """Settings of masks over whole inputs, as in fine-tuning: spans of tokens, and spans of channels of all tokens."""

    time: Spans | None = None
    """Spans of tokens, at least one for each row; None for none."""
    channels: Spans | None = None
    """Spans of channels; a row may get none. None for none."""
    equal_counts: bool = False
    """True: every row has as many masked tokens as the row with the fewest, as in the official code, which masks long
    rows less the shorter the others are. False: each row has its own number."""


def draw_span_masks(
    config: SpanMaskConfig, lengths: NDArray[np.int64], width: int, *, seed: int, epoch: int, sample_ids: ArrayLike
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Draw span masks (`compute_mask_indices` of the official fairseq/data/data_utils.py).

    Differs from the official code: every row has its own random numbers, a row keeps at least one token, and no span
    of channels is no error.

    Args:
        config: settings.
        lengths: (B,) tokens of each row.
        width: D.
        seed: of the run.
        epoch: of these samples.
        sample_ids: (B,) row numbers.

    Returns:
        (B, T) and (B, D) bool, True = masked, T the greatest length; None where the settings have none.
    """
    ids, num_tokens = np.asarray(sample_ids), int(lengths.max())
    time = channels = None
    if config.time is not None:
        draws = 2 * num_tokens + 2
        numbers = uniforms(seed=seed, epoch=epoch, sample_ids=ids, num_masks=1, num_draws=draws)[:, 0]
        time = _span_rows(config.time, lengths, num_tokens, numbers[:, : num_tokens + 2], least=1)
        if config.equal_counts:
            keys = numbers[:, num_tokens + 2 :]
            fewest = int(time.sum(1).min())
            time = np.stack([_adjust_count(row, fewest, key) for row, key in zip(time, keys, strict=True)])
    if config.channels is not None:
        numbers = _numbers(hash64(seed, epoch, Stream.CHANNELS, ids), width + 2)
        channels = _span_rows(config.channels, np.full(len(ids), width), width, numbers, least=0)
    return time, channels


def _span_rows(
    spans: Spans, lengths: NDArray[np.int64], size: int, numbers: NDArray[np.float64], least: int
) -> NDArray[np.bool_]:
    """Mark spans on (B, size); row i only below `lengths[i]`. `numbers` is (B, size + 2)."""
    marked = np.zeros((len(lengths), size), dtype=bool)
    for row, length, own in zip(marked, lengths.tolist(), numbers, strict=True):
        mark_spans(row[:length], spans, own, least)
    return marked


def mark_spans(
    row: NDArray[np.bool_], spans: Spans, numbers: NDArray[np.float64], least: int, *, starts_anywhere: bool = False
) -> None:
    """Mark spans at different random starts, in place; one token of a row that would be all masked stays.

    Args:
        row: (T,) bool.
        spans: settings.
        numbers: (T + 2,) or more float64 in [0, 1).
        least: fewest spans.
        starts_anywhere: let spans begin at any token and cut them at the end; False keeps them whole.
    """
    length = len(row)
    count = min(max(least, int(spans.fraction * length / spans.length + numbers[0])), max(length - 1, 0))
    if not count:
        return
    places = length - spans.length if length - spans.length > count else count + 1
    if starts_anywhere:
        places = length
    starts = np.argpartition(numbers[1 : places + 1], count - 1)[:count]
    for start in starts.tolist():
        row[start : start + spans.length] = True
    if row.all():
        row[int(numbers[length + 1] * length)] = False  # not the last one, whose place depends on the longest row
