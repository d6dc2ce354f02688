"""Recorded learning rates, scales by parameter name, rates of stochastic depth, and statistics of span masks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from d2v2ds.errors import D2V2Error
from d2v2ds.masking import SpanMaskConfig, Spans, draw_span_masks
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.alibi import alibi_slopes
from d2v2ds.model.block import BlockConfig, drop_path_rates
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.shapes import AUDIO_CONV_LAYERS, conv_output_length
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.train.optim import parameter_groups
from d2v2ds.train.schedule import LearningRateConfig, learning_rate
from d2v2ds.verify.finetuning.case import official_task_name
from d2v2ds.verify.finetuning.trajectory import tri_stage
from d2v2ds.verify.report import Report


def check_schedules(values: Mapping[str, Any], report: Report) -> None:
    """Compare the contents of `schedules.json`.

    Raises:
        D2V2Error: an entry of an unknown kind.
    """
    for name, case in values.items():
        kind = name.split("/")[0]
        if kind not in _KINDS:
            raise D2V2Error(f"{name}: expected one of {', '.join(_KINDS)}")
        _KINDS[kind](name, case, report)


def _tri_stage(name: str, case: Mapping[str, Any], report: Report) -> None:
    if "points" in case:  # of the vectors of pretraining
        config, total = tri_stage(case)
        _compare_points(name, case, config, total, report)
        return
    config, total = tri_stage(case["settings"])
    found = [config.warmup_steps, config.hold_steps, config.decay_steps or 0]
    for mine, wanted in zip(found, case["steps_warmup_hold_decay"], strict=True):
        report.compare(f"{name} stages", float(mine == wanted), 1.0)
    report.compare(f"{name} before", learning_rate(0, config, total), case["lr_before_any_call"])
    _compare_rates(name, case["lr"], config, total, report)


def _polynomial(name: str, case: Mapping[str, Any], report: Report) -> None:
    settings = case["settings"]
    config = LearningRateConfig(
        shape="polynomial",
        peak=settings["lr"],
        warmup_steps=settings["warmup_updates"],
        minimum=settings.get("end_learning_rate", 0.0),
        power=settings.get("power", 1.0),
    )
    _compare_rates(name, case["lr"], config, settings["max_update"], report)


def _plain_cosine(name: str, case: Mapping[str, Any], report: Report) -> None:
    config = LearningRateConfig(peak=case["lr"], warmup_steps=case["warmup"], minimum=case["min_lr"])
    _compare_points(name, case, config, case["max_update"], report)


def _compare_points(name: str, case: Mapping[str, Any], config: LearningRateConfig, total: int, report: Report) -> None:
    _compare_rates(name, {str(step): rate for step, rate in case["points"]}, config, total, report)


def _ema(name: str, case: Mapping[str, Any], report: Report) -> None:
    config = EmaConfig(start_decay=case["start"], end_decay=case["end"], anneal_steps=case["anneal_end_step"])
    for step, wanted in case["points"]:
        report.compare(f"{name} 1 - decay", 1.0 - ema_decay(step, config), 1.0 - wanted)


def _alibi_slopes(name: str, case: list[float], report: Report) -> None:
    report.compare(name, torch.tensor(alibi_slopes(int(name.split("/")[1]))), torch.tensor(case))


def _audio_frames(name: str, case: list[list[int]], report: Report) -> None:
    for samples, frames in case:
        report.compare(name, conv_output_length(samples, AUDIO_CONV_LAYERS), frames)


def _cosine(name: str, case: Mapping[str, Any], report: Report) -> None:
    settings, model = case["settings"], case["pretrained_model"]
    config = LearningRateConfig(
        peak=settings["lr"], warmup_steps=settings["warmup_updates"], minimum=settings["min_lr"]
    )
    for scale, rates in case["lr_by_scale"].items():
        _compare_rates(f"{name} x{float(scale):.3g}", rates, config, settings["max_update"], report, float(scale))
    found = drop_path_rates(model["prenet_depth"], model["depth"], settings["drop_path_rate"])
    wanted = case["drop_path_rate_per_block"]
    for mine, rate in zip(found, [*wanted["prenet"], *wanted["main"]], strict=True):
        report.compare(f"{name} drop path", mine, rate)
    _compare_scales(name, case, report)


def _compare_scales(name: str, case: Mapping[str, Any], report: Report) -> None:
    """Compare the scale of every parameter of a small network of the same depth."""
    settings, model = case["settings"], case["pretrained_model"]
    block = BlockConfig(width=8, num_heads=1)
    network_settings = ImageNetwork(prenet_depth=model["prenet_depth"], image_size=4, patch_size=2, num_extra_tokens=1)
    trunk = TrunkConfig(block=block, shared_depth=model["depth"], modalities={"image": network_settings})
    task = ClassifyConfig(modality="image", layer_decay=settings["layer_decay"]).build(trunk, seed=0)
    network = task.build_network(activation_checkpointing=False)
    trained = {official_task_name(n): n for n, p in network.named_parameters() if p.requires_grad}
    fixed = [official_task_name(one) for one in network.state_dict() if one not in trained.values()]
    report.compare(f"{name} not trainable", float(fixed == case["not_trainable"]), 1.0)
    if set(trained) != set(case["lr_scale"]) - set(case["not_trainable"]):
        raise D2V2Error(f"{name}: parameters differ in {sorted(set(trained) ^ set(case['lr_scale']))}")
    for official, mine in trained.items():
        report.compare(f"{name} lr scale", task.lr_scale(mine), case["lr_scale"][official])
    # the official code has a group without decay for each scale, to which the same decay applies
    groups = parameter_groups(network, task.lr_scale, task.held_steps)
    scales = {group["lr_scale"] for group in groups}
    report.compare(f"{name} groups", len(scales), len({case["lr_scale"][one] for one in trained}))
    report.compare(f"{name} groups of the official code", 2 * len(scales) + 1, case["number_of_groups"])
    for decay in case["weight_decay"]:
        report.compare(f"{name} weight decay", settings["weight_decay"], decay)


def _compare_rates(
    name: str,
    rates: Mapping[str, float],
    config: LearningRateConfig,
    total: int,
    report: Report,
    scale: float = 1.0,
) -> None:
    for step, wanted in rates.items():
        report.compare(f"{name} learning rate", learning_rate(int(step), config, total, scale), wanted)


_KINDS: dict[str, Callable[[str, Any, Report], None]] = {
    "cosine": _plain_cosine,
    "ema": _ema,
    "alibi_slopes": _alibi_slopes,
    "audio_frames": _audio_frames,
    "tri_stage": _tri_stage,
    "polynomial": _polynomial,
    "image_cosine": _cosine,
}

_ROWS = 4000
_ERRORS = 4.5
"""Standard errors by which a statistic of our sampler may differ from the recorded one."""


def check_masks(values: Mapping[str, Any], report: Report) -> None:
    """Compare statistics of our span sampler with those of the official one, in units of the allowed difference.

    Raises:
        D2V2Error: an entry of an unknown kind.
    """
    for name, case in values.items():
        kind, settings = name.split("/")
        length, fraction, span = settings.split("_")
        spans = Spans(fraction=float(fraction[1:]), length=int(span[1:]))
        sizes = [int(size) for size in length[1:].split(",")]
        if kind == "padded_batch":
            _compare_padded(name, spans, sizes, case, report)
        elif kind in ("time", "channel"):
            _compare_statistics(name, kind, spans, sizes[0], case, report)
        else:
            raise D2V2Error(f"{name}: expected time, channel or padded_batch")


def _compare_statistics(name: str, kind: str, spans: Spans, size: int, case: Mapping[str, Any], report: Report) -> None:
    is_time = kind == "time"
    config = SpanMaskConfig(time=spans if is_time else None, channels=None if is_time else spans)
    time, channels = draw_span_masks(config, np.full(_ROWS, size), size, seed=1, epoch=0, sample_ids=np.arange(_ROWS))
    masked = time if is_time else channels
    assert masked is not None
    counts, rows = masked.sum(1), case["rows"]
    noise = math.sqrt(1 / rows + 1 / _ROWS)
    _compare(report, f"{name} mean", counts.mean(), case["mean_fraction"] * size, case["sd_count"] * noise)
    _compare(report, f"{name} spread", counts.std(), case["sd_count"], case["sd_count"] * noise)
    for end, found in (("first", masked[:, :20].mean(0)), ("last", masked[:, -20:].mean(0))):
        for mine, wanted in zip(found, case[f"marginal_{end}_20"], strict=True):
            error = math.sqrt(max(wanted * (1 - wanted), 1e-4)) * noise
            _compare(report, f"{name} {end} positions", float(mine), wanted, error)
    if "run_length_hist_600_rows" in case:
        _compare_runs(name, masked[:600], case["run_length_hist_600_rows"], report)
    low, high = case["spans"]
    found_spans = {int(spans.fraction * size / spans.length + share) for share in (0.0, 1.0 - 1e-9)}
    report.compare(f"{name} spans", float(found_spans == {low, high}), 1.0)
    least, most = spans.length * min(low, 1), high * spans.length
    report.compare(f"{name} bounds", float(counts.min() >= least and counts.max() <= most), 1.0)
    is_ordered = least <= case["min"] <= case["mean_fraction"] * size <= case["max"] <= most
    report.compare(f"{name} recorded bounds", float(is_ordered), 1.0)


def _compare_runs(name: str, masked: Any, wanted: Mapping[str, int], report: Report) -> None:
    """Compare the mean and the number of runs of masked positions."""
    edges = np.diff(np.pad(masked.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    recorded = np.repeat([int(size) for size in wanted], list(wanted.values()))
    short = lengths[lengths <= recorded.max()]
    error = recorded.std() * math.sqrt(1 / len(recorded) + 1 / len(short))
    _compare(report, f"{name} length of runs", short.mean(), recorded.mean(), error)
    _compare(report, f"{name} number of runs", len(short), len(recorded), math.sqrt(2 * len(recorded)))


def _compare_padded(name: str, spans: Spans, sizes: list[int], case: Mapping[str, Any], report: Report) -> None:
    """Compare a batch of rows of different lengths, with equal counts."""
    counts = []
    for batch in range(400):
        config = SpanMaskConfig(time=spans, equal_counts=case["equal_within_batch"])
        ids = np.arange(len(sizes)) + batch * len(sizes)
        time, _ = draw_span_masks(config, np.array(sizes), 1, seed=1, epoch=0, sample_ids=ids)
        assert time is not None
        counts.append(time.sum(1))
    found = np.array(counts)
    report.compare(f"{name} equal counts", float((found == found[:, :1]).all()), float(case["equal_within_batch"]))
    error = float(found[:, 0].std()) * math.sqrt(1 / len(found) + 1 / 200)
    _compare(report, f"{name} mean", found.mean(), case["mean_count"], error)
    for size, wanted in zip(sizes, case["mean_fraction_per_row"], strict=True):
        _compare(report, f"{name} share", found.mean() / size, wanted, error / size)


def _compare(report: Report, name: str, found: float, wanted: float, error: float) -> None:
    """Record the difference as a share of what chance allows, scaled so that 1 is the report's tolerance."""
    report.allow(name, abs(found - wanted) / (_ERRORS * error))
