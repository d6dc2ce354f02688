"""The probe's options, without a run."""

from pathlib import Path

import pytest

from d2v2ds.probe import main


@pytest.mark.parametrize(
    ("option", "value"),
    [("--c", "0"), ("--c", "-1"), ("--c", "nan"), ("--c", "inf"), ("--neighbours", "0"), ("--neighbours", "-3")],
)
def test_impossible_settings_are_refused_before_anything_is_read(
    option: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "no run"), "--shards", str(tmp_path / "nothing"), option, value]) == 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{option} is {float(value):g}, expected ")
