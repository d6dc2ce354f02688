"""A real SLURM controller for the tests that need one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import pack_clips
from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A controller and two nodes."""
    if reason := why_not():
        pytest.skip(f"no SLURM controller: {reason}")
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty recordings; beside the manifest lies `packed`, what a plain run of the packer makes of them."""
    folder = tmp_path_factory.mktemp("speech")
    pack_clips(folder)
    return folder / "manifest.tsv"
