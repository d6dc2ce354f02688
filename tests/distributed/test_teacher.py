"""The sharded teacher against whole-weight averaging, at every stage, on one and two ranks."""

from typing import Any

import pytest
import torch
from deepspeed.utils import get_z3_leaf_modules
from torch.utils.checkpoint import checkpoint

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.engine import build_student_engine, gradient_sum_factor, optimizer_step
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError
from tests.distributed import toy
from tests.distributed.engine_state import whole_masters
from tests.oracles.ema import WholeWeightEma
from tests.ranks import count_collectives, run_distributed

CONFIGS = [(0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
STEPS = 10
DECAYS = [0.9] * 6 + [0.5, 1.0, 0.0, 0.9997]


def train_step(engine: Any, step: int) -> None:
    for micro in range(2):
        toy.backward(engine, *toy.micro_batch(step, micro, comm.rank()), 16 * comm.world())
        optimizer_step(engine)


def follow(stage: int, dtype: str) -> dict[str, Any]:
    """Train ten steps of two micro-batches, keep teacher and oracle side by side, report what was seen."""
    seen: dict[str, Any] = {}
    engine = toy.build(stage, dtype, accumulation=2)
    torch.manual_seed(99)  # other weights than the student's: the teacher must take the student's
    teacher = Teacher(toy.Encoder(), engine)
    inputs = torch.randn(4, toy.WIDTH).to(zero.compute_dtype(engine))
    names = [name for name, _ in toy.Encoder().named_parameters()]
    weights = whole_masters(engine)
    oracle = WholeWeightEma({name: weights[name] for name in names}) if comm.rank() == 0 else None
    seen["starts_equal"] = teacher.student_distance() == 0.0
    for _ in range(3):  # ZeRO-3 keeps small parameters gathered from the second forward on
        teacher(inputs)
    seen["collectives_in_update"] = 0
    for step, decay in enumerate(DECAYS):
        engine.module.shift.add_(0.25)
        train_step(engine, step)
        before = teacher.state_dict()
        seen["collectives_in_update"] += count_collectives(lambda decay=decay: teacher.update(decay))
        if decay == 1.0:
            after = teacher.state_dict()["shards"]
            seen["frozen_at_one"] = all(torch.equal(before["shards"][n]["data"], after[n]["data"]) for n in after)
        teacher(inputs)
        weights = whole_masters(engine)
        if oracle is not None:
            oracle.update(weights, decay)
    seen["collectives_in_training"] = count_collectives(lambda: train_step(engine, STEPS))
    distance = teacher.student_distance()
    averages = teacher.full_state_dict()
    output = teacher(inputs)
    weights = whole_masters(engine)
    seen["num_updates"] = teacher.num_updates
    seen["gather_units"] = len(get_z3_leaf_modules(teacher.module))
    with pytest.raises(CheckpointError, match="blocks.0.up.weight: only in the teacher"):
        state = teacher.state_dict()
        del state["shards"]["blocks.0.up.weight"]
        teacher.load_state_dict(state)
    state = teacher.state_dict()
    teacher.update(0.0)
    teacher.load_state_dict(state)
    seen["reload_restores_output"] = torch.equal(output, teacher(inputs))
    if oracle is not None:
        seen["worst"] = {n: float((averages[n] - oracle.weights[n]).abs().max()) for n in names}
        ordinary = toy.Encoder()
        ordinary.load_state_dict(averages)
        seen["forward_gap"] = float((output - _cast(ordinary, zero.compute_dtype(engine))(inputs)).abs().max())
        seen["shift"] = float(averages["shift"].max())
        trained = [n for n in names if n != "frozen"]
        gap = sum(float((weights[n] - averages[n]).double().square().sum()) for n in trained) ** 0.5
        seen["distance"] = (distance, gap / sum(float(weights[n].double().square().sum()) for n in trained) ** 0.5)
        seen["frozen_gap"] = float((weights["frozen"].float() - averages["frozen"]).abs().max())
    seen["copied"] = copied(engine, names)
    engine.destroy()
    return seen


def copied(engine: Any, names: list[str]) -> dict[str, float]:
    """Largest difference from the wanted value after an update that copies a block and another for the same step."""
    teacher = Teacher(toy.Encoder(), engine, is_copied=lambda name: name.startswith(("blocks.1.", "frozen")))
    before = teacher.full_state_dict()
    train_step(engine, STEPS + 1)
    teacher.update(0.5)
    teacher.update(0.5, again=True)
    weights, found = whole_masters(engine), teacher.full_state_dict()
    if comm.rank() > 0:
        return {}
    moved = {name: 0.25 * before[name] + 0.75 * weights[name].float() for name in names}
    moved |= {name: weights[name].float() for name in names if name.startswith("blocks.1.")}
    moved["frozen"] = before["frozen"]
    assert not torch.equal(before["blocks.1.up.weight"], found["blocks.1.up.weight"])
    return {name: float((found[name] - moved[name]).abs().max()) for name in names}


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for param in module.parameters():
        param.data = param.data.to(dtype)
    return module.eval()


pytestmark = pytest.mark.distributed
each_config = pytest.mark.parametrize("config", CONFIGS, ids=[f"stage{s}-{d}" for s, d in CONFIGS])


def misuse() -> dict[str, str]:
    """What the teacher says when it is used wrongly, and behaviour that needs no second rank."""
    seen: dict[str, str] = {}
    engine = toy.build(3, "bf16")
    with pytest.raises(ValueError) as wider:
        Teacher(toy.Block(), engine)
    seen["foreign names"] = str(wider.value)
    other = toy.Encoder()
    other.blocks[1] = toy.Block(width=5)
    with pytest.raises(ValueError) as shapes:
        Teacher(other, engine)
    seen["other shapes"] = str(shapes.value)
    teacher = Teacher(toy.Encoder(), engine)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            teacher.update(decay)
    toy.backward(engine, *toy.micro_batch(0, 0, 0), 16)
    optimizer_step(engine)
    teacher.update(0.9)
    with pytest.raises(RuntimeError) as twice:
        teacher.update(0.9)
    seen["twice"] = str(twice.value)
    return seen


def small_moves() -> dict[str, float]:
    """A student that differs from its teacher by little, averaged at a high decay."""
    engine = toy.build(3, "bf16")
    teacher = Teacher(toy.Encoder(), engine)
    shard = zero.parameter_shards(engine)["blocks.0.up.weight"]
    start = teacher.shards()["blocks.0.up.weight"].data.clone()
    shard.data.mul_(1.5)
    for _ in range(100):
        engine.global_steps += 1
        teacher.update(0.9997)
    moved = teacher.shards()["blocks.0.up.weight"].data / start - 1
    return {"least": float(moved.min()), "expected": 0.5 * (1 - 0.9997**100)}


class Distiller(toy.Student):
    """A student that asks the teacher in the middle of its own forward, as self-distillation does."""

    def forward(self, x: torch.Tensor, teacher: Any = None) -> torch.Tensor:  # type: ignore[override]
        """(B, 7) -> summed squared error to the teacher's output."""
        local = self.front(x.to(self.front.weight.dtype)).tanh()
        target = teacher(local.detach())
        return (toy.Encoder.forward(self, 1.3 * local).float() - target.float()).square().sum()


def nested_call(stage: int, dtype: str) -> list[float]:
    """Losses of a student that calls the teacher inside its forward, drops layers and recomputes activations."""
    torch.manual_seed(7)
    model = Distiller()
    model.head.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    engine = build_student_engine(model, optimizer, toy.ds_config(stage, dtype), [toy.Block])
    engine.module.run_block = lambda block, x: checkpoint(block, x, use_reentrant=False)
    teacher = Teacher(toy.Encoder(), engine)
    losses = []
    for step in range(6):
        inputs, _ = toy.micro_batch(step, 0, comm.rank())
        engine.module.skipped = ((), (1,), (0, 2))[step % 3]
        loss = engine(inputs, teacher=teacher)
        engine.backward(loss * gradient_sum_factor(engine) / 16)
        losses.append(comm.all_reduce_sum([float(loss.detach())])[0])
        optimizer_step(engine)
        teacher.update(0.9)
    engine.destroy()
    return losses


def all_findings() -> dict[Any, Any]:
    """One launch for the whole module."""
    seen: dict[Any, Any] = {config: follow(*config) for config in CONFIGS}
    seen["misuse"] = misuse()
    seen["small moves"] = small_moves()
    seen["nested"] = {stage: nested_call(stage, "fp32") for stage in (0, 2, 3)}
    return seen


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def findings(request: pytest.FixtureRequest) -> dict[Any, Any]:
    return run_distributed(all_findings, request.param)[0]


@each_config
def test_every_parameter_equals_whole_weight_average(findings: dict, config: tuple[int, str]) -> None:
    worst = findings[config]["worst"]
    assert {"scale", "frozen", "blocks.0.norm.weight", "blocks.2.down.bias"} <= worst.keys()
    assert max(worst.values()) <= 1e-6, worst


@each_config
def test_copied_parameters_follow_the_student_and_others_the_average(findings: dict, config: tuple[int, str]) -> None:
    gaps = findings[config]["copied"]
    assert len(gaps) > 4
    assert max(gap for name, gap in gaps.items() if name.startswith("blocks.1.")) == 0.0
    assert max(gaps.values()) < 1e-6


@each_config
def test_forward_equals_ordinary_module_with_the_average(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["forward_gap"] == 0.0


@each_config
def test_update_makes_no_collective_call(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["collectives_in_update"] == 0


@each_config
def test_counter_sees_the_collectives_of_training(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["collectives_in_training"] > 0


@each_config
def test_decay_of_one_freezes_the_teacher(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["frozen_at_one"]
    assert findings[config]["num_updates"] == STEPS


@each_config
def test_starts_as_copy_and_measures_distance(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["starts_equal"]
    measured, expected = findings[config]["distance"]
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured > 0.01


@each_config
def test_buffers_follow_and_frozen_parameters_stay(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["shift"] == 0.25 * STEPS
    assert findings[config]["frozen_gap"] == 0.0


@each_config
def test_teacher_gathers_in_the_students_units(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["gather_units"] == (3 if config[0] == 3 else 0)


@each_config
def test_reloaded_state_gives_the_same_output(findings: dict, config: tuple[int, str]) -> None:
    assert findings[config]["reload_restores_output"]


def test_wrong_use_is_refused_with_names(findings: dict) -> None:
    seen = findings["misuse"]
    assert "parameter norm.weight: not in the student" in seen["foreign names"]
    assert "blocks.1.up.weight: student (41, 13), teacher (17, 5)" in seen["other shapes"]
    assert "blocks.0" not in seen["other shapes"]
    assert "called twice for optimizer step 1" in seen["twice"]


def test_small_moves_at_high_decay_are_kept(findings: dict) -> None:
    """In bf16 each of these updates would be rounded away."""
    small = findings["small moves"]
    assert small["least"] == pytest.approx(small["expected"], rel=1e-3)


def test_teacher_inside_the_forward_with_layer_drop_and_recomputation(findings: dict) -> None:
    losses = findings["nested"]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)
    assert min(losses[0]) > 1e-3
