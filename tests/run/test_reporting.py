"""Every command ends with one line and an exit code."""

import errno
import os
from pathlib import Path

import pytest

from d2v2ds.errors import CheckpointError
from d2v2ds.evaluate import main as evaluate
from d2v2ds.ngram import main as ngram
from d2v2ds.outputs import main as outputs
from d2v2ds.run.reporting import INTERRUPTED, reported

ENDS = [
    (CheckpointError("torn"), CheckpointError.exit_code, "torn"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out"), 8, "'out'; make room on the disk"),
    (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "out"), 2, "'out'"),
    (KeyboardInterrupt(), INTERRUPTED, "interrupted; the same command goes on"),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDS)
def test_an_error_is_a_line_and_a_code(
    error: BaseException, code: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> int:
        raise error

    assert reported(work, "the same command goes on") == code
    assert said in caplog.text and len(caplog.records) == 1
    assert reported(lambda: 5, "") == 5


def test_a_place_that_is_not_there_is_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text").write_text("a b\n")
    absent = tmp_path / "absent"
    assert ngram(["--text", str(tmp_path / "text"), "--to", str(absent / "lm.arpa")]) == 2
    assert ngram(["--text", str(absent), "--to", str(tmp_path / "lm.arpa")]) == 2
    assert evaluate([str(absent), "--shards", str(absent)]) == 2
    assert outputs([str(absent), "--config", "finetune/ctc_tiny", "--to", str(tmp_path / "x.json")]) == 2
    assert len(caplog.records) == 4 and caplog.text.count("absent") == 4
