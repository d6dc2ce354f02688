"""data2vec 1.0 reproduces the official computation, and a change of any value that counts makes the comparison fail."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v2ds.verify.__main__ import main
from d2v2ds.verify.case import case_names, model_name
from d2v2ds.verify.check import verify_case
from d2v2ds.verify.data2vec1.masks import NAME as MASKS
from tests.verify.corruption import Change, changes, copied

GOLDEN = Path(__file__).parents[1] / "golden" / "data2vec1"
LARGER = Path(os.environ["D2V2_REFERENCE"]) / "golden-v1" if "D2V2_REFERENCE" in os.environ else None
"""More cases of the same format, which do not travel with the project."""
CASES = case_names(GOLDEN, None)

WITHOUT_EFFECT = {
    "describes how the case was made": r"name|seed|note|vocab_size|max_update|mask_token_id|task\..*",
    "option of a draw that the case recorded": r"model\.(mask_prob|mask_length|require_same_masks)",
    "option that holds for every value near": r"model\.(conv_pos|max_source_positions|transformer\..*positions)",
    "name of a kind that is refused or that leaves the default": r"model\.(_name|ema_anneal_end_step)",
}
"""Reason -> values whose change by a hundredth, or by 1, is not found."""


def files_of(name: str) -> list[str]:
    """Files of a case."""
    return [path.name for path in GOLDEN.glob(f"{name}.*")]


def tensors_of(name: str) -> list[Change]:
    """One change of every tensor of a case, but of the keys' bias gradients: 0 in truth, and rounding noise here."""
    found = [one for one in changes(GOLDEN, files_of(name)) if one.file.endswith(".safetensors")]
    return [one for one in found if not re.fullmatch(r"grad/.*\.k_proj\.bias", str(one.place[0]))]


def unnoticed(name: str, chosen: list[Change], tmp_path: Path) -> list[str]:
    """Changes after which the command finds no difference."""
    passing = []
    for number, change in enumerate(chosen):
        folder = copied(GOLDEN, files_of(name), tmp_path / f"{name}{number}")
        change.make(folder)
        if main([str(folder)]) != 1:
            passing.append(str(change))
    return passing


def sample(chosen: list[Change], number: int) -> list[Change]:
    """Draw some changes, the same each time."""
    order = np.random.default_rng(7).permutation(len(chosen))[:number]
    return [chosen[i] for i in sorted(order)]


@pytest.mark.parametrize("name", CASES)
def test_recorded_computation_is_reproduced(name: str) -> None:
    assert model_name(GOLDEN, name).startswith("data2vec_")
    report, problem = verify_case(GOLDEN, name, tolerance=1e-4)
    assert problem == ""
    assert report.passed, report.errors
    wanted = {"loss total", "targets", "EMA step", "copied parameters", "1 - decay", "grad local", "attn targets"}
    assert wanted <= set(report.errors)


if LARGER is not None:

    @pytest.mark.parametrize(
        "name", [one for one in case_names(LARGER, None) if model_name(LARGER, one).startswith("data2vec_")]
    )
    def test_larger_case_passes(name: str) -> None:
        report, problem = verify_case(LARGER, name, tolerance=1e-4)
        assert problem == ""
        assert report.passed, report.errors


def test_cases_of_both_modalities_travel_and_stay_small() -> None:
    assert CASES == ["v1_audio_pad", "v1_text_maskedteacher"]
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 1_100_000


def test_masks_have_the_recorded_statistics() -> None:
    report, problem = verify_case(GOLDEN, MASKS, tolerance=1e-4)
    assert problem == ""
    assert report.passed, report.errors
    assert max(report.errors.values()) > 1e-5, "chance leaves some difference"


