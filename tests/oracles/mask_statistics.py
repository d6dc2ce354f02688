"""Statistics of masks, in the terms of the reference's `mask_stats` files.

Every statistic is a mean over rows of a small vector per row, so that its standard error follows from the
spread between rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from d2v2ds.masking import MaskConfig, blocks_1d, blocks_2d, draw_masks, num_blocks, num_draws, uniforms

KINDS = {"1d": "block_1d", "2d": "block_2d", "random": "random"}
MIN_POOLED_COUNT = 50
"""Neighbouring bins of a histogram are joined until the reference saw this many, so that errors are normal."""


def mask_config(entry: Mapping) -> MaskConfig:
    """The settings of one entry of mask_stats.json, one mask per sample."""
    return MaskConfig(
        kind=KINDS[entry["kind"]],
        masked_fraction=entry["mask_prob"],
        adjust=entry.get("mask_prob_adjust", 0.0),
        block_length=entry.get("mask_length", 1),
        inverse=entry.get("inverse", False),
        num_masks=1,
    )


def row_statistics(config: MaskConfig, num_tokens: int, *, seed: int, num_rows: int) -> dict[str, np.ndarray]:
    """Our own draws: statistic -> (num_rows, size of the statistic)."""
    ids = np.arange(num_rows)
    masked = draw_masks(config, num_tokens, seed=seed, epoch=0, sample_ids=ids)[:, 0]  # (rows, T)
    if config.kind == "random":
        return _sequence_statistics("final", masked)

    draws = num_draws(config, num_tokens)
    numbers = uniforms(seed=seed, epoch=0, sample_ids=ids, num_masks=1, num_draws=draws)[:, 0]
    centres = numbers[:, : num_blocks(config, num_tokens)]
    if config.kind == "block_1d":
        raw = blocks_1d(centres, num_tokens, config.block_length)
        return _sequence_statistics("final", masked) | {
            "raw_count_hist": one_hot(raw.sum(1), num_tokens + 1),
            **{k: v for k, v in _sequence_statistics("raw", raw).items() if "joint_lag" not in k},
        }
    side = round(num_tokens**0.5)
    raw_kept = blocks_2d(centres, (side, side), config.block_length)
    kept = ~masked
    return {
        "raw_kept_count_hist": one_hot(raw_kept.sum(1), num_tokens + 1),
        "raw_marginal_kept": raw_kept,
        "final_marginal_kept": kept,
        "final_kept_4nbr_hist": neighbour_histogram(kept.reshape(-1, side, side)),
        "final_kept_components_hist": one_hot(components(kept[:4000].reshape(-1, side, side)), 60),
    }


def _sequence_statistics(stage: str, masked: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{stage}_marginal": masked,
        f"{stage}_masked_run_hist": run_histogram(masked),
        f"{stage}_kept_run_hist": run_histogram(~masked),
        f"{stage}_joint_lag": np.stack(
            [(masked[:, : masked.shape[1] - k] & masked[:, k:]).mean(1) for k in range(13)], axis=1
        ),
    }


def one_hot(values: np.ndarray, size: int) -> np.ndarray:
    return values[:, None] == np.arange(size)


def run_histogram(rows: np.ndarray) -> np.ndarray:
    """(rows, T) bool to (rows, T + 1): how many maximal runs of True each row has, by their length."""
    edges = np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    owner, start = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    histogram = np.zeros((rows.shape[0], rows.shape[1] + 1), dtype=np.int32)
    np.add.at(histogram, (owner, end - start), 1)
    return histogram


def neighbour_histogram(kept: np.ndarray) -> np.ndarray:
    """(rows, side, side) bool to (rows, 5): kept cells by their number of kept 4-neighbours."""
    padded = np.pad(kept, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return np.stack([((neighbours == n) & kept).sum((1, 2)) for n in range(5)], axis=1)


def components(kept: np.ndarray) -> np.ndarray:
    """(rows, side, side) bool to (rows,): number of 4-connected regions of kept cells."""
    _, side, _ = kept.shape
    own = np.where(kept, np.arange(1, side * side + 1).reshape(side, side), 0)
    label = own
    while True:  # every cell takes the largest label next to it until nothing changes
        p = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        around = np.maximum.reduce([p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:], label])
        spread = np.where(kept, around, 0)
        if (spread == label).all():
            return (kept & (label == own)).sum((1, 2))
        label = spread


def pool(counts: np.ndarray) -> np.ndarray:
    """Join neighbouring bins of the reference's histogram: the first bin of each group, ascending from 0."""
    first_bins, total, remaining = [0], 0, counts.sum()
    for i, count in enumerate(counts):
        total, remaining = total + count, remaining - count
        if total >= MIN_POOLED_COUNT and remaining >= MIN_POOLED_COUNT:
            first_bins.append(i + 1)
            total = 0
    return np.array(first_bins)


def pooled(histograms: np.ndarray, first_bins: np.ndarray) -> np.ndarray:
    """(..., bins) to (..., first_bins)."""
    return np.add.reduceat(histograms.astype(np.int64), first_bins, axis=-1)


def agreement(rows: np.ndarray, golden_mean: np.ndarray, *, num_golden_rows: int) -> np.ndarray:
    """Distance of two means in standard errors of their difference.

    The rows of both sides have the same distribution if the samplers agree, so that the spread of our rows
    stands for both.
    """
    rows = rows.astype(np.float64)
    error = rows.std(0) * np.sqrt(1 / len(rows) + 1 / num_golden_rows)
    difference = rows.mean(0) - golden_mean
    exact = error < 1e-12  # a constant, such as the share of masked tokens
    return np.where(exact, np.where(np.abs(difference) < 1e-6, 0.0, np.inf), difference / np.where(exact, 1, error))


def golden_statistics(folder: Path, setting: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The entry of one setting, its means per row, and the first bins of its pooled histograms."""
    entry = json.loads((folder / "mask_stats.json").read_text())[setting]
    tensors = load_file(folder / "mask_stats.safetensors")
    means, first_bins = {}, {}
    for key, value in tensors.items():
        owner, name = key.split("/")
        if owner != setting:
            continue
        if name.endswith("_hist"):
            first_bins[name] = pool(value)
            means[name] = pooled(value, first_bins[name]) / golden_rows(name, entry["rows"])
        else:
            means[name] = value.astype(np.float64)
    return entry, means, first_bins


def golden_rows(name: str, rows: int) -> int:
    return min(rows, 4000) if name == "final_kept_components_hist" else rows
