"""A second implementation reproduces the recorded vectors, and the model reproduces its cases beyond them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from d2v2ds.verify.check import verify_case
from d2v2ds.verify.report import Report
from tests.oracles.official_image_text import ABSENT, Case, write_case
from tests.oracles.official_model import GIVEN, compute

MICRO = Path(__file__).parents[1] / "golden" / "micro"


@pytest.mark.parametrize("name, tolerance", [("image_micro", 2e-5), ("text_micro", 2e-5), ("audio_micro", 5e-5)])
def test_second_implementation_reproduces_every_recorded_tensor(name: str, tolerance: float) -> None:
    meta = json.loads((MICRO / f"{name}.json").read_text())
    tensors = load_file(MICRO / f"{name}.safetensors")
    expected = tensors | load_file(MICRO / f"{name}.grads.safetensors")
    given = {key: value for key, value in tensors.items() if key.startswith(GIVEN)}
    out, grads = compute(meta["modality"], meta["model"], given)
    found = out | grads
    assert set(found) == set(expected) - set(given)
    report = Report(tolerance)
    for key, value in found.items():
        report.compare(key, value.detach(), expected[key])
    assert report.passed, report.errors


LAYER = {"instance_norm_target_layer": False, "layer_norm_target_layer": True}
OWNS_ENCODER = {"ema_encoder_only": False}
ALIBI = {"use_alibi_encoder": True, "learned_alibi_scale": True, "learned_alibi_scale_per_head": True}
WITHOUT_CLS = {"own": {"num_extra_tokens": 0}, "model": {"cls_loss": 0}}
DEFAULTS = {
    "layer_norm_first": False, "end_of_block_targets": False, "norm_affine": True, "dropout_input": 0, "layerdrop": 0,
    "start_drop_path_rate": 0, "end_drop_path_rate": 0, "loss_scale": None, "loss_beta": 0, "d2v_loss": 1,
    "recon_loss": 0, "batch_norm_target_layer": False, "instance_norm_targets": False,
}  # fmt: skip
OWN_DEFAULTS = {
    "learned_alibi": False, "prenet_dropout": 0, "prenet_layerdrop": 0, "mask_length": 5, "mask_dropout": 0,
    "keep_masked_pct": 0, "encoder_zero_mask": True, "local_grad_mult": 1, "use_alibi_encoder": False,
    "learned_alibi_scale": False, "learned_alibi_scale_per_head": False, "learned_alibi_scale_per_layer": False,
    "alibi_scale": 1.0, "add_masks": False, "inverse_mask": False,
}  # fmt: skip
DECODER_DEFAULTS = {"decoder_residual": True, "projection_layers": 1, "projection_ratio": 2.0,
                    "add_positions_masked": False, "add_positions_all": False}  # fmt: skip
SIZES = dict.fromkeys(("decoder_dim", "decoder_groups", "decoder_kernel", "decoder_layers"), ABSENT)

IMAGE: dict[str, dict[str, Any]] = {
    "as_published": {},
    "defaults_spelled_out": {"model": DEFAULTS, "own": OWN_DEFAULTS, "decoder": DECODER_DEFAULTS},
    "defaults_left_out": {
        "model": {"num_heads": ABSENT, "embed_dim": 48, "mlp_ratio": ABSENT, "cls_loss": ABSENT},
        "own": dict.fromkeys(("input_size", "patch_size", "embed_dim", "num_extra_tokens"), ABSENT),
        "decoder": SIZES, "masks": 1, "samples": 1, "num_masked": (157,),
    },
    "no_extra_token": WITHOUT_CLS,
    "extra_token_without_cls_loss": {"model": {"cls_loss": 0}},
    "two_extra_tokens": {"own": {"num_extra_tokens": 2, "init_extra_token_zero": True}},
    "other_patch_width": {"own": {"embed_dim": 20}},
    "other_patch_width_of_the_student_alone": {"own": {"embed_dim": 32, "ema_local_encoder": False}},
    "students_patches": {"own": {"ema_local_encoder": False}},
    "even_kernel": {"decoder": {"decoder_kernel": 4}},
    "kernel_of_two_without_residual": {"decoder": {"decoder_kernel": 2, "decoder_residual": False}},
    "wide_decoder_in_eight_groups": {"decoder": {"decoder_dim": 32, "decoder_groups": 8, "decoder_layers": 3}},
    "one_layer_in_one_group": {"decoder": {"decoder_groups": 1, "decoder_layers": 1}},
    "one_linear_whatever_projection_layers": {"decoder": {"projection_layers": 2, "projection_ratio": 2.0}},
    "three_prenet_blocks": {"own": {"prenet_depth": 3}},
    "no_prenet_and_top_of_three": {"own": {"prenet_depth": 0}, "model": {"depth": 3, "average_top_k_layers": 1}},
    "one_mask_of_one_image": {"masks": 1, "samples": 1},
    "twelve_heads": {"model": {"num_heads": 12, "embed_dim": 48}, "own": {"embed_dim": 48}},
    "narrow_mlp": {"model": {"mlp_ratio": 2}},
    "smooth_l1_and_cls_loss": {"model": {"loss_beta": 0.7, "loss_scale": 2.0, "cls_loss": 0.05}},
    "layer_norm_per_layer": {"model": LAYER | {"layer_norm_targets": False}},
    "layer_norm_per_layer_then_instance": {
        "model": LAYER | {"layer_norm_targets": False, "instance_norm_targets": True, "cls_loss": 0}
    },
    "cls_target_of_zero": {"model": {"layer_norm_targets": False, "instance_norm_targets": True}},
    "batch_norm_per_layer": {"model": {"instance_norm_target_layer": False, "batch_norm_target_layer": True}},
    "two_norms_each": {"model": {"layer_norm_target_layer": True, "instance_norm_targets": True, "cls_loss": 0}},
    "no_norm": {"model": {"instance_norm_target_layer": False, "layer_norm_targets": False}},
    "uneven_masks": {"num_masked": (11, 13, 9)},
    "large_norm_eps": {"model": {"norm_eps": 0.05}},
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "as_published": {},
    "defaults_spelled_out": {
        "model": DEFAULTS | {"cls_loss": 0}, "decoder": DECODER_DEFAULTS,
        "own": OWN_DEFAULTS | {"num_extra_tokens": 0, "init_extra_token_zero": True, "ema_local_encoder": False,
                               "no_scale_embedding": True, "no_token_positional_embeddings": False},
    },
    "defaults_left_out": {
        "model": {"num_heads": ABSENT, "embed_dim": 48, "mlp_ratio": ABSENT, "loss_scale": ABSENT,
                  "ema_encoder_only": ABSENT},
        "own": {"max_source_positions": ABSENT},
        "decoder": SIZES | dict.fromkeys(("decoder_residual", "projection_layers", "projection_ratio"), ABSENT),
        "masks": 1, "samples": 1,
    },
    "padded": {"real_tokens": (12, 7)},
    "padded_at_masked_places_alone": {"real_tokens": (12, 9), "padding_is_masked": True},
    "padded_and_uneven": {"real_tokens": (10, 6), "num_masked": (6, 5, 7)},
    "large": {"model": LAYER | {"loss_beta": 4, "instance_norm_targets": True}, "real_tokens": (12, 8)},
    "residual_and_three_projections": {
        "decoder": {"decoder_residual": True, "projection_layers": 3, "projection_ratio": 1.5, "decoder_layers": 3}
    },
    "residual_from_the_first_layer": {"decoder": {"decoder_residual": True, "decoder_dim": 24, "decoder_groups": 4}},
    "one_projection": {"decoder": {"projection_layers": 1}},
    "even_kernel": {"decoder": {"decoder_kernel": 4}},
    "scale_from_width": {"model": {"loss_scale": None, "loss_beta": 0.5}},
    "batch_norm_per_layer": {"model": {"instance_norm_target_layer": False, "batch_norm_target_layer": True}},
    "one_mask": {"masks": 1, "real_tokens": (12, 10)},
    "uneven_masks": {"num_masked": (7, 5, 8)},
    "twelve_heads": {"model": {"num_heads": 12, "embed_dim": 48}},
    "large_norm_eps": {"model": {"norm_eps": 0.05}},
    "no_positions": {"own": {"no_token_positional_embeddings": True}, "real_tokens": (12, 8)},
    "alibi_per_block_with_prenet": {
        "own": ALIBI | {"learned_alibi_scale_per_layer": True, "prenet_depth": 1}, "model": OWNS_ENCODER,
    },
    "learned_alibi": {"own": ALIBI, "model": OWNS_ENCODER, "num_masked": (6, 8, 5)},
    "learned_alibi_without_positions": {
        "own": ALIBI | {"no_token_positional_embeddings": True}, "model": OWNS_ENCODER, "real_tokens": (12, 8),
    },
    "fixed_alibi": {"own": {"use_alibi_encoder": True}, "model": OWNS_ENCODER, "real_tokens": (12, 8)},
    "one_learned_scale_with_twelve_heads": {
        "own": ALIBI | {"learned_alibi_scale_per_head": False},
        "model": OWNS_ENCODER | {"num_heads": 12, "embed_dim": 48},
    },
    "prenet_of_the_teacher": {"own": {"prenet_depth": 2}, "model": OWNS_ENCODER, "real_tokens": (12, 7)},
    "full_names_without_prenet": {"model": OWNS_ENCODER},
    "own_embeddings": {"own": {"ema_local_encoder": True}, "model": OWNS_ENCODER, "real_tokens": (12, 7)},
    "own_embeddings_prenet_and_alibi": {
        "own": ALIBI | {"ema_local_encoder": True, "prenet_depth": 1}, "model": OWNS_ENCODER
    },
}  # fmt: skip
SPECTROGRAM: dict[str, Any] = {"in_chans": 1, "patch_size": 16, "target_length": 32, "max_length": 5, "prenet_depth": 0}
SPECTROGRAMS: dict[str, dict[str, Any]] = {
    "as_published": {"own": SPECTROGRAM, "model": {"cls_loss": 1}},
    "longest_input": {"own": SPECTROGRAM | {"target_length": 80}, "num_masked": (30,), "model": {"cls_loss": 1}},
    "small_patches_and_prenet": {
        "own": SPECTROGRAM | {"patch_size": 32, "target_length": 96, "prenet_depth": 2}, "num_masked": (7, 9),
    },
    "other_patch_width_and_even_kernel": {
        "own": SPECTROGRAM | {"embed_dim": 20}, "decoder": {"decoder_kernel": 4}, "samples": 1, "masks": 2,
    },
}  # fmt: skip
DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "image_blocks_alone_averaged": ({"model": {"ema_encoder_only": True}}, "ema_encoder_only=True"),
    "image_of_two_channels": ({"own": {"in_chans": 2}}, "modalities.image.in_chans=2"),
    "image_blocks_alone_by_default": ({"model": {"ema_encoder_only": ABSENT}}, "ema_encoder_only=True"),
    "text_prenet_of_the_student": ({"own": {"prenet_depth": 1}, "real_tokens": (12, 7)}, "ema_encoder_only=True"),
    "text_students_fixed_alibi": ({"own": {"use_alibi_encoder": True}}, "use_alibi_encoder=True"),
    "text_students_learned_alibi": ({"own": ALIBI, "real_tokens": (12, 8)}, "use_alibi_encoder=True"),
    "text_extra_token": (
        {"own": {"num_extra_tokens": 1, "use_alibi_encoder": True}, "model": OWNS_ENCODER},
        "modalities.text.num_extra_tokens=1",
    ),
}
"""What the model does not compute, and the option that it must name."""


def case(name: str, changes: dict[str, Any]) -> Case:
    """The case of a name that begins with its modality."""
    modality = name.split("_")[0]
    return Case(modality=modality, **({"num_masked": (11 if modality == "image" else 7,)} | changes))


CASES = {f"image_{name}": changes for name, changes in IMAGE.items()}
CASES |= {f"image_spectrogram_{name}": changes for name, changes in SPECTROGRAMS.items()}
CASES |= {f"text_{name}": changes for name, changes in TEXT.items()}


@pytest.mark.parametrize("name", CASES)
def test_model_agrees_with_the_second_implementation(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, name, case(name, CASES[name]))
    report, problem = verify_case(tmp_path, name, tolerance=1e-4)
    assert problem == ""
    assert report.passed, {quantity: error for quantity, error in report.errors.items() if error > report.tolerance}


@pytest.mark.parametrize("name", DECLINED)
def test_what_the_model_lacks_is_declined_by_name(name: str, tmp_path: Path) -> None:
    changes, option = DECLINED[name]
    write_case(tmp_path, name, case(name, changes))
    assert verify_case(tmp_path, name, tolerance=1e-4)[1].startswith(f"unsupported: {option}")
