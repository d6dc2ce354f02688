"""The library that takes abilities away, built once."""

from pathlib import Path

import pytest

from tests.environment.shim import build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the library for LD_PRELOAD."""
    return build(tmp_path_factory.mktemp("shim"))
