"""One optimizer step over three modalities on two ranks: its gradient is the weighted sum of one mean for each."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from d2v2ds.distributed import comm
from d2v2ds.distributed.ds_config import load_ds_config
from d2v2ds.distributed.engine import build_student_engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.model.block import Block
from d2v2ds.objectives.data2vec2 import Data2Vec2
from d2v2ds.train.schedule import LearningRateConfig
from d2v2ds.train.step import Recipe, train_step
from tests.distributed import toy
from tests.distributed.engine_state import whole_masters
from tests.model.tiny_joint import joint_batch, joint_trunk_config
from tests.objectives.tiny import joint_objective_config
from tests.ranks import run_distributed

LR = 0.01
WEIGHTS = {"audio": 1.0, "image": 0.5, "text": 0.25}
SAMPLES = {("audio", 0): 2, ("audio", 1): 3, ("image", 0): 4, ("image", 1): 1, ("text", 0): 1, ("text", 1): 2}
"""Of each (modality, rank): means of means would be wrong."""
TEXT_FILLER_RANK = 1
"""Has a second micro-batch of text that only keeps it busy."""


def micro_batches(rank: int) -> list[Any]:
    """Two modalities with one micro-batch on each rank, text with two."""
    found = [joint_batch(name, seed=7 * rank + i, samples=SAMPLES[name, rank]) for i, name in enumerate(WEIGHTS)]
    second = joint_batch("text", seed=50 + rank, samples=2)
    return [*found, replace(second, loss_weight=0.0 if rank == TEXT_FILLER_RANK else 1.0)]


def recipe() -> Recipe:
    lr = LearningRateConfig(peak=LR, warmup_steps=0)
    return Recipe(lr=lr, total_steps=100, seed=3, loss_weights=WEIGHTS)


def build_objective() -> Data2Vec2:
    return joint_objective_config().build(joint_trunk_config(), seed=3)


def shipped_flags(stage: int) -> dict[str, Any]:
    """How the shipped configuration of a stage communicates: what ran in which micro-batch may matter to it."""
    if stage == 0:
        return {}
    section = load_ds_config(f"zero{stage}_bf16")["zero_optimization"]
    return {key: section[key] for key in ("overlap_comm", "contiguous_gradients", "reduce_scatter") if key in section}


def joint_step(stage: int) -> dict[str, Any]:
    """What plain SGD was given, and the masked counts, on rank 0."""
    objective = build_objective()
    model = objective.build_network(activation_checkpointing=False)
    objective.initialise(model, seed=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    ds_config = toy.ds_config(stage, "fp32", accumulation=4, **shipped_flags(stage)) | {"gradient_clipping": 0.0}
    engine = build_student_engine(model, optimizer, ds_config, [Block])
    objective.follow(Teacher(objective.build_teacher_network(), engine))
    before = whole_masters(engine)
    out = train_step(engine, objective, micro_batches(comm.rank()), step=0, recipe=recipe())
    after = whole_masters(engine)
    totals = {name: part.sums.reduce() for name, part in out.parts.items()}
    return {
        "gradient": {name: (before[name] - after[name]) / LR for name in before},
        "counts": {name: total.count for name, total in totals.items() if total is not None},
        "losses": {name: total.sums["regression"] for name, total in totals.items() if total is not None},
        "applied": out.applied,
    }


def reference() -> dict[str, Any]:
    """The same in one process: every batch by itself, each modality divided by its own count."""
    objective = build_objective()
    model, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network().eval()
    objective.initialise(model, seed=5)
    teacher.load_state_dict({name: model.state_dict()[name] for name in teacher.state_dict()})
    batches = [b for rank in range(2) for b in micro_batches(rank) if b.loss_weight]
    counts = {name: sum(b.num_masked for b in batches if b.modality == name) for name in WEIGHTS}
    losses = dict.fromkeys(WEIGHTS, 0.0)
    for batch in batches:
        out = model(batch, torch.no_grad()(teacher.__call__))
        losses[batch.modality] += float(out["losses"]["regression"].detach())
        (sum(out["losses"].values()) * WEIGHTS[batch.modality] / counts[batch.modality]).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"gradient": gradient, "counts": counts, "losses": losses}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_is_the_weighted_sum_of_one_mean_per_modality(stage: int) -> None:
    found, expected = run_distributed(joint_step, 2, stage)[0], reference()
    assert found["applied"]
    assert found["counts"] == expected["counts"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert all(gradient is not None and gradient.abs().sum() > 0 for name, gradient in expected["gradient"].items()
               if not name.endswith("attn.qkv.bias")), "every parameter learns in every step"  # fmt: skip
    for name, wanted in expected["gradient"].items():
        worst = (found["gradient"][name] - wanted).abs().max() / max(float(wanted.abs().max()), 1e-2)
        assert worst < 2e-3, (name, float(worst))
