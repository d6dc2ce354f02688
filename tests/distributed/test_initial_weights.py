"""Beginning with given weights: exact in the fp32 master and in the averages, at every stage."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2v2ds.distributed import zero
from d2v2ds.distributed.engine import optimizer_step
from d2v2ds.distributed.initial_weights import set_initial_weights
from d2v2ds.distributed.teacher import Teacher
from tests.distributed import toy
from tests.distributed.engine_state import whole_masters
from tests.ranks import run_distributed

pytestmark = pytest.mark.distributed

CONFIGS = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]
ABSENT = "blocks.1.up.weight"
"""A weight that neither source has."""


def source(seed: int) -> dict[str, Tensor]:
    """Weights of other values, in half precision to a part; not all of them."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(p.shape, generator=generator) for n, p in toy.Student().named_parameters() if n != ABSENT}
    return state | {"head.weight": state["head.weight"].half()}


def begin(stage: int, dtype: str) -> dict[str, Any]:
    """Start, look at everything, take a step."""
    engine = toy.build(stage, dtype)
    drawn = whole_masters(engine).get(ABSENT)
    teacher = Teacher(toy.Encoder(), engine)
    student_source, teacher_source = source(1), source(2)
    set_initial_weights(engine, teacher, student_source.get, teacher_source.get)
    master, average = whole_masters(engine), teacher.full_state_dict()
    inputs, target = toy.micro_batch(0, 0, 0)
    with torch.no_grad():
        loss, made = float(engine(inputs, target)), teacher(torch.ones(2, toy.WIDTH, dtype=zero.compute_dtype(engine)))
    toy.backward(engine, inputs, target, 4)
    optimizer_step(engine)
    teacher.update(0.5)
    return {
        "drawn": drawn, "master": master, "average": average, "loss": loss, "made": made.float(),
        "stepped": whole_masters(engine), "updates": teacher.num_updates,
    }  # fmt: skip


def all_starts() -> dict[Any, Any]:
    return {config: begin(*config) for config in CONFIGS}


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def starts(request: pytest.FixtureRequest) -> dict[Any, Any]:
    return run_distributed(all_starts, request.param)[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"stage{c[0]}-{c[1]}")
def test_master_and_averages_are_the_given_weights(starts: dict[Any, Any], config: tuple[int, str]) -> None:
    seen, student_source, teacher_source = starts[config], source(1), source(2)
    is_half = config[1] == "bf16"
    for name, tensor in seen["master"].items():
        expected = student_source.get(name, seen["drawn"]).float()
        # a parameter without gradient has no master
        assert torch.equal(tensor, expected.bfloat16().float() if is_half and name == "frozen" else expected), name
    for name, tensor in seen["average"].items():
        if name in teacher_source:
            assert torch.equal(tensor, teacher_source[name].float()), name
        elif name == ABSENT:
            assert torch.equal(tensor, seen["drawn"]), "the teacher copies what only the student has"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"stage{c[0]}-{c[1]}")
def test_forwards_see_the_given_weights(starts: dict[Any, Any], config: tuple[int, str]) -> None:
    seen, dtype = starts[config], torch.bfloat16 if config[1] == "bf16" else torch.float32
    networks: list[Any] = [toy.Student(), toy.Encoder()]
    for network, tensors in zip(networks, (seen["master"], seen["average"]), strict=True):
        network.load_state_dict(tensors | {"shift": torch.zeros(toy.WIDTH)}, strict=True)
        network.to(dtype)
    inputs, target = toy.micro_batch(0, 0, 0)
    with torch.no_grad():
        assert seen["loss"] == pytest.approx(float(networks[0](inputs, target)), rel=1e-6)
        torch.testing.assert_close(seen["made"], networks[1](torch.ones(2, toy.WIDTH, dtype=dtype)).float())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"stage{c[0]}-{c[1]}")
def test_training_goes_on_from_them(starts: dict[Any, Any], config: tuple[int, str]) -> None:
    seen = starts[config]
    moved = [name for name, tensor in seen["stepped"].items() if not torch.equal(tensor, seen["master"][name])]
    assert len(moved) == len(seen["master"]) - 1, "all but the frozen one"
    assert all((seen["stepped"][name] - seen["master"][name]).abs().max() < 0.1 for name in moved)
    assert seen["updates"] == 1
