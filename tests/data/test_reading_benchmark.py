"""The reading benchmark runs as its first lines say; its numbers are for people, not for tests."""

import subprocess
import sys

from tests.preprocessing.helpers import ROOT, clean_environment


def test_reading_benchmark_prints_its_table():
    command = [sys.executable, "-m", "tests.benchmarks.reading", "--clips", "7", "--repeats", "1", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for row in ("pcm16: shard to batch with masks", "flac: soundfile decoding", "masks: 96 rows"):
        assert row in done.stdout
