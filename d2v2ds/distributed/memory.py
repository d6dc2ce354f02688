"""Memory that weights, optimizer and teacher take on one rank, by arithmetic alone.

Bytes for each trained element between two optimizer steps, with c bytes for a compute weight (bf16 2, fp32 4), g for
an accumulated gradient, Adam's two moments, W ranks; a teacher element adds the last two columns:

    stage   weights  master  optimizer  gradients   teacher average  teacher weights
    0       4        -       8          -           4                -
    1, 2    c        4/W     8/W        -           4/W              c/W + c (bf16), c (fp32)
    3       c/W      4/W *   8/W        g/W         4/W              c/W (bf16), - (fp32)      * - in fp32

Stage 3 also holds c for each element of the small parameters it keeps gathered, and one buffer of
`reduce_bucket_size` elements. Not counted, because they come and go: activations, gathered weights of the units in
use, and gradients in flight (stage 0: 4, stage 1: c, stage 2: g/W bytes an element, and at every stage above 0 an fp32
gradient shard of 4/W in the step itself).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Zero:
    """Settings of a DeepSpeed JSON that decide the sizes."""

    stage: int
    is_bf16: bool
    compute: int
    """Bytes of a weight that is computed with."""
    gradient: int
    """Bytes of an accumulated gradient."""

    @staticmethod
    def of(ds_config: Mapping[str, Any]) -> "_Zero":
        is_bf16 = bool(ds_config.get("bf16", {}).get("enabled", False))
        compute = 2 if is_bf16 else 4
        is_wide = ds_config.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        return _Zero(stage, is_bf16, compute, 4 if is_wide else compute)


def expected_bytes(
    trained: int, teacher: int, world: int, ds_config: Mapping[str, Any], kept_whole: int = 0, moments: int = 2
) -> dict[str, int]:
    """The formula above.

    Args:
        trained: elements of the student's trainable parameters.
        teacher: elements of the teacher's parameters; 0 without one.
        world: number of ranks.
        ds_config: a JSON from `merge_ds_config`.
        kept_whole: elements of the parameters no larger than `stage3_param_persistence_threshold` (norms, biases),
            which stage 3 keeps gathered beside their shards.
        moments: per-element states of the optimizer (Adam 2).

    Returns:
        Bytes on one rank by purpose: weights, master, optimizer, gradients, reduce_bucket, teacher_average and
        teacher_weights.
    """
    zero = _Zero.of(ds_config)
    bucket = int(ds_config.get("zero_optimization", {}).get("reduce_bucket_size", 5e8))
    shards = 1 if zero.stage == 0 else world
    working = {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0}[zero.stage] + (1 / shards if zero.is_bf16 else 0.0)
    return {
        "weights": zero.compute * (trained // world + kept_whole if zero.stage == 3 else trained),
        "master": 0 if zero.stage == 0 or (zero.stage == 3 and not zero.is_bf16) else 4 * trained // shards,
        "optimizer": 4 * moments * trained // shards,
        "gradients": zero.gradient * trained // world if zero.stage == 3 else 0,
        "reduce_bucket": zero.compute * bucket if zero.stage == 3 else 0,
        "teacher_average": 4 * teacher // shards,
        "teacher_weights": int(zero.compute * teacher * working),
    }


def passing_bytes(trained: int, world: int, ds_config: Mapping[str, Any]) -> int:
    """Bytes of gradients on one rank that come and go in a step, beside what `expected_bytes` holds.

    Args:
        trained: elements of the student's trainable parameters.
        world: number of ranks.
        ds_config: a JSON from `merge_ds_config`.
    """
    zero = _Zero.of(ds_config)
    in_flight = {0: 4.0, 1: float(zero.compute), 2: zero.gradient / world, 3: 0.0}[zero.stage]
    return int(trained * (in_flight + (4 / world if zero.stage else 0)))
