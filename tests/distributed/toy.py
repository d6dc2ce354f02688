"""A small student and its teacher network with everything that partitioning gets wrong, and their engine."""

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from d2v2ds.distributed.ds_config import merge_ds_config
from d2v2ds.distributed.engine import build_student_engine, gradient_sum_factor

WIDTH = 13


class Block(nn.Module):
    """A residual feed-forward block: odd shapes, biases, a norm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 2)
        self.down = nn.Linear(3 * width + 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """What the teacher holds: blocks, a scale of one element, a frozen table and a buffer."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.linspace(-1, 1, WIDTH), requires_grad=False)
        self.scale = nn.Parameter(torch.full((1, 1), 1.5))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.skipped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(B, WIDTH) -> (B, WIDTH)."""
        x = (x + self.frozen) * self.scale + self.shift.to(x.dtype)
        for index, block in enumerate(self.blocks):
            if index not in self.skipped:
                x = self.run_block(block, x)
        return x

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block; replaced to test activation checkpointing."""
        return block(x)


class Student(Encoder):
    """The encoder and two modules that the teacher does not have, one before the others in memory order."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.front = nn.Linear(7, WIDTH)
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """(B, 7) -> (B, 5), or the summed squared error to a target."""
        prediction = self.head(super().forward(self.front(x.to(self.front.weight.dtype)).tanh()))
        return prediction if target is None else (prediction.float() - target).square().sum()


def ds_config(stage: int, dtype: str, accumulation: int = 1, **zero: Any) -> dict[str, Any]:
    """A merged JSON at toy sizes. The persistence threshold keeps norms and biases of the student gathered."""
    config: dict[str, Any] = {
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": 1000,
            "stage3_param_persistence_threshold": 60,
            **zero,
        },
        "steps_per_print": 1_000_000,
    }
    if dtype == "bf16" and stage != 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    run = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 5.0,
    }
    return merge_ds_config(config, run)


def build(
    stage: int, dtype: str, accumulation: int = 1, gather_units: tuple[type[nn.Module], ...] = (Block,), **zero: Any
) -> DeepSpeedEngine:
    """The student's engine, with the same weights every time."""
    torch.manual_seed(7)
    model = Student()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02, weight_decay=0.1)
    return build_student_engine(model, optimizer, ds_config(stage, dtype, accumulation, **zero), gather_units)


def micro_batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Inputs (4, 7) and targets (4, 5) that depend on nothing else."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 7, generator=generator), torch.randn(4, 5, generator=generator)


def backward(engine: DeepSpeedEngine, inputs: Tensor, target: Tensor, global_count: int) -> float:
    """One micro-batch's summed loss, scaled so that the gradient is that of the mean over `global_count` items."""
    loss = engine(inputs, target)
    engine.backward(loss * gradient_sum_factor(engine) / global_count)
    return float(loss.detach())
