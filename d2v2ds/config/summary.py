"""Sizes, memory, steps and operations of a configuration, without data and without a process group."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from d2v2ds.config.load import CONFIG_FOLDER, load_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.data.reader import Unit
from d2v2ds.distributed.ds_config import load_ds_config
from d2v2ds.distributed.memory import expected_bytes, passing_bytes
from d2v2ds.modalities.known import known_modalities
from d2v2ds.objectives.protocol import Objective

BYTES = ((2**30, "GiB"), (2**20, "MiB"))
OPERATIONS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))

OFFLOADED = ("master", "optimizer", "gradients", "teacher_average")
"""Tensors that `offload_optimizer` moves to the host: gradients follow Adam, the average follows the master."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _sized(value: float, units: Sequence[tuple[float, str]]) -> str:
    """A number with the largest unit that it fills, else with the smallest."""
    of, unit = next((entry for entry in units if value >= entry[0]), units[-1])
    return f"{_number(value / of)} {unit}"


def _bytes(size: float) -> str:
    return _sized(size, BYTES)


def _amount(value: float, unit: Unit) -> str:
    return _sized(value, (*unit.larger, (1, unit.label)))


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
    objective = config.objective.build(config.model, config.run.seed)
    with torch.device("meta"):
        student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network()
    trunk = _count(student.trunk)  # type: ignore[arg-type]
    whole, trained = _count(student), _count(student, trained_only=True)
    of_teacher = 0 if teacher is None else _count(teacher)
    lines = [
        f"parameters: student {whole:,} (trained {trained:,}), of these decoder or head {whole - trunk:,}; trunk "
        f"{trunk:,}; teacher {of_teacher:,}"
    ]
    lines += _memory(config, student, of_teacher, world)
    lines += _length(config, objective, world)
    return lines


def _memory(config: RunConfig, student: nn.Module, teacher: int, world: int) -> list[str]:
    ds_config = load_ds_config(config.engine.deepspeed)
    section = ds_config.get("zero_optimization", {})
    stage, threshold = section.get("stage", 0), section.get("stage3_param_persistence_threshold", 0)
    kept_whole = sum(p.numel() for p in student.parameters() if p.numel() <= threshold) if stage == 3 else 0
    held = expected_bytes(_count(student, trained_only=True), teacher, world, ds_config, kept_whole)
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
    """Describe how the micro-batches of a step are distributed over ranks."""
    accumulation = math.ceil(num_micro / world)
    idle = accumulation * world - num_micro
    return f"{num_micro} micro-batches, accumulation {accumulation} on {world} rank(s)" + (
        f", {idle} of {accumulation * world} turns without data" if idle else ""
    )


def _length(config: RunConfig, objective: Objective, world: int) -> list[str]:
    steps, flops, lines = config.total_steps, 0.0, [f"length: {config.total_steps:,} optimizer steps"]
    for name, data in config.data.modalities.items():
        settings, unit = config.model.modalities[name], known_modalities()[name].unit
        samples, size = data.largest_samples(settings)
        amount, tokens = data.global_batch, settings.num_tokens(size)
        try:
            described, one = objective.describe(name, tokens), objective.flops(name, 1, size)
        except ValueError as error:
            raise ValueError(f"objective.modalities.{name}.mask: {error}") from error
        flops += steps * samples * one
        lines.append(
            f"{name}: {_number(amount)} {unit.label} per step, {_amount(amount * steps, unit)} in all; {tokens} tokens "
            f"a sample, {described}; {_turns(data.num_micro, world)}"
        )
    lines.append(
        f"operations: {_sized(flops / steps, OPERATIONS)} per step, {flops:.3g} FLOP in all "
        "(of the tokens that each network reads, teacher included)"
    )
    return lines


def batch_advice(name: str, config: RunConfig) -> list[str]:
    """Recommend settings to change if the global batch differs from that of the shipped recipe.

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
    ours, theirs = config.data.modalities, shipped.data.modalities
    ratios = {one: ours[one].global_batch / theirs[one].global_batch for one in ours if one in theirs}
    lines = [
        f"{one}: a global batch of {_number(ours[one].global_batch)} {known_modalities()[one].unit.label}, {ratio:.3g} "
        f"times the {_number(theirs[one].global_batch)} of {name}"
        for one, ratio in ratios.items()
        if not math.isclose(ratio, 1.0)
    ]
    if not lines:
        return []
    if not math.isclose(min(ratios.values()), max(ratios.values())):
        return [*lines, "learning rate, warm-up and the teacher's decay were tuned for the shipped batches"]
    settings = list(_kept_per_sample(config, shipped, next(iter(ratios.values()))))
    return [*lines, f"to keep what was tuned per sample: {' '.join(settings)}"] if settings else []


def _kept_per_sample(config: RunConfig, shipped: RunConfig, ratio: float) -> Iterator[str]:
    wanted = {
        "lr.peak": (shipped.lr.peak * math.sqrt(ratio), shipped.lr.peak, config.lr.peak),
        "lr.warmup_steps": (round(shipped.lr.warmup_steps / ratio), shipped.lr.warmup_steps, config.lr.warmup_steps),
    }
    before, now = shipped.objective.scaled(1.0), config.objective.scaled(1.0)
    for key, value in shipped.objective.scaled(ratio).items():
        wanted[f"objective.{key}"] = value, before[key], now.get(key, math.nan)
    for key, (value, of_recipe, own) in wanted.items():
        if value != of_recipe and own == of_recipe:
            yield f"{key}={value:.9g}"
