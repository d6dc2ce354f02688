"""The model reproduces the official computation, and the comparison can fail."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v2ds.interop.fairseq.keymap import to_official, to_ours
from d2v2ds.interop.fairseq.official_config import network_of
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError, conv_layers
from d2v2ds.verify.__main__ import main
from d2v2ds.verify.case import case_names
from d2v2ds.verify.check import verify_case
from tests.oracles.official_step import Options, write_case

MICRO = Path(__file__).parents[1] / "golden" / "micro"
LARGER = Path(os.environ["D2V2_REFERENCE"]) / "golden" if "D2V2_REFERENCE" in os.environ else None
"""More cases of the same format, which do not travel with the project."""


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("audio_micro", {"gradient alibi", "student pos_conv_out"}),
        ("image_micro", {"gradient extra", "loss cls", "cls_pred", "cls_target"}),
        ("text_micro", {"student local_features"}),
    ],
)
def test_micro_case_passes_far_below_the_tolerance(name: str, own: set[str]) -> None:
    report, problem = verify_case(MICRO, name, tolerance=5e-5)
    assert problem == ""
    assert report.passed
    assert {"loss total", "gradient local", "EMA step", "targets"} | own <= set(report.errors)


if LARGER is not None:

    @pytest.mark.parametrize("name", case_names(LARGER, None))
    def test_larger_case_passes(name: str) -> None:
        report, problem = verify_case(LARGER, name, tolerance=1e-4)
        assert problem == ""
        assert report.passed, report.errors
        assert ("traj final student" in report.errors) == (LARGER / f"{name}.traj.json").exists()


CASES = {
    "six_heads": Options(),
    "twelve_heads_no_prenet_one_mask": Options(width=96, heads=12, prenet=0, depth=3, masks=1, decoder_width=96),
    "odd_kernels": Options(position_kernel=7, decoder_kernel=5),
    "padded": Options(real_samples=(900, 520)),
    "padded_without_alibi": Options(real_samples=(900, 300), scale_shape="none"),
    "padding_that_covers_no_token": Options(real_samples=(900, 899)),
    "uneven_and_padded": Options(uneven=True, masks=4, real_samples=(900, 600)),
    "own_front_end": Options(own_front_end=True),
    "scale_per_block": Options(scale_shape="block"),
    "one_scale": Options(scale_shape="one"),
    "fixed_scale": Options(learned_scale=False),
    "smooth_l1_and_other_norms": Options(beta=1.5, layer_norm="layer", final_norm="instance"),
}


@pytest.mark.parametrize("name", CASES)
def test_second_implementation_agrees(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, name, CASES[name])
    report, problem = verify_case(tmp_path, name, tolerance=1e-4)
    assert problem == ""
    assert report.passed, report.errors


def test_pre_norm_block_is_unsupported_by_name(tmp_path: Path) -> None:
    write_case(tmp_path, "pre_norm", Options(), {"layer_norm_first": True})
    assert verify_case(tmp_path, "pre_norm", 1e-4)[1] == "unsupported: layer_norm_first=True"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    shutil.copytree(MICRO, folder)
    return folder


@pytest.mark.parametrize(
    "file, key, quantity",
    [
        ("audio_micro.safetensors", "student/blocks.1.attn.qkv.weight", "student block1_out"),
        ("audio_micro.safetensors", "teacher/blocks.0.norm1.bias", "targets"),
        ("audio_micro.safetensors", "in/source", "student local_features"),
        ("audio_micro.grads.safetensors", "grad/modality_encoders.AUDIO.alibi_scale", "gradient alibi"),
        ("audio_micro.grads.safetensors", "ema_after/blocks.1.mlp.fc2.weight", "EMA step"),
        ("image_micro.safetensors", "student/modality_encoders.IMAGE.extra_tokens", "student context_in"),
        ("image_micro.safetensors", "teacher/modality_encoders.IMAGE.local_encoder.proj.weight", "targets"),
        ("image_micro.safetensors", "student/modality_encoders.IMAGE.decoder.blocks.1.0.weight", "decoder_out"),
        ("image_micro.grads.safetensors", "grad/modality_encoders.IMAGE.local_encoder.proj.bias", "gradient local"),
        (
            "text_micro.safetensors",
            "student/modality_encoders.TEXT.local_encoder.layernorm_embedding.weight",
            "targets",
        ),
        ("text_micro.safetensors", "teacher/1.mlp.fc2.weight", "targets"),
        ("text_micro.safetensors", "student/modality_encoders.TEXT.decoder.proj.2.bias", "decoder_out"),
    ],
)
def test_corrupted_tensor_fails(copy: Path, file: str, key: str, quantity: str) -> None:
    tensors = load_file(copy / file)
    flat = tensors[key].flatten()
    flat[flat.abs().argmax()] *= 1.5
    save_file(tensors, copy / file)
    report, problem = verify_case(copy, file.split(".")[0], tolerance=1e-4)
    assert problem == ""
    assert report.errors[quantity] > 1e-4
    assert not report.passed
    assert main([str(copy)]) == 1


def test_nan_in_a_vector_fails(copy: Path) -> None:
    tensors = load_file(copy / "audio_micro.safetensors")
    tensors["out/targets_full"][0, 0, 0] = float("nan")
    save_file(tensors, copy / "audio_micro.safetensors")
    report, _ = verify_case(copy, "audio_micro", tolerance=1e-4)
    assert report.errors["targets"] == float("inf")


def test_tensor_that_nothing_is_compared_with_fails(copy: Path) -> None:
    tensors = load_file(copy / "audio_micro.safetensors")
    save_file(tensors | {"mid/student/somewhere_else": torch.zeros(3)}, copy / "audio_micro.safetensors")
    assert "nothing to compare with mid/student/somewhere_else" in verify_case(copy, "audio_micro", 1e-4)[1]


def test_missing_weight_and_truncated_file_fail_with_a_reason(copy: Path) -> None:
    tensors = load_file(copy / "audio_micro.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "student/blocks.0.norm1.bias"}, copy / "audio_micro.safetensors"
    )
    assert "blocks.0.norm1.bias" in verify_case(copy, "audio_micro", 1e-4)[1]
    path = copy / "audio_micro.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "SafetensorError" in verify_case(copy, "audio_micro", 1e-4)[1]


@pytest.mark.parametrize(
    "option",
    [
        {"layer_norm_first": True},
        {"never_heard_of": 3},
        {"encoder_dropout": 0.1},
        {"post_mlp_drop": 0.2},
        {"layerdrop": 0.1},
    ],
)
def test_unsupported_option_is_named_and_fails(copy: Path, option: dict, capsys: pytest.CaptureFixture[str]) -> None:
    meta = json.loads((copy / "audio_micro.json").read_text())
    meta["model"] |= option
    (copy / "audio_micro.json").write_text(json.dumps(meta))
    assert main([str(copy)]) == 1
    assert f"unsupported: {next(iter(option))}=" in capsys.readouterr().out


def test_a_dropout_that_is_left_to_its_default_is_named(copy: Path) -> None:
    meta = json.loads((copy / "text_micro.json").read_text())
    del meta["model"]["modalities"]["text"]["dropout"]
    (copy / "text_micro.json").write_text(json.dumps(meta))
    assert verify_case(copy, "text_micro", 1e-4)[1].startswith("unsupported: dropout=0.1 (expected 0")


def test_a_loss_that_the_case_has_not_recorded_is_named(copy: Path) -> None:
    meta = json.loads((copy / "image_micro.json").read_text())
    assert meta["model"]["cls_loss"]
    tensors = load_file(copy / "image_micro.safetensors")
    save_file({key: v for key, v in tensors.items() if key != "loss/cls"}, copy / "image_micro.safetensors")
    assert verify_case(copy, "image_micro", 1e-4)[1] == "D2V2Error: expected loss/cls in the case, found none"


@pytest.mark.parametrize("file", ["audio_micro.json", "audio_micro.safetensors", "audio_micro.grads.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "cut"])
@pytest.mark.parametrize("modality", [[], ["--modality", "audio"]])
def test_a_damaged_case_fails_and_the_others_are_still_compared(
    file: str, damage: str, modality: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cases"
    shutil.copytree(MICRO, folder)
    if damage == "removed":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
    assert main([str(folder), *modality]) == 1
    said = capsys.readouterr().out
    assert "FAIL audio_micro: " in said
    if not modality:
        assert "pass image_micro" in said and "2 of 3 cases pass" in said


@pytest.mark.parametrize("ending", [".traj.json", ".traj.safetensors"])
def test_half_a_trajectory_fails(ending: str, copy: Path) -> None:
    (copy / f"audio_micro{ending}").write_bytes(b"{}")
    assert main([str(copy)]) == 1


def test_files_that_are_no_case_are_left_alone(copy: Path) -> None:
    (copy / "schedules.json").write_text('{"cosine": [1]}')
    save_file({"x": torch.zeros(1)}, copy / "adam_steps.safetensors")
    assert case_names(copy, None) == ["audio_micro", "image_micro", "text_micro"]


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2


@pytest.mark.parametrize("modality", ["audio", "image", "text"])
def test_official_names_translate_back_and_forth(modality: str) -> None:
    tensors = load_file(MICRO / f"{modality}_micro.safetensors")
    official = [key.removeprefix("student/") for key in tensors if key.startswith("student/")]
    assert official
    assert [to_official(to_ours(name) or "") for name in official] == official


def test_layer_list_is_read_without_being_executed() -> None:
    assert conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2")[-1] == (512, 2, 2)
    with pytest.raises(ValueError, match="feature_encoder_spec"):
        conv_layers("__import__('os').getcwd()")
    with pytest.raises(UnsupportedOptionError, match="modality=smell"):
        network_of({}, "smell")


def test_verify_does_not_need_a_process_group() -> None:
    assert not torch.distributed.is_initialized()
