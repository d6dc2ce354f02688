"""MAE reproduces the recorded computation, and a change of any value that counts makes the comparison fail."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from d2v2ds.verify.__main__ import main
from d2v2ds.verify.case import case_names
from d2v2ds.verify.check import verify_case
from d2v2ds.verify.report import Report
from tests.oracles.official_mae import DEFAULTS, GIVEN, compute, write_case
from tests.verify.corruption import changes, copied

GOLDEN = Path(__file__).parents[1] / "golden" / "rivals"
NAME = "mae_micro"
FILES = [f"{NAME}{ending}" for ending in (".json", ".safetensors", ".grads.safetensors")]
LARGER = Path(os.environ["D2V2_REFERENCE"]) / "golden-v1" if "D2V2_REFERENCE" in os.environ else None
"""Cases of the official code in the same format, which do not travel with the project."""
OFFICIAL = [] if LARGER is None else [(LARGER, name) for name in case_names(LARGER, "image") if name.startswith("mae_")]
EVERY = [(GOLDEN, NAME), *OFFICIAL]

WITHOUT_EFFECT = {
    "describes how the case was made": r"name|modality",
    "below the tolerance": r"model\.norm_eps",
    "order of the noise is all that counts": r"mask/noise",
}
"""Reason -> values whose change by a hundredth, or by 1, is not found."""


@pytest.mark.parametrize(("folder", "name"), EVERY, ids=lambda value: value if isinstance(value, str) else "")
def test_recorded_step_is_reproduced(folder: Path, name: str) -> None:
    report, problem = verify_case(folder, name, tolerance=1e-5)
    assert problem == ""
    assert report.passed, report.errors
    layers = {"encoder_in", "block1_out", "latent", "decoder_in", "decoder_block0_out", "decoder_norm_out"}
    assert {"positions", "prediction", "target", "loss total"} | layers <= set(report.errors)


@pytest.mark.parametrize(("folder", "name"), EVERY, ids=lambda value: value if isinstance(value, str) else "")
def test_second_implementation_computes_every_recorded_tensor(folder: Path, name: str) -> None:
    model = json.loads((folder / f"{name}.json").read_text())["model"]
    tensors = load_file(folder / f"{name}.safetensors")
    expected = tensors | load_file(folder / f"{name}.grads.safetensors")
    given = {key: value for key, value in tensors.items() if key.startswith(GIVEN)}
    out, grads = compute(model, given)
    found, report = out | grads, Report(1e-5)
    assert set(found) == set(expected) - set(given)
    for key, value in found.items():
        report.compare(key, value.detach(), expected[key])
    assert report.passed, report.errors


CASES: dict[str, dict[str, Any]] = {
    "raw_pixels": {"norm_pix_loss": False},
    "one_head_and_six": {"embed_dim": 36, "num_heads": 6, "decoder_num_heads": 1},
    "wider_decoder": {"decoder_embed_dim": 40, "decoder_num_heads": 5, "decoder_depth": 3, "depth": 1},
    "few_masked": {"mask_ratio": 0.3},
    "many_patches_mostly_masked": {"img_size": 36, "mask_ratio": 0.9},
    "one_large_patch_in_four": {"patch_size": 8, "mask_ratio": 0.5},
    "other_ratio_and_epsilon": {"mlp_ratio": 3.5, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", CASES)
def test_second_implementation_agrees(name: str, tmp_path: Path) -> None:
    write_case(tmp_path, name, CASES[name])
    report, problem = verify_case(tmp_path, name, tolerance=1e-5)
    assert problem == ""
    assert report.passed, report.errors


def test_a_changed_value_fails_wherever_it_is(tmp_path: Path) -> None:
    patterns = re.compile("|".join(WITHOUT_EFFECT.values()))
    passing = []
    for number, change in enumerate(changes(GOLDEN, FILES)):
        if patterns.fullmatch(".".join(map(str, change.place))):
            continue
        folder = copied(GOLDEN, FILES, tmp_path / str(number))
        change.make(folder)
        report, problem = verify_case(folder, NAME, 1e-4)
        if report.passed and not problem:
            passing.append(str(change))
    assert passing == []


@pytest.mark.parametrize(
    "key", ["student/pos_embed", "student/decoder_pos_embed", "out/pred", "mask/ids_restore", "in/source"]
)
def test_every_row_of_a_tensor_counts(key: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / FILES[1])
    flat = tensors[key].flatten()
    for at in range(0, len(flat), max(1, len(flat) // 12)):
        folder = copied(GOLDEN, FILES, tmp_path / str(at))
        changed = flat.clone()
        changed[at] += 1
        save_file(tensors | {key: changed.view(tensors[key].shape)}, folder / FILES[1])
        report, problem = verify_case(folder, NAME, 1e-4)
        assert problem or not report.passed, at


def test_noise_of_another_order_fails(tmp_path: Path) -> None:
    folder = copied(GOLDEN, FILES, tmp_path / "case")
    tensors = load_file(folder / FILES[1])
    save_file(tensors | {"mask/noise": 1 - tensors["mask/noise"]}, folder / FILES[1])
    assert verify_case(folder, NAME, 1e-4)[0].errors["ids_keep"] > 1e-4


def test_what_nothing_is_compared_with_is_refused(tmp_path: Path) -> None:
    folder = copied(GOLDEN, FILES, tmp_path / "case")
    tensors = load_file(folder / FILES[1])
    save_file(tensors | {"mid/other": tensors["loss/total"].clone()}, folder / FILES[1])
    assert verify_case(folder, NAME, 1e-4)[1] == "D2V2Error: nothing to compare with mid/other"


def test_option_that_the_network_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path, NAME)
    meta = json.loads((tmp_path / f"{NAME}.json").read_text())
    meta["model"] |= {"drop_path": 0.1}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(meta))
    assert main([str(tmp_path), "--modality", "image"]) == 1
    assert "unsupported: drop_path=0.1" in capsys.readouterr().out


def test_stored_case_is_the_one_that_the_second_implementation_writes(tmp_path: Path) -> None:
    write_case(tmp_path, NAME)
    assert json.loads((GOLDEN / FILES[0]).read_text())["model"] == DEFAULTS
    for file in FILES[1:]:
        report, found, kept = Report(1e-5), load_file(tmp_path / file), load_file(GOLDEN / file)
        assert found.keys() == kept.keys()
        for key, value in found.items():
            report.compare(key, value, kept[key])
        assert report.passed, report.errors
    assert sum((GOLDEN / file).stat().st_size for file in FILES) < 300_000
