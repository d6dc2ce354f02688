"""The shipped JSONs, the rules of merging, and that every shipped file trains without a compiler."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.ds_config import GATHERING, SHIPPED_FOLDER, load_ds_config, merge_ds_config, teacher_ds_config
from d2v2ds.distributed.engine import build_student_engine, optimizer_step
from d2v2ds.distributed.memory import expected_bytes, passing_bytes
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import ConfigError
from tests.distributed import toy
from tests.distributed.engine_state import bytes_in_use
from tests.ranks import run_distributed

SHIPPED = sorted(path.stem for path in SHIPPED_FOLDER.glob("*.json"))
RUN = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}


def test_five_configurations_are_shipped() -> None:
    expected = ["zero0_fp32_debug", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_bf16_offload"]
    assert expected == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_merges_and_every_key_is_explained(name: str) -> None:
    config = load_ds_config(name)
    merged = merge_ds_config(config, RUN)
    assert {key: merged[key] for key in RUN} == RUN
    assert "auto" not in json.dumps(merged)
    readme = (SHIPPED_FOLDER / "README.md").read_text(encoding="utf-8")
    missing = [key for key in _leaf_keys(config) if f"`{key}`" not in readme]
    assert not missing
    assert f"`{name}.json`" in readme


def _leaf_keys(config: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in config.items():
        found += _leaf_keys(value) if isinstance(value, dict) else [key]
    return found


def test_all_contradictions_are_reported_at_once_with_both_sides() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 5.0,
        "optimizer": {"type": "AdamW"},
        "zero_allow_untested_optimizer": False,
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "communication_data_type": "auto",
    }
    with pytest.raises(ConfigError) as error:
        merge_ds_config(config, RUN, source="my.json")
    text = str(error.value)
    for part in (
        "my.json says train_micro_batch_size_per_gpu = 8, the run says 4",
        "my.json says gradient_clipping = 5.0, the run says 1.0",
        "my.json has 'optimizer'",
        "my.json says zero_allow_untested_optimizer = False",
        "my.json says bf16.check_grad_overflow = False",
        'my.json leaves communication_data_type = "auto"',
        "bf16 with ZeRO stage 0",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("zero_section", "extra", "part"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, "NVMe"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "use stage 3"),
        ({"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, "another optimizer class"),
        ({"stage": 1, "overlap_comm": True}, {}, "only gradients of modules that ran in the last micro-batch"),
        (
            {"stage": 3, "zero_hpz_partition_size": 2},
            {},
            "zero_hpz_partition_size = 2: hpZ computes with a second copy",
        ),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_quantized_weights = True: .* compiles"),
        ({"stage": 3, "zero_quantized_gradients": True}, {}, "zero_quantized_gradients = True: .* compiles"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, {}, "nontrainable_weights = True: .* int8"),
        (
            {"stage": 3},
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "averages fp32 master weights",
        ),
        ({"stage": 2, "cpu_offload": True}, {}, 'cpu_offload, .* "offload_optimizer"'),
        ({"stage": 3, "cpu_offload_param": True}, {}, 'cpu_offload_param, .* "offload_param"'),
        ({"stage": 3, "cpu_offload_params": True}, {}, 'cpu_offload_params, .* "offload_param"'),
        ({"stage": 3, "cpu_offload_use_pin_memory": True}, {}, 'pin_memory, .* "pin_memory"'),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offloads weights to NVMe"),
    ],
)
def test_combinations_that_deepspeed_gets_wrong_are_refused(zero_section: dict, extra: dict, part: str) -> None:
    config = {"bf16": {"enabled": True}, "zero_optimization": zero_section, **extra}
    with pytest.raises(ConfigError, match=part):
        merge_ds_config(config, RUN)


def test_switched_off_is_not_refused() -> None:
    off = {
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "offload_optimizer": None,
        "offload_param": None,
    }
    merge_ds_config({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, **off}}, RUN)


def test_merging_leaves_its_argument_alone() -> None:
    config = load_ds_config("zero3_bf16")
    before = json.dumps(config)
    teacher_ds_config(merge_ds_config(config, RUN))
    assert json.dumps(config) == before


def test_teacher_inherits_how_weights_are_gathered_and_nothing_else() -> None:
    ours = merge_ds_config(load_ds_config("zero3_bf16_offload"), RUN)
    derived = teacher_ds_config(ours | {"optimizer": {"type": "AdamW"}, "tensorboard": {"enabled": True}})
    assert derived.keys() == {"train_micro_batch_size_per_gpu", "bf16", "zero_optimization"}
    same = {key: ours["zero_optimization"][key] for key in derived["zero_optimization"]}
    assert derived["zero_optimization"] == same | {"stage3_param_persistence_threshold": 0}
    assert len(same) == 6


def test_gathering_keys_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig.model_fields.keys() >= GATHERING


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero3_bf16_offload"):
        load_ds_config("zero4")
    broken = tmp_path / "x.json"
    broken.write_text("{,")
    with pytest.raises(ConfigError, match="expected JSON"):
        load_ds_config(broken)


def train_shipped() -> dict[str, Any]:
    """Two steps with each shipped file; the compiler is out of reach."""
    import os

    os.environ["PATH"] = "/nowhere"
    seen = {}
    for name in SHIPPED:
        torch.manual_seed(7)
        model = toy.Student()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
        config = merge_ds_config(load_ds_config(name), RUN)
        engine = build_student_engine(model, optimizer, config, [toy.Block])
        teacher = Teacher(toy.Encoder(), engine)
        for step in range(2):
            for micro in range(2):
                toy.backward(engine, *toy.micro_batch(step, micro, comm.rank()), 16)
                outcome = optimizer_step(engine)
            teacher.update(0.5)
            teacher(torch.ones(2, toy.WIDTH, dtype=zero.compute_dtype(engine)))
        expected = expected_bytes(
            trained=sum(p.numel() for p in toy.Student().parameters() if p.requires_grad),
            teacher=sum(p.numel() for p in toy.Encoder().parameters()),
            world=comm.world(),
            ds_config=config,
            kept_whole=sum(p.numel() for p in toy.Student().parameters()),  # all are below the threshold
        )
        seen[name] = (outcome.applied, teacher.student_distance(), expected, bytes_in_use(engine, teacher))
        engine.destroy()
    return seen


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return run_distributed(train_shipped, 2)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_trains_with_a_teacher_and_no_compiler(trained: dict, name: str) -> None:
    applied, distance, _, _ = trained[name]
    assert applied
    assert distance == pytest.approx(trained["zero0_fp32_debug"][1], rel=1e-2)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHIPPED)
def test_memory_held_is_that_of_the_formula(trained: dict, name: str) -> None:
    _, _, expected, held = trained[name]
    assert held.keys() == expected.keys()
    for purpose, nbytes in expected.items():
        if name == "zero3_bf16_offload" and purpose == "gradients":
            continue  # a second, fp32 copy lies beside the offloaded optimizer
        assert held[purpose] == pytest.approx(nbytes, rel=0.1, abs=200), purpose


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"foo_bar": 1}, "unknown key 'foo_bar'"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"activation_checkpointing": {"partition_activations": True}}, "has 'activation_checkpointing': remove it"),
        ({"zero_optimization": 3}, "zero_optimization is 3, expected an object"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage = 9: Input should be"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size = 'many'"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage = '3' is text; write 3"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op = 'sum', expected one of 'mean'"),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "zero_optimization: Value error, compute_grad_norm=fal",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm = False, expected",
        ),
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}}, "unheard_of"),
        ({"bf16": {"enable": True}}, "bf16.enable = True: Extra inputs are not permitted; did you mean 'enabled'?"),
        ({"bf16": {"enabled": "certainly"}}, "bf16.enabled = 'certainly': Input should be a valid boolean"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled = 'false' is text; write false"),
        ({"comms_logger": {"enabled": True, "verbos": True}}, "comms_logger.verbos = True"),
        (
            {"data_types": {"grad_accum_type": "fp32"}},
            "unknown key data_types.grad_accum_type; did you mean 'grad_accum_dtype'?",
        ),
        ({"data_types": {"grad_accum_dtype": "fp23"}}, "data_types.grad_accum_dtype = 'fp23', expected one of"),
        ({"flops_profiler": {"enable": True}}, "unknown key flops_profiler.enable; did you mean 'enabled'?"),
        (
            {"communication_data_type": "fp23"},
            "communication_data_type = 'fp23', expected one of 'bf16', 'fp16', 'fp32'",
        ),
    ],
)
def test_what_deepspeed_would_pass_over_or_stumble_on_is_found_when_the_file_is_read(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(load_ds_config("zero3_bf16") | change | {"unheard_of": 1}))
    with pytest.raises(ConfigError) as error:
        load_ds_config(path)
    assert sentence in str(error.value)
    assert "unheard_of" in str(error.value), "all at once"
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_pass_the_check_of_others(name: str, tmp_path: Path) -> None:
    copy = tmp_path / f"{name}.json"
    copy.write_bytes((SHIPPED_FOLDER / f"{name}.json").read_bytes())
    assert load_ds_config(copy) == load_ds_config(name)


def test_passing_gradients_follow_the_table() -> None:
    bf16 = {"bf16": {"enabled": True}}
    found = [passing_bytes(1000, 4, {"zero_optimization": {"stage": stage}} | bf16) for stage in (1, 2, 3)]
    assert found == [2000 + 1000, 500 + 1000, 1000]
    assert passing_bytes(1000, 4, {}) == 4000
