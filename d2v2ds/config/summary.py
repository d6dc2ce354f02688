"""What a configuration amounts to, without data and without a process group: sizes, memory, steps, operations."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from d2v2ds.config.load import CONFIG_FOLDER, RunConfig, load_config
from d2v2ds.distributed.ds_config import load_ds_config
from d2v2ds.distributed.memory import expected_bytes, passing_bytes
from d2v2ds.masking import masked_count
from d2v2ds.model.flops import step_flops
from d2v2ds.model.trunk import Data2Vec2
from d2v2ds.objectives.teacher_network import TargetNet


def _audio(data: Any, model: Any) -> tuple[float, int]:
    """Clips of the greatest length."""
    return data.global_batch_seconds / data.max_seconds, round(data.max_seconds * data.sample_rate_hz)


def _image(data: Any, model: Any) -> tuple[float, int]:
    return data.global_batch_images, model.image_size


def _text(data: Any, model: Any) -> tuple[float, int]:
    return data.global_batch_tokens / model.max_tokens, model.max_tokens


SAMPLES: dict[str, Callable[[Any, Any], tuple[float, int]]] = {"audio": _audio, "image": _image, "text": _text}
"""(settings of data, settings of the model) -> samples per optimizer step, and the size of each."""
AMOUNTS: dict[str, Callable[[Any], tuple[float, str]]] = {
    "audio": lambda data: (data.global_batch_seconds, "seconds of audio"),
    "image": lambda data: (data.global_batch_images, "images"),
    "text": lambda data: (data.global_batch_tokens, "tokens"),
}
"""Settings of data -> what one optimizer step sees, and its unit, that of the setting."""
LARGER = {"seconds of audio": ((3600, "hours of audio"), (60, "minutes of audio"))}
"""Unit -> how many of it make one of another, largest first."""
BYTES = ((2**30, "GiB"), (2**20, "MiB"))
OPERATIONS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))

OFFLOADED = ("master", "optimizer", "gradients", "teacher_average")
"""What `offload_optimizer` moves: DeepSpeed accumulates gradients where Adam is, the teacher averages where the master
is."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _sized(value: float, units: Sequence[tuple[float, str]]) -> str:
    """With the largest unit of which there is one, else with the smallest."""
    of, unit = next((entry for entry in units if value >= entry[0]), units[-1])
    return f"{_number(value / of)} {unit}"


def _bytes(size: float) -> str:
    return _sized(size, BYTES)


def _amount(value: float, unit: str) -> str:
    return _sized(value, (*LARGER.get(unit, ()), (1, unit)))


def _count(module: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def summary(config: RunConfig, world: int = 1) -> list[str]:
    """Lines for a reader.

    Args:
        config: a whole run; its shards need not exist.
        world: ranks, for the memory of one.

    Raises:
        ConfigError: if there is no such DeepSpeed configuration.
        ValueError: if the masks of a modality cannot be drawn.
    """
    with torch.device("meta"):
        student, teacher = Data2Vec2(config.model), TargetNet(config.model)
    decoders = _count(student.decoders)
    whole, trained = _count(student), _count(student, trained_only=True)
    lines = [
        f"parameters: student {whole:,} (trained {trained:,}), of these decoder {decoders:,}; without decoder "
        f"{whole - decoders:,}; teacher {_count(teacher):,}"
    ]
    lines += _memory(config, student, teacher, world)
    lines += _length(config, world)
    return lines


def _memory(config: RunConfig, student: nn.Module, teacher: nn.Module, world: int) -> list[str]:
    ds_config = load_ds_config(config.engine.deepspeed)
    section = ds_config.get("zero_optimization", {})
    stage, threshold = section.get("stage", 0), section.get("stage3_param_persistence_threshold", 0)
    kept_whole = sum(p.numel() for p in student.parameters() if p.numel() <= threshold) if stage == 3 else 0
    held = expected_bytes(_count(student, trained_only=True), _count(teacher), world, ds_config, kept_whole)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in held.items() if size)
    passing = passing_bytes(_count(student, trained_only=True), world, ds_config)
    lines = [
        f"memory of one of {world} rank(s) with {config.engine.deepspeed} (stage {stage}): "
        f"{_bytes(sum(held.values()))} ({parts}); in a step {_bytes(passing)} of gradients and the activations come on "
        "top"
    ]
    if section.get("offload_optimizer", {}).get("device") == "cpu":
        moved = _bytes(sum(held[name] for name in OFFLOADED))
        lines.append(
            f"of it {', '.join(OFFLOADED[:-1])} and {OFFLOADED[-1]}, {moved}, and the gradients of a step lie "
            "in the memory of the host"
        )
    return lines


