"""A second implementation, from the text of the specification alone, reproduces the recorded vectors."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from d2v2ds.verify import Report
from tests.oracles.official_model import GIVEN, compute

MICRO = Path(__file__).parent / "golden" / "micro"


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
