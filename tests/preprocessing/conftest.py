"""Small synthetic recordings for the tests of the packer."""

import os
from pathlib import Path

import pytest
import soundfile

from tests.preprocessing.helpers import SCHEDULER_PREFIXES, noise


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run inside a job."""
    for name in list(os.environ):
        if name.startswith(SCHEDULER_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A folder with 24 clips of 0.5-1.6 s in several formats, all mono at 16 kHz."""
    folder = tmp_path / "recordings"
    for number in range(24):
        suffix = ("wav", "flac", "ogg", "mp3")[number % 4]
        path = folder / f"part{number % 3}" / f"clip{number:02d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(0.5 + number * 0.05, number), 16000)
    return folder
