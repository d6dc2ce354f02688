"""Loss scaling, gradient norm, skipped steps and skipped blocks of the student engine, against plain torch."""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.engine import StepOutcome, build_student_engine, gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.distributed.gradient_norms import PartNorms
from tests.distributed import toy
from tests.distributed.engine_state import whole_masters
from tests.ranks import run_distributed

pytestmark = pytest.mark.distributed

CONFIGS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
ACCUMULATION = 2
WORLD = 2
COUNTS = {(0, 0): 5, (0, 1): 1, (1, 0): 2, (1, 1): 9}
"""Items that (rank, micro-batch) contributes to the step: a mean of means would be wrong."""
TOTAL = sum(COUNTS.values())
LR = 0.5


def sgd_engine(stage: int, dtype: str, clip: float = 1e9, accumulation: int = ACCUMULATION, **zero_keys: Any) -> Any:
    torch.manual_seed(7)
    model = toy.Student()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=LR)
    config = toy.ds_config(stage, dtype, accumulation, **zero_keys) | {"gradient_clipping": clip}
    return build_student_engine(model, optimizer, config, [toy.Block])


def item_loss(model: Any, rank: int, micro: int, step: int = 0) -> torch.Tensor:
    """Sum over this rank's and micro-batch's items."""
    inputs, target = toy.micro_batch(step, micro, rank)
    repeats = COUNTS[rank, micro]
    return model(inputs.repeat(3, 1)[:repeats], target.repeat(3, 1)[:repeats])


def run_step(engine: Any, step: int = 0, skipped: tuple[tuple[int, ...], ...] = ((), ())) -> StepOutcome:
    """One optimizer step whose gradient is that of the mean over all ranks' items."""
    outcome = None
    for micro in range(ACCUMULATION):
        engine.module.skipped = skipped[micro]
        loss = item_loss(engine, comm.rank(), micro, step)
        engine.backward(loss * gradient_sum_factor(engine) / TOTAL)
        outcome = optimizer_step(engine)
        assert (outcome is None) == (micro < ACCUMULATION - 1)
    assert outcome is not None
    return outcome


def whole(engine: Any) -> dict[str, torch.Tensor]:
    return {name: full.float() for name, full in whole_masters(engine).items()}


