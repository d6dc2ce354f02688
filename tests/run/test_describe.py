"""The log of a run where its file cannot be written."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v2ds.run.describe import start_logging


@pytest.fixture(autouse=True)
def kept_handlers() -> Iterator[None]:
    """Handlers and levels as they were."""
    root, own = logging.getLogger(), logging.getLogger("d2v2ds")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def test_a_log_file_on_a_full_disk_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    start_logging(tmp_path)
    for number in range(3):
        logging.getLogger("d2v2ds.test").info("line %d", number)
    said = capsys.readouterr().err
    assert said.count("log.txt cannot be written, the run continues without: [Errno 28]") == 1
    assert "line 2" in said and "Traceback" not in said


def test_a_log_file_that_cannot_be_opened_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").mkdir()
    start_logging(tmp_path)
    assert "log.txt cannot be written, the run continues without: [Errno 21]" in capsys.readouterr().err
