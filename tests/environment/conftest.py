"""The library that takes abilities away, built once, and a fork server that has it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.environment.shim import build
from tests.forked import Server
from tests.runs.launching import pack_clips


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the library for LD_PRELOAD."""
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="session")
def server(library: Path) -> Server:
    """A fork server with the library; a process takes abilities away from itself by its variable LACKS."""
    return Server(LD_PRELOAD=str(library))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short recordings, packed."""
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of 6 MB, more than one direct write."""
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(4):
        noise = np.random.default_rng(number).normal(0, 900, 16000 * 48).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", noise, 16000)
    return folder
