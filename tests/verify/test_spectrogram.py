"""Cases of spectrograms, EAT's and BAT's: the model reproduces them, and wherever one is changed it fails."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v2ds.verify.__main__ import main
from d2v2ds.verify.check import verify_case
from d2v2ds.verify.report import Report
from tests.oracles import official_bat
from tests.oracles.official_bat import BatCase
from tests.oracles.official_image_text import Case, write_case
from tests.oracles.official_model import GIVEN, compute
from tests.verify.corruption import Change, changes, copied

RECORDED = Path(os.environ.get("D2V2_REFERENCE", "")) / "golden-spectrogram"
needs_records = pytest.mark.skipif(not (RECORDED / "bat_tiny.json").exists(), reason="needs D2V2_REFERENCE")
EAT: dict[str, Any] = {"in_chans": 1, "patch_size": 64, "target_length": 192, "max_length": 5, "prenet_depth": 0}
SMALL = {"own": EAT | {"embed_dim": 8}, "model": {"embed_dim": 8, "num_heads": 2, "cls_loss": 1, "depth": 2}}


@needs_records
@pytest.mark.parametrize("name", ["spectrogram_tiny", "bat_tiny"])
def test_a_recorded_case_passes(name: str) -> None:
    report, problem = verify_case(RECORDED, name, tolerance=2e-5)
    assert problem == "" and report.passed, report.errors


@needs_records
@pytest.mark.parametrize("name", ["spectrogram_tiny", "bat_tiny"])
def test_second_implementation_reproduces_every_recorded_tensor(name: str) -> None:
    meta = json.loads((RECORDED / f"{name}.json").read_text())
    tensors = load_file(RECORDED / f"{name}.safetensors")
    expected = tensors | load_file(RECORDED / f"{name}.grads.safetensors")
    given = {key: value for key, value in tensors.items() if key.startswith(GIVEN)}
    if name == "bat_tiny":
        rows, columns = meta["grid_time_mel"]
        out, grads = official_bat.compute(BatCase(**meta["model"], rows=rows, columns=columns), given)
    else:
        out, grads = compute("image", meta["model"], given)
    found, report = out | grads, Report(2e-5)
    assert set(found) == set(expected) - set(given)
    for key, value in found.items():
        report.compare(key, value.detach(), expected[key])
    assert report.passed, report.errors


@pytest.mark.parametrize(
    "case",
    [
        BatCase(),
        BatCase(depth=3, num_heads=2, decoder_depth=1, decoder_heads=4, rows=2, columns=4, masked=5),
        BatCase(dim=24, decoder_dim=24, clone_batch=1, samples=1, rows=1, columns=5, masked=2),
    ],
    ids=["small", "wide", "one_row"],
)
def test_bat_agrees_with_the_second_implementation(case: BatCase, tmp_path: Path) -> None:
    official_bat.write_case(tmp_path, "bat", case)
    report, problem = verify_case(tmp_path, "bat", tolerance=2e-5)
    assert problem == "" and report.passed, report.errors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small case of each kind."""
    folder = tmp_path_factory.mktemp("made")
    decoder = {"decoder_dim": 8, "decoder_groups": 2, "decoder_layers": 1}
    write_case(folder, "eat", Case(modality="image", num_masked=(3,), masks=2, decoder=decoder, **SMALL))
    official_bat.write_case(folder, "bat", BatCase(dim=8, num_heads=2, decoder_dim=8, depth=1, decoder_depth=1))
    return folder


def test_both_cases_pass_as_they_are(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(made), "--modality", "spectrogram"]) == 0
    assert "2 of 2 cases pass" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eat", "bat"])
def test_a_change_of_any_tensor_fails(name: str, made: Path, tmp_path: Path) -> None:
    files = [f"{name}.json", f"{name}.safetensors", f"{name}.grads.safetensors"]
    found = changes(made, files[1:], share=0.05)
    assert len(found) > 60
    unnoticed = [
        str(change) for number, change in enumerate(found) if _passes(change, name, made, tmp_path / f"{number}")
    ]
    assert unnoticed == []


def _passes(change: Change, name: str, made: Path, folder: Path) -> bool:
    files = [f"{name}.json", f"{name}.safetensors", f"{name}.grads.safetensors"]
    change.make(copied(made, files, folder))
    report, problem = verify_case(folder, name, tolerance=1e-4)
    return not problem and report.passed


@pytest.mark.parametrize("name", ["eat", "bat"])
def test_a_tensor_that_nothing_is_compared_with_fails(name: str, made: Path, tmp_path: Path) -> None:
    files = [f"{name}.json", f"{name}.safetensors", f"{name}.grads.safetensors"]
    folder = copied(made, files, tmp_path / "copy")
    for file, key in ((files[1], "mid/student/somewhere_else"), (files[2], "grad/somewhere_else")):
        tensors = load_file(folder / file)
        save_file(tensors | {key: torch.zeros(3)}, folder / file)
        assert verify_case(folder, name, 1e-4)[1] != ""
        save_file(tensors, folder / file)
