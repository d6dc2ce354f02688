"""The benchmark of packing images runs; its numbers are for people, not for tests."""

import pytest

from tests.benchmarks.packing_images import main


@pytest.mark.distributed
def test_packing_images_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "6", "--rounds", "1"]) == 0
    table = capsys.readouterr().out
    for row in ("copy into one file", "packing, 2 workers", "1 worker / copy"):
        assert row in table
