"""Fine-tuning reproduces the official computation, and a change of any value that counts makes the comparison fail."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from d2v2ds.interop.fairseq.official_fields import conv_layers
from d2v2ds.verify.__main__ import main
from d2v2ds.verify.case import case_names
from d2v2ds.verify.check import verify_case
from d2v2ds.verify.finetuning.check import TABLES
from d2v2ds.verify.tables import tables
from tests.verify.corruption import Change, changes, copied

GOLDEN = Path(__file__).parents[1] / "golden" / "finetuning"
LARGER = Path(os.environ["D2V2_REFERENCE"]) / "golden-finetune" if "D2V2_REFERENCE" in os.environ else None
"""More cases of the same format, which do not travel with the project."""
CASES = case_names(GOLDEN, None)

WITHOUT_EFFECT = {
    "describes how the case was made": (
        r"note|seed|num_updates|in/id|head_init_std_\w+\..*|final_missing_means_unchanged"
        r"|logging\.(report_mcc|_world_size)"
    ),
    "option of pretraining that fine-tuning does not read": (
        r"pretrained_model\.(clone_batch|average_top_k_layers|loss_scale|cls_loss|ema_encoder_only"
        r"|layer_norm_targets|instance_norm_target_layer)"
        r"|pretrained_model\.modalities\.\w+\.(mask_prob|mask_prob_adjust|mask_length|mask_noise_std|inverse_mask"
        r"|init_extra_token_zero|ema_local_encoder|decoder\.\w+)"
    ),
    "option of pretraining that fine-tuning replaces by 0": (
        r"pretrained_model\.(encoder_dropout|post_mlp_drop|attention_dropout|activation_dropout|layerdrop)"
    ),
    "option of a draw that the case recorded, or that evaluation does not make": (
        r"finetune\.(apply_mask|mask_prob|mask_length|mask_channel_prob|mask_channel_length|source_mixup|label_mixup"
        r"|mixup|cutmix|mixup_prob|mixup_switch_prob|label_smoothing)"
    ),
    "change below the tolerance, or rounded away": (
        r"pretrained_model\.norm_eps|.*\.conv_pos_width|hyper\.eps|hyper\.schedule\.(max_update|final_lr_scale)"
    ),
    "letter that no transcript of the case has": r"dictionary\.([4-9]|1\d)",
    "negative scale, which counts as 0": r".*\.alibi_scale",
    "row of an embedding that no input reads": r".*\.(embed_positions|embed_tokens)\.weight",
    "one weight of thousands, below the tolerance in the output": r".*\.blocks\.1\.mlp\.fc1\.weight",
}
"""Reason -> values whose change by a hundredth, or by 1, is not found."""


def files_of(name: str, folder: Path = GOLDEN) -> list[str]:
    """Files of a case or table."""
    if name == "decode":
        return [f"decode/{path.name}" for path in (folder / "decode").iterdir()]
    return [path.name for path in folder.glob(f"{name}.*")]


def unnoticed(name: str, chosen: list[Change], tmp_path: Path) -> list[str]:
    """Changes after which the command finds no difference."""
    passing = []
    for number, change in enumerate(chosen):
        folder = copied(GOLDEN, files_of(name), tmp_path / f"{name}{number}")
        change.make(folder)
        if main([str(folder)]) != 1:
            passing.append(str(change))
    return passing


def with_effect(name: str) -> list[Change]:
    patterns = re.compile("|".join(WITHOUT_EFFECT.values()))
    return [one for one in changes(GOLDEN, files_of(name)) if not patterns.fullmatch(".".join(map(str, one.place)))]


def sample(chosen: list[Change], number: int) -> list[Change]:
    """Draw some changes, the same each time."""
    order = np.random.default_rng(7).permutation(len(chosen))[:number]
    return [chosen[i] for i in sorted(order)]


@pytest.mark.parametrize("name", [*CASES, *TABLES])
def test_recorded_computation_is_reproduced(name: str) -> None:
    report, problem = verify_case(GOLDEN, name, tolerance=1e-4)
    assert problem == ""
    assert report.passed, report.errors


if LARGER is not None:

    @pytest.mark.parametrize("name", [*case_names(LARGER, None), *tables(LARGER)])
    def test_larger_case_passes(name: str) -> None:
        report, problem = verify_case(LARGER, name, tolerance=1e-4)
        assert problem == ""
        assert report.passed, report.errors


def test_golden_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("name", CASES)
def test_a_changed_value_of_a_case_fails(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, sample(with_effect(name), 12), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_changed_value_of_a_case_fails(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, with_effect(name), tmp_path) == []


@pytest.mark.parametrize("name", ["ctc_infeasible", "audiocls_average_sigmoid_eval", "image_eval"])
@pytest.mark.parametrize("kind", ["model", "in", "mask", "mid", "out", "loss", "grad"])
def test_a_changed_tensor_of_every_kind_fails(name: str, kind: str, tmp_path: Path) -> None:
    chosen = [change for change in with_effect(name) if str(change.place[0]).startswith(f"{kind}/")]
    assert chosen or kind in ("mask", "grad")
    assert unnoticed(name, sample(chosen, 2), tmp_path) == []


TABLE_CHANGES = {  # average precision reads ranks, which a small change of a score leaves
    "schedules": (0.01, r".*\.settings\.(max_update|warmup_updates|betas\.\d)"),  # ends and bounds; betas are described
    "metrics": (1.0, r".*note|map\.scores.*"),
    "eval_transform": (0.5, r"case\d/image"),  # resampling and cropping may hide one pixel
    "decode": (0.01, r"nothing"),
    "finetune_mask_stats": (  # rare positions and lengths lie within chance
        1.5,
        r".*\.(rows|run_length_hist_600_rows\.(?!10$|64$).*|marginal_last_20\.1[5-9])"
        r"|.*channel.*\.(sd_count|marginal.*|run.*)",
    ),
}  # fmt: skip
"""Table -> size of a change, and values that are not changed."""


@pytest.mark.parametrize("name", TABLE_CHANGES)
def test_a_changed_value_of_a_table_fails(name: str, tmp_path: Path) -> None:
    share, left_out = TABLE_CHANGES[name]
    chosen = [
        one
        for one in changes(GOLDEN, files_of(name), share=share)
        if not re.fullmatch(left_out, ".".join(map(str, one.place)))
    ]
    assert unnoticed(name, sample(chosen, 6 if name == "finetune_mask_stats" else 16), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_CHANGES)
def test_every_changed_value_of_a_table_fails(name: str, tmp_path: Path) -> None:
    share, left_out = TABLE_CHANGES[name]
    chosen = changes(GOLDEN, files_of(name), share=share)
    chosen = [one for one in chosen if not re.fullmatch(left_out, ".".join(map(str, one.place)))]
    assert unnoticed(name, sample(chosen, 30 if name == "finetune_mask_stats" else 300), tmp_path) == []


@pytest.mark.parametrize("kind", ["tensor", "value", "score"])
def test_what_nothing_reads_is_refused(kind: str, tmp_path: Path) -> None:
    name = "text_single_eval_mcc"
    folder = copied(GOLDEN, files_of(name), tmp_path / "copy")
    if kind == "tensor":
        tensors = load_file(folder / f"{name}.safetensors")
        save_file(tensors | {"mid/other": tensors["loss/total"].clone()}, folder / f"{name}.safetensors")
    else:
        path = folder / f"{name}.json"
        before = '"metrics": {' if kind == "score" else "{"
        path.write_text(path.read_text().replace(before, before + '"other": 1.0, ', 1))
    found = {"tensor": "mid/other", "value": "other", "score": "metrics.other"}[kind]
    assert verify_case(folder, name, 1e-4)[1] == f"D2V2Error: nothing to compare with {found}"


def test_dropout_that_fine_tuning_keeps_is_refused(tmp_path: Path) -> None:
    name = "text_single_eval_mcc"
    folder = copied(GOLDEN, files_of(name), tmp_path / "copy")
    path = folder / f"{name}.json"
    path.write_text(path.read_text().replace('"encoder_dropout": 0', '"encoder_dropout": 0.1'))
    assert verify_case(folder, name, 1e-4)[1].startswith("unsupported: encoder_dropout=0.1 (expected 0")


def test_broken_list_of_layers_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="feature_encoder_spec: expected a list"):
        conv_layers("[(32, 10, 5)] x")
