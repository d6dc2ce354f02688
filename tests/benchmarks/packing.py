"""Packing FLAC to pcm16 against bare decoding of the same files in the same run.

    python tests/benchmarks/packing.py [--data FOLDER] [--hours 6] [--rounds 5]

Without ``--data`` it writes FLAC files of its own. A small folder is used several times over, through links, until
`--hours` are reached. Each round measures bare ``soundfile.read(dtype="int16")``, one worker and two workers; the best
time of each counts, and everything a user waits for is in it: scan, plan, sync to disk, index.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from preprocessing.pack_audio import main as pack

RATE = 16000
SHARD_BYTES = "48M"
"""Small enough that two workers have equal shares of a few hours."""


def write_clips(folder: Path, minutes: float) -> None:
    """FLAC files of 12 s that compress about as well as read speech: coloured noise with a swell."""
    rng = np.random.default_rng(0)
    for number in range(max(1, round(minutes * 5))):
        noise = np.cumsum(rng.normal(0, 60, 12 * RATE))
        noise -= np.convolve(noise, np.ones(64) / 64, mode="same")
        swell = 1 + np.sin(np.arange(len(noise)) / 9000 + number)
        samples = np.clip(noise * swell, -30000, 30000).astype(np.int16)
        soundfile.write(folder / f"clip{number:05d}.flac", samples, RATE)


def multiply(source: Path, folder: Path, hours: float) -> tuple[list[Path], float]:
    """Link the FLAC files of `source` into `folder` until they make `hours`; returns paths and seconds of audio."""
    files = sorted(source.rglob("*.flac"))
    seconds = [soundfile.info(path).duration for path in files]
    times = max(1, round(hours * 3600 / sum(seconds)))
    paths = [folder / f"{copy:04d}" / f"{number:06d}.flac" for copy in range(times) for number in range(len(files))]
    for path, original in zip(paths, files * times, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(original.resolve())
    return paths, sum(seconds) * times


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall time, after the disk has come to rest."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with FLAC files, 16 kHz, mono")
    parser.add_argument("--hours", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        source = options.data
        if source is None:
            source = scratch / "own"
            source.mkdir()
            write_clips(source, minutes=30)
        (scratch / "input").mkdir()
        paths, seconds = multiply(source, scratch / "input", options.hours)

        def decode() -> None:
            for path in paths:
                soundfile.read(path, dtype="int16")

        number = 0

        def packing(workers: int) -> None:
            nonlocal number
            number += 1
            output = scratch / f"output{number}"
            arguments = ["--input", str(scratch / "input"), "--output", str(output), "--shard-bytes", SHARD_BYTES]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert pack([*arguments, "--workers", str(workers)]) == 0

        work = {
            "bare soundfile decode": decode,
            "packing, 1 worker": lambda: packing(1),
            "packing, 2 workers": lambda: packing(2),
        }
        best = dict.fromkeys(work, float("inf"))
        for _ in range(options.rounds):
            for label, function in work.items():
                best[label] = min(best[label], timed(function))
        bare, one, two = best.values()
        print(f"{len(paths):,} FLAC files, {seconds / 3600:.2f} h, best of {options.rounds}")
        for label, elapsed in best.items():
            print(f"{label:<24}{elapsed:8.2f} s {seconds / elapsed:10,.0f} x real time")
        print(f"{'1 worker / bare decode':<24}{bare / one:8.3f}   goal 0.85")
        print(f"{'2 workers / 1 worker':<24}{one / two:8.3f}   goal 1.8")


if __name__ == "__main__":
    main()
