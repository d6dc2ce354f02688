"""Recorded statistics of the official mask samplers of data2vec 1.0, beside those of ours."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from d2v2ds.errors import D2V2Error
from d2v2ds.masking import SpanMaskConfig, Spans, draw_span_masks
from d2v2ds.verify.report import Report
from d2v2ds.whole_masks import GridBlocks, SpanWholeMask, WholeMask, draw_whole_masks

NAME = "v1_mask_stats"
_ERRORS = 4.0
"""Standard errors by which one statistic of our sampler may differ from the recorded one. The largest of n may differ
by sqrt(errors^2 + 2 ln n), which chance exceeds about as often."""
_LEAST_POOLED = 50
"""Neighbouring bins of a histogram are joined until so many were recorded, so that errors are normal."""
_SETTINGS = {"rows", "length", "mask_prob", "mask_length", "mask_multiple_length", "batch", "grid", "num_mask_patches",
             "min_per_block", "max_per_block"}  # fmt: skip
Numbers = NDArray[np.float64]


def check_first_masks(folder: Path, report: Report) -> None:
    """Compare every entry: the numbers with the recorded histograms, and these with our draws.

    Raises:
        D2V2Error: a statistic is unknown or missing.
    """
    recorded = load_file(folder / f"{NAME}.safetensors")
    for name, entry in json.loads((folder / f"{NAME}.json").read_text()).items():
        own = {key.removeprefix(f"{name}/"): recorded.pop(key) for key in list(recorded) if key.startswith(f"{name}/")}
        masked, batch = _draw(name, entry)
        _compare_summary(name, entry, own, masked.shape[1], report)
        ours = _statistics(masked, "grid" in entry)
        if ours.keys() != own.keys():
            raise D2V2Error(f"{name}: expected {', '.join(sorted(ours))}, found {', '.join(sorted(own))}")
        for key, rows in ours.items():
            _compare_statistic(f"{name} {key}", rows, own[key].astype(np.float64), entry["rows"], batch, report)
    if recorded:
        raise D2V2Error(f"nothing to compare with {', '.join(sorted(recorded))}")


def _draw(name: str, entry: Mapping[str, Any]) -> tuple[NDArray[np.bool_], int]:
    """Draw as many rows as were recorded: (rows, T), and the rows of a batch."""
    rows, batch = entry["rows"], entry.get("batch", 1)
    ids = np.arange(rows)
    if batch > 1:  # rows of a batch get equal counts, which our objective leaves out
        spans = Spans(fraction=entry["mask_prob"], length=entry["mask_length"])
        config = SpanMaskConfig(time=spans, equal_counts=True)
        lengths = np.full(batch, entry["length"])
        drawn = [
            draw_span_masks(config, lengths, 1, seed=1, epoch=0, sample_ids=part)[0] for part in ids.reshape(-1, batch)
        ]
        return np.concatenate(drawn), batch  # type: ignore[arg-type]
    config_of_rows: WholeMask
    if "grid" in entry:
        length = entry["grid"] ** 2
        config_of_rows = GridBlocks(
            count=entry["num_mask_patches"], least=entry["min_per_block"], most=entry["max_per_block"]
        )
    else:
        length, span = entry["length"], entry.get("mask_length", entry.get("mask_multiple_length"))
        if span is None:
            raise D2V2Error(f"{name}: expected mask_length, mask_multiple_length or grid, found none")
        config_of_rows = SpanWholeMask(
            fraction=entry["mask_prob"], length=span, starts_anywhere="mask_multiple_length" in entry
        )
    return draw_whole_masks(config_of_rows, np.full(rows, length), seed=1, epoch=0, sample_ids=ids), 1


def _statistics(masked: NDArray[np.bool_], is_grid: bool) -> dict[str, NDArray[Any]]:
    """Compute vectors of each row, whose means are the recorded statistics: (rows, n)."""
    length = masked.shape[1]
    found: dict[str, NDArray[Any]] = {
        "count_hist": masked.sum(1)[:, None] == np.arange(length + 1),
        "marginal": masked,
    }
    if is_grid:
        side = math.isqrt(length)
        return found | {"masked_4nbr_hist": _neighbours(masked.reshape(-1, side, side))}
    lags = [(masked[:, : length - lag] & masked[:, lag:]).mean(1) for lag in range(21)]
    return found | {"masked_run_hist": _runs(masked), "joint_lag": np.stack(lags, axis=1)}


def _runs(masked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count runs of masked tokens by their length: (rows, T + 1)."""
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (owner, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    counts = np.zeros((len(masked), masked.shape[1] + 1), dtype=np.int64)
    np.add.at(counts, (owner, end - start), 1)
    return counts


def _neighbours(masked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count masked cells by their number of masked neighbours: (rows, 5)."""
    padded = np.pad(masked, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    number = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return np.stack([((number == one) & masked).sum((1, 2)) for one in range(5)], axis=1)


def _compare_summary(
    name: str, entry: Mapping[str, Any], own: Mapping[str, NDArray[Any]], length: int, report: Report
) -> None:
    """Compare the numbers of an entry with the recorded histograms.

    Raises:
        D2V2Error: a number is unknown.
    """
    counts = np.repeat(np.arange(length + 1), own["count_hist"].astype(np.int64))
    expected = {
        "count_mean": counts.mean(), "count_sd": counts.std(), "count_min": counts.min(), "count_max": counts.max(),
        "coverage": counts.mean() / length, "share_exact": (counts == entry.get("num_mask_patches")).mean(),
    }  # fmt: skip
    for key, histogram in (("mean_run", "masked_run_hist"), ("mean_masked_neighbours", "masked_4nbr_hist")):
        if histogram in own:
            sizes = own[histogram].astype(np.float64)
            expected[key] = (sizes * np.arange(len(sizes))).sum() / sizes.sum()
    report.compare(f"{name} rows", float(len(counts)), float(entry["rows"]))
    for key, value in entry.items():
        if key in expected:
            report.compare(f"{name} {key}", float(value), float(expected[key]))
        elif key not in _SETTINGS:
            raise D2V2Error(f"nothing to compare with {name}.{key}")


def _compare_statistic(name: str, ours: NDArray[Any], recorded: Numbers, rows: int, batch: int, report: Report) -> None:
    """Compare a mean over rows; rows of a batch depend on each other, so that batches count."""
    if ours.shape[1:] != recorded.shape:
        raise D2V2Error(f"{name}: expected {ours.shape[1:]}, found {recorded.shape}")
    values = ours.astype(np.float64)
    if name.endswith("_hist"):
        first = _first_bins(recorded)
        values, recorded = np.add.reduceat(values, first, axis=1), np.add.reduceat(recorded, first) / rows
    groups = values.reshape(-1, batch, values.shape[1]).mean(1)
    error = groups.std(0) * math.sqrt(2 / len(groups))
    difference = np.abs(groups.mean(0) - recorded)
    allowed = np.where(error > 0, math.sqrt(_ERRORS**2 + 2 * math.log(len(error))) * error, 1e-9)
    report.allow(name, float((difference / allowed).max()))


def _first_bins(counts: Numbers) -> NDArray[np.int64]:
    """Join neighbouring bins; returns the first of each group."""
    first, total, remaining = [0], 0.0, counts.sum()
    for number, count in enumerate(counts):
        total, remaining = total + count, remaining - count
        if total >= _LEAST_POOLED and remaining >= _LEAST_POOLED:
            first.append(number + 1)
            total = 0.0
    return np.array(first)
