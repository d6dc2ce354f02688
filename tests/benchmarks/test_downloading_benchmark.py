"""The benchmark of downloading runs; its numbers are for people, not for tests."""

import pytest

from tests.benchmarks import downloading


def test_the_benchmark_of_downloading_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    downloading.main(["--mib", "1", "--rounds", "1"])
    table = capsys.readouterr().out
    for row in ("urllib copy, then sha256", "download, 1 job", "download, 2 jobs"):
        assert row in table
