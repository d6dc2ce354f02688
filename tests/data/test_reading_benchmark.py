"""The reading benchmark runs; its numbers are for people, not for tests."""

from tests.benchmarks.reading import main


def test_reading_benchmark_prints_its_table(capsys):
    assert main(["--clips", "7", "--repeats", "1", "--steps", "3"]) == 0
    table = capsys.readouterr().out
    for row in ("pcm16: shard to batch with masks", "flac: soundfile decoding", "masks: 96 rows"):
        assert row in table