def gradient(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What plain SGD was given."""
    return {name: (before[name] - after[name]) / LR for name in before}


def reference_gradient(step: int, skipped: tuple[tuple[int, ...], ...], dtype: str) -> dict[str, torch.Tensor]:
    """The same step in one process and plain torch: sum over everything divided by the count of everything."""
    torch.manual_seed(7)
    model = toy.Student()
    if dtype == "bf16":
        for param in model.parameters():
            param.data = param.data.bfloat16()
    total: dict[str, torch.Tensor] = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    for rank in range(WORLD):
        for micro in range(ACCUMULATION):
            model.zero_grad()
            model.skipped = skipped[micro]
            (item_loss(model, rank, micro, step) / TOTAL).backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    total[name] += param.grad.float()
    return total


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def worst_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any parameter relative to the largest gradient of all."""
    scale = max(float(t.abs().max()) for t in expected.values())
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / scale


def part_of(name: str) -> str:
    """Parts that alternate in the model's order, one of them of single numbers."""
    return "norms" if ".norm." in name else name.split(".")[0]


def scaling(stage: int, dtype: str, **zero_keys: Any) -> dict[str, Any]:
    """Gradient and norm of one step; then the same with clipping."""
    seen: dict[str, Any] = {}
    for clip in (1e9, 0.25):
        engine = sgd_engine(stage, dtype, clip, **zero_keys)
        before = whole(engine)
        norms = PartNorms(engine, part_of)
        norms.ask()
        seen["norm", clip] = run_step(engine).grad_norm
        seen["parts", clip] = norms.take(seen["norm", clip])
        seen["groups"] = len(zero.flat_groups(engine))
        seen["factor"] = gradient_sum_factor(engine)
        applied = gradient(before, whole(engine))  # empty on other ranks than 0
        seen["applied_norm", clip] = norm(applied)
        if comm.rank() == 0 and clip == 1e9:
            expected = reference_gradient(0, ((), ()), dtype)
            seen["gap"] = worst_gap(applied, expected)
            seen["expected_norm"] = norm(expected)
            seen["expected_parts"] = {
                part: norm({n: t for n, t in expected.items() if part_of(n) == part}) for part in seen["parts", clip]
            }
        engine.destroy()
    return seen


def skipped_blocks(stage: int, **zero_keys: Any) -> dict[str, Any]:
    """Layer drop: block 1 runs in step 0, nowhere in step 1, in one micro-batch of steps 2 and 3."""
    plan = [((), ()), ((1,), (1,)), ((1,), ()), ((), (1,))]
    engine = sgd_engine(stage, "fp32", **zero_keys)
    gaps, untouched = [], None
    for step, skipped in enumerate(plan):
        reset_weights(engine)
        before = whole(engine)
        run_step(engine, step, skipped)
        found = gradient(before, whole(engine))
        if comm.rank() == 0:
            gaps.append(worst_gap(found, reference_gradient(step, skipped, "fp32")))
            if step == 1:
                untouched = all(bool((found[n] == 0).all()) for n in found if n.startswith("blocks.1."))
    engine.destroy()
    return {"gaps": gaps, "untouched": untouched}


def reset_weights(engine: Any) -> None:
    """Put the initial weights back, so that each step can be compared by itself."""
    torch.manual_seed(7)
    initial = dict(toy.Student().named_parameters())
    for name, shard in zero.parameter_shards(engine).items():
        shard.data.copy_(initial[name].detach().reshape(-1)[shard.offset : shard.offset + shard.numel])
    zero.refresh_compute_copies(engine)


def non_finite(stage: int, dtype: str) -> dict[str, Any]:
    """A NaN in one micro-batch of rank 1 only; compared with a run that never saw that step."""
    ends = []
    outcomes = []
    for poisoned in (True, False):
        engine = toy.build(stage, dtype, accumulation=ACCUMULATION)
        for step in (0, 1, 2):
            if step == 1 and not poisoned:
                continue
            for micro in range(ACCUMULATION):
                inputs, target = toy.micro_batch(step, micro, comm.rank())
                if step == 1 and micro == 0 and comm.rank() == 1:
                    inputs[0, 0] = math.nan
                toy.backward(engine, inputs, target, 16)
                outcome = optimizer_step(engine)
            if poisoned:
                outcomes.append((outcome.applied, outcome.grad_norm))
        ends.append(zero_state(engine))
        engine.destroy()
    same = [torch.equal(a, b) for a, b in zip(*ends, strict=True)]
    return {"outcomes": outcomes, "all_same": all(comm.gather_objects(all(same))), "tensors": len(same)}


def zero_state(engine: Any) -> list[torch.Tensor]:
    """Every master shard and every optimizer moment of this rank."""
    tensors = [shard.data.clone() for shard in zero.parameter_shards(engine).values()]
    state = zero.client_optimizer(engine).state
    for group in zero.flat_groups(engine):
        for value in state[group.flat].values():
            if torch.is_tensor(value) and value.numel() == group.flat.numel():
                tensors += [value.view(-1)[start : start + n].clone() for _, start, n in group.members]
            else:
                tensors.append(torch.as_tensor(value).clone())
    return tensors


def recomputation(dtype: str) -> bool:
    """Stage 3 with activation checkpointing per block gives the same weights, bit for bit."""
    ends = []
    for recompute in (False, True):
        engine = toy.build(3, dtype, accumulation=ACCUMULATION)
        if recompute:
            engine.module.run_block = lambda block, x: checkpoint(block, x, use_reentrant=False)
        for step in range(3):
            for micro in range(ACCUMULATION):
                toy.backward(engine, *toy.micro_batch(step, micro, comm.rank()), 16)
                optimizer_step(engine)
        ends.append(zero_state(engine))
        engine.destroy()
    return all(comm.gather_objects(all(torch.equal(a, b) for a, b in zip(*ends, strict=True))))


def scaled_rates() -> list[float]:
    engine = sgd_engine(3, "fp32")
    engine.optimizer.param_groups[0]["lr_scale"] = 0.1
    set_lr(engine, lambda scale: 2.0 * scale)
    rates = [group["lr"] for group in zero.client_optimizer(engine).param_groups]
    engine.destroy()
    return rates


def all_findings() -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for stage, dtype in CONFIGS:
        seen["scaling", stage, dtype] = scaling(stage, dtype)
        seen["non_finite", stage, dtype] = non_finite(stage, dtype)
    seen["scaling", 3, "offload"] = scaling(3, "fp32", offload_optimizer={"device": "cpu"})
    seen["scaling", 3, "sub-groups"] = scaling(3, "fp32", sub_group_size=400)
    for stage in range(4):
        seen["skipped", stage] = skipped_blocks(stage)
    seen["skipped", "offload"] = skipped_blocks(3, offload_optimizer={"device": "cpu"})
    seen["recomputation"] = [recomputation(dtype) for dtype in ("fp32", "bf16")]
    seen["rates"] = scaled_rates()
    return seen


@pytest.fixture(scope="module")
def findings() -> dict[Any, Any]:
    return run_distributed(all_findings, WORLD, timeout_s=120)[0]


each_config = pytest.mark.parametrize("config", CONFIGS, ids=[f"stage{s}-{d}" for s, d in CONFIGS])


@each_config
def test_factor_turns_averages_into_the_gradient_of_the_global_mean(findings: dict, config: tuple[int, str]) -> None:
    seen = findings["scaling", *config]
    assert seen["factor"] == ACCUMULATION * WORLD
    assert seen["gap"] < (1e-5 if config[1] == "fp32" else 2e-2)


@each_config
def test_reported_norm_is_the_averaged_gradients_before_clipping(findings: dict, config: tuple[int, str]) -> None:
    seen = findings["scaling", *config]
    tolerance = 1e-5 if config[1] == "fp32" else 1e-2
    assert seen["norm", 1e9] == pytest.approx(seen["expected_norm"], rel=tolerance)
    assert seen["norm", 0.25] == pytest.approx(seen["norm", 1e9], rel=1e-5)
    assert seen["applied_norm", 1e9] == pytest.approx(seen["norm", 1e9], rel=1e-3)
    assert seen["applied_norm", 0.25] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("config", [*CONFIGS, (3, "offload"), (3, "sub-groups")], ids=str)
def test_norms_of_parts_are_those_of_the_whole_gradient_before_clipping(findings: dict, config: tuple) -> None:
    seen = findings["scaling", *config]
    assert list(seen["parts", 1e9]) == ["scale", "norms", "blocks", "front", "head"]
    tolerance = 1e-2 if config[1] == "bf16" else 1e-5
    assert seen["parts", 1e9] == pytest.approx(seen["expected_parts"], rel=tolerance)
    assert seen["parts", 0.25] == pytest.approx(seen["parts", 1e9], rel=1e-5)
    assert (seen["groups"] > 1) == (config[1] == "sub-groups" or config[0] == 0)


@each_config
def test_non_finite_gradient_of_one_rank_skips_the_step_on_all(findings: dict, config: tuple[int, str]) -> None:
    seen = findings["non_finite", *config]
    assert [applied for applied, _ in seen["outcomes"]] == [True, False, True]
    assert seen["outcomes"][1][1] == math.inf
    assert seen["all_same"] and seen["tensors"] > 20


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "offload"])
def test_skipped_block_has_zero_gradient_that_step(findings: dict, stage: int | str) -> None:
    seen = findings["skipped", stage]
    assert seen["untouched"]
    assert max(seen["gaps"]) < 1e-5, seen["gaps"]


def decay_of_a_skipped_block() -> float:
    """What weight decay leaves of a block that no micro-batch of the step ran, over what it was."""
    engine = sgd_engine(0, "fp32", accumulation=1)
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.1
    weight = next(p for name, p in engine.module.named_parameters() if name.startswith("blocks.1."))
    before = weight.detach().clone()
    engine.module.skipped = (1,)
    toy.backward(engine, *toy.micro_batch(0, 0, 0), 16)
    assert optimizer_step(engine).applied
    return float((weight.detach() / before).mean())


def test_one_rank_at_stage_0_updates_a_skipped_block_as_several_do() -> None:
    assert run_distributed(decay_of_a_skipped_block, 1, timeout_s=60) == [pytest.approx(1 - 0.1 * LR)]


def test_activation_checkpointing_under_stage_3_changes_nothing(findings: dict) -> None:
    assert findings["recomputation"] == [True, True]


def test_rate_of_a_group_is_scaled(findings: dict) -> None:
    assert findings["rates"] == [pytest.approx(0.2)]