@pytest.mark.parametrize(
    "key",
    [
        "text_p35_l4_L512/marginal",
        "text_p35_l4_L512/joint_lag",
        "text_p35_l4_L512/masked_run_hist",
        "text_p35_l4_L512/count_hist",
        "audio_p65_l10_L499_batch8/joint_lag",
        "image_14x14_75_16_196/masked_4nbr_hist",
    ],
)
def test_a_changed_statistic_of_masks_fails(key: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN, files_of(MASKS), tmp_path / "masks")
    name = key.split("/")[0]
    entries = json.loads((folder / f"{MASKS}.json").read_text())
    (folder / f"{MASKS}.json").write_text(json.dumps({name: entries[name]}))
    tensors = {one: value for one, value in load_file(folder / f"{MASKS}.safetensors").items() if one.startswith(name)}
    largest = tensors[key].argmax()
    tensors[key][largest] = tensors[key][largest] * (1.3 if tensors[key].is_floating_point() else 2)
    save_file(tensors, folder / f"{MASKS}.safetensors")
    report, problem = verify_case(folder, MASKS, 1e-4)
    assert problem == ""
    assert report.errors[f"{name} {key.split('/')[1]}"] > 1e-4


@pytest.mark.parametrize(
    ("place", "value"),
    [("count_mean", 158.0), ("count_min", 134), ("mean_run", 5.1), ("rows", 3999), ("mask_prob", 0.34)],
)
def test_a_changed_number_of_masks_fails(place: str, value: float, tmp_path: Path) -> None:
    folder = copied(GOLDEN, files_of(MASKS), tmp_path / "masks")
    name = "text_p35_l4_L512"
    entry = json.loads((folder / f"{MASKS}.json").read_text())[name]
    (folder / f"{MASKS}.json").write_text(json.dumps({name: entry | {place: value}}))
    tensors = load_file(folder / f"{MASKS}.safetensors")
    save_file({one: x for one, x in tensors.items() if one.startswith(name)}, folder / f"{MASKS}.safetensors")
    assert main([str(folder)]) == 1
    save_file(tensors, folder / f"{MASKS}.safetensors")
    assert "nothing to compare with audio_p65" in verify_case(folder, MASKS, 1e-4)[1]


def test_a_changed_tensor_fails(tmp_path: Path) -> None:
    for name in CASES:
        assert unnoticed(name, sample(tensors_of(name), 15), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_changed_tensor_fails(name: str, tmp_path: Path) -> None:
    assert unnoticed(name, tensors_of(name), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_changed_setting_fails(name: str, tmp_path: Path) -> None:
    patterns = re.compile("|".join(WITHOUT_EFFECT.values()))
    chosen = [one for one in changes(GOLDEN, [f"{name}.json"]) if not patterns.fullmatch(".".join(map(str, one.place)))]
    assert len(chosen) > 10
    assert unnoticed(name, chosen, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "prenet_dropout=0.1 (expected 0"),
        ({"layer_norm_first": True}, "unsupported: model.layer_norm_first=True, expected False"),
        ({"some_new_option": 3}, "unsupported: model.some_new_option=3"),
        ({"ema_transformer_only": False}, "unsupported: model.ema_transformer_only=False"),
        ({"layer_norm_target_layer": False, "instance_norm_targets": True}, "normalises over the batch"),
        ({"_name": "data2vec_audio", "extractor_mode": "default"}, "unsupported: model.extractor_mode='default'"),
    ],
)
def test_unsupported_option_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN, files_of("v1_audio_pad"), tmp_path / "case")
    meta = json.loads((folder / "v1_audio_pad.json").read_text())
    meta["model"] |= change
    (folder / "v1_audio_pad.json").write_text(json.dumps(meta))
    assert message in verify_case(folder, "v1_audio_pad", 1e-4)[1]


def test_what_nothing_reads_and_what_is_missing_fails(tmp_path: Path) -> None:
    folder = copied(GOLDEN, files_of("v1_audio_pad"), tmp_path / "case")
    tensors = load_file(folder / "v1_audio_pad.safetensors")
    save_file(tensors | {"mid/student/elsewhere": torch.zeros(3)}, folder / "v1_audio_pad.safetensors")
    assert "nothing to compare with mid/student/elsewhere" in verify_case(folder, "v1_audio_pad", 1e-4)[1]
    del tensors["student/mask_emb"]
    save_file(tensors, folder / "v1_audio_pad.safetensors")
    assert "mask_vectors.audio.vector" in verify_case(folder, "v1_audio_pad", 1e-4)[1]
    (folder / "v1_audio_pad.safetensors").unlink()
    assert main([str(folder)]) == 1
