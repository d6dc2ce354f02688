"""A real SLURM controller for the tests that need one, data for it, and the run that nothing happened to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.launching import Ranks, pack_clips
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import SETTINGS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A controller and two nodes."""
    if reason := why_not():
        pytest.skip(f"no SLURM controller: {reason}")
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty recordings as a plain run of the packer packs them; `manifest.tsv` lies beside the folder."""
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that jobs are compared with: two ranks without SLURM, and nothing happens to them."""
    folder = tmp_path_factory.mktemp("unbroken")
    with Ranks(2, shards, folder / "run", *SETTINGS, logs=folder) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    return folder / "run"