def _turns(num_micro: int, world: int) -> str:
    """How the micro-batches of a step are dealt out to ranks."""
    accumulation = math.ceil(num_micro / world)
    idle = accumulation * world - num_micro
    return f"{num_micro} micro-batches, accumulation {accumulation} on {world} rank(s)" + (
        f", {idle} of {accumulation * world} turns without data" if idle else ""
    )


def _length(config: RunConfig, world: int) -> list[str]:
    steps, flops, lines = config.total_steps, 0.0, [f"length: {config.total_steps:,} optimizer steps"]
    models = config.model.modalities.active()
    for name, data in config.data.active().items():
        model = models[name]
        samples, size = SAMPLES[name](data, model)
        amount, unit = AMOUNTS[name](data)
        tokens = model.num_tokens(size)
        try:
            masked = masked_count(data.mask, tokens)
        except ValueError as error:
            raise ValueError(f"data.{name}.mask: {error}") from error
        one = step_flops(
            config.model, name, num_samples=1, size=size, num_masks=data.mask.num_masks, visible=tokens - masked
        )
        flops += steps * samples * one.total
        lines.append(
            f"{name}: {_number(amount)} {unit} per step x {data.mask.num_masks} masks, {_amount(amount * steps, unit)} "
            f"in all; {tokens} tokens a sample, {masked} masked and {tokens - masked} visible; "
            f"{_turns(data.num_micro, world)}"
        )
    lines.append(
        f"operations: {_sized(flops / steps, OPERATIONS)} per step, {flops:.3g} FLOP in all "
        "(visible tokens only, teacher included)"
    )
    return lines


def batch_advice(name: str, config: RunConfig) -> list[str]:
    """What else to change where the global batch is not the one that a shipped recipe was tuned with, as sentences.

    What happens per sample seen stays the same when warm-up and annealing, which are counted in steps, stretch with
    1 / r and the teacher's decays are raised to the power r (arXiv 2307.13813), r being the batch over the shipped one;
    Adam's learning rate goes with sqrt(r) (arXiv 2205.10287). Settings that are not the shipped ones any more have been
    thought of and are left out.

    Args:
        name: as in `load_config`; a path is no shipped recipe.
        config: the run.
    """
    if not (CONFIG_FOLDER / f"{name}.yaml").is_file():
        return []
    shipped = load_config(name)
    own, theirs = config.data.active(), shipped.data.active()
    amounts = {name: (AMOUNTS[name](own[name]), AMOUNTS[name](theirs[name])) for name in own if name in theirs}
    ratios = {modality: ours[0] / original[0] for modality, (ours, original) in amounts.items()}
    lines = [
        f"{modality}: a global batch of {_number(ours)} {unit}, {ratios[modality]:.3g} times the "
        f"{_number(original)} of {name}"
        for modality, ((ours, unit), (original, _)) in amounts.items()
        if not math.isclose(ratios[modality], 1.0)
    ]
    if not lines:
        return []
    if not math.isclose(min(ratios.values()), max(ratios.values())):
        return [*lines, "learning rate, warm-up and the teacher's decay were tuned for the shipped batches"]
    settings = list(_kept_per_sample(config, shipped, next(iter(ratios.values()))))
    return [*lines, f"to keep what was tuned per sample: {' '.join(settings)}"] if settings else []


def _kept_per_sample(config: RunConfig, shipped: RunConfig, ratio: float) -> Iterator[str]:
    wanted = {
        "lr.peak": shipped.lr.peak * math.sqrt(ratio),
        "lr.warmup_steps": round(shipped.lr.warmup_steps / ratio),
        "ema.start_decay": shipped.ema.start_decay**ratio,
        "ema.end_decay": shipped.ema.end_decay**ratio,
        "ema.anneal_steps": round(shipped.ema.anneal_steps / ratio),
    }
    for key, value in wanted.items():
        section, field = key.split(".")
        before = getattr(getattr(shipped, section), field)
        if value != before and getattr(getattr(config, section), field) == before:
            yield f"{key}={value:.9g}"
