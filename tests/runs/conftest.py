"""Data of whole runs, and the run that nothing happens to."""

from pathlib import Path

import pytest

from tests.runs.launching import STEPS, launch, pack_clips


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short recordings; `manifest.tsv` lies beside the folder."""
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that everything is compared with: two ranks, ZeRO-3, bf16, three micro-batches a step."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    printed = launch("deepspeed", 2, shards, run_dir)
    assert "accumulation 2" in printed, "three micro-batches on two ranks: one of them gets a filler"
    assert f"step {STEPS}/{STEPS}" in printed
    return run_dir
