"""`Teacher` in a project that is not this one: a plain network, DeepSpeed's own optimizer, `engine.step()`."""

import ast
import inspect
import textwrap
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed import teacher as teacher_module
from d2v2ds.distributed.teacher import Teacher
from tests.distributed.engine_state import whole_masters
from tests.oracles.ema import WholeWeightEma
from tests.ranks import run_distributed

pytestmark = pytest.mark.distributed

STEPS = 4
DECAY = 0.9
THEIRS: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 3,
        "param_persistence_threshold": 60,  # DeepSpeed takes this spelling too
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_force_ds_cpu_optimizer": False,
    "flops_profiler": {"enabled": True, "profile_step": 1},
    "wall_clock_breakdown": True,
}


class Net(nn.Module):
    """Nothing of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 31), nn.GELU(), nn.LayerNorm(31), nn.Linear(31, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 7) -> (B, 5)."""
        return self.layers(x)


class Tied(nn.Module):
    """One weight under two names, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(7, 31, bias=False), nn.Linear(31, 31)
        self.again = nn.Linear(7, 31, bias=False)
        self.again.weight = self.enter.weight
        self.register_buffer("unsaved", torch.ones(31), persistent=False)
        self.register_buffer("saved", torch.ones(31))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 7) -> (B, 31)."""
        return self.leave(self.enter(x) + self.again(x) + self.unsaved.to(x.dtype))


def their_engine(config: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    model = Net()
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def follow(config: dict[str, Any]) -> dict[str, Any]:
    """Train with their loop, teacher and whole-weight average side by side."""
    engine = their_engine(config)
    teacher = Teacher(Net(), engine)
    oracle = WholeWeightEma(whole_masters(engine))
    generator = torch.Generator().manual_seed(comm.rank())
    inputs = torch.randn(4, 7, generator=generator).to(zero.compute_dtype(engine))
    for _ in range(STEPS):
        engine.backward((engine(inputs) - teacher(inputs) - 1).float().square().mean())
        engine.step()
        if engine.was_step_applied():
            teacher.update(DECAY)
        weights = whole_masters(engine)
        if comm.rank() == 0:
            oracle.update(weights, DECAY)
    seen: dict[str, Any] = {"num_updates": teacher.num_updates, "distance": teacher.student_distance()}
    averages, output = teacher.full_state_dict(), teacher(inputs)
    if comm.rank() == 0:
        seen["worst"] = max(float((averages[n] - oracle.weights[n]).abs().max()) for n in oracle.weights)
        ordinary = Net()
        ordinary.load_state_dict(averages)
        seen["forward_gap"] = float((output - ordinary.to(output.dtype)(inputs)).abs().max())
    engine.destroy()
    return seen


def documented_example() -> dict[str, Any]:
    """The module's example, as it stands there."""
    blocks = textwrap.dedent(ast.get_docstring(ast.parse(inspect.getsource(teacher_module))) or "").split("\n\n")
    (example,) = [block for block in blocks if "Teacher(" in block]
    config = THEIRS | {"train_batch_size": 16, "gradient_accumulation_steps": 2}
    names: dict[str, Any] = {"Network": Tied, "config": config, "batches": torch.randn(4, 4, 7), "decay": DECAY}
    torch.manual_seed(comm.rank())
    exec(textwrap.dedent(example), names)  # noqa: S102  (the example of our own docstring)
    return {"num_updates": names["teacher"].num_updates, "weights": names["weights"]}


def refusal(dtype: str, zero_section: dict[str, Any], **sections: Any) -> str:
    """What the constructor says to an engine of this kind."""
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "optimizer": THEIRS["optimizer"],
        "zero_optimization": zero_section,
    }
    engine = their_engine(config | {dtype: {"enabled": True}} | sections)
    with pytest.raises(ValueError) as refused:
        Teacher(Net(), engine)
    engine.destroy()
    return str(refused.value)


def all_findings() -> dict[str, Any]:
    """One launch for the whole module."""
    seen: dict[str, Any] = {"followed": follow(THEIRS)}
    seen["example"] = documented_example()
    # DeepSpeed builds fp16 engines only on processors with fp16 kernels; these engines run none.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    for stage in range(4):
        seen[f"fp16 at stage {stage}"] = refusal("fp16", {"stage": stage})
    seen["bf16 at stage 0"] = refusal("bf16", {"stage": 0})
    seen["fp32 sums at stage 1"] = refusal("bf16", {"stage": 1}, data_types={"grad_accum_dtype": "fp32"})
    # Last, because DeepSpeed keeps its groups of ranks for the engines after it.
    seen["hpz"] = refusal("bf16", {"stage": 3, "zero_hpz_partition_size": 2})
    return seen


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    return run_distributed(all_findings, 2)[0]


def test_follows_an_engine_whose_json_has_an_optimizer_and_a_schedule(findings: dict[str, Any]) -> None:
    seen = findings["followed"]
    assert seen["num_updates"] == STEPS
    assert seen["distance"] > 0.01
    assert seen["worst"] <= 1e-6
    assert seen["forward_gap"] == 0.0


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [(f"fp16 at stage {stage}", f"fp16 at ZeRO stage {stage}; use bf16 at stages 1 to 3") for stage in range(4)]
    + [
        ("bf16 at stage 0", "bf16 at ZeRO stage 0, which keeps no usable fp32 master; use stage 1, 2 or 3, or fp32"),
        ("fp32 sums at stage 1", "BF16_Optimizer at ZeRO stage 1; use stage 2 or 3, or remove data_types"),
        ("hpz", "zero_hpz_partition_size = 2: hpZ computes with a second copy of the weights"),
    ],
)  # fmt: skip
def test_engine_that_cannot_be_followed_is_refused(findings: dict[str, Any], engine: str, sentence: str) -> None:
    assert sentence in findings[engine]


def test_documented_example_runs_and_its_weights_load_into_a_network_with_tied_weights(
    findings: dict[str, Any],
) -> None:
    assert findings["example"]["num_updates"] == 2, "four micro-batches, two optimizer steps"
    network = Tied()
    network.load_state_dict(findings["example"]["weights"])
    assert network.again.weight is network.enter.weight
    weights = findings["example"]["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights["again.weight"], weights["enter.weight"], rtol=0, atol=0)
