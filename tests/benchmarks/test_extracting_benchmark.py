"""The benchmark of extraction runs; its numbers are for people, not for tests."""

import pytest

from tests.benchmarks import extracting


def test_benchmark_of_extraction_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert extracting.main(["--configs", "audio_tiny", "image_tiny", "--inputs", "3", "--repeats", "1"]) == 0
    table = capsys.readouterr().out
    for row in ("audio_tiny", "image_tiny"):
        assert row in table
