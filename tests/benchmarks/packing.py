"""Packing FLAC to pcm16 against bare decoding of the same files in the same run.

    python tests/benchmarks/packing.py [--data FOLDER] [--hours 24] [--rounds 3]

Without ``--data`` it writes FLAC files of its own. A small folder is used several times over, through links, until
`--hours` are reached. Each round measures bare ``soundfile.read(dtype="int16")``, one worker and two workers; the best
time of each counts, and everything a user waits for is in it: scan, plan, sync to disk, index. Processor time stands
beside it for machines that are shared with other work.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import soundfile

from preprocessing.pack_audio import main as pack

RATE = 16000
SHARD_BYTES = "64M"
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


Times = tuple[float, float]
"""Seconds of wall time and of processor time."""


def timed(work: Callable[[], object]) -> Times:
    """Seconds of wall time and of processor time (this process and its children), after the disk has come to rest."""
    os.sync()
    start, processor = time.perf_counter(), _processor_seconds()
    work()
    return time.perf_counter() - start, _processor_seconds() - processor


def best_of(rounds: int, work: Mapping[str, Callable[[], object]], clear: Callable[[], None]) -> dict[str, Times]:
    """The best `timed` of each piece of work, taken in turn; `clear` removes what the one before wrote."""
    best = dict.fromkeys(work, (float("inf"), float("inf")))
    for _ in range(rounds):
        for label, function in work.items():
            clear()
            best[label] = min(best[label], timed(function))
    return best


def _processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with FLAC files, 16 kHz, mono")
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--rounds", type=int, default=3)
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

        output = scratch / "output"
        arguments = ["--input", str(scratch / "input"), "--output", str(output), "--shard-bytes", SHARD_BYTES]

        def packing(workers: int) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert pack([*arguments, "--workers", str(workers)]) == 0

        work = {
            "bare soundfile decode": decode,
            "packing, 1 worker": lambda: packing(1),
            "packing, 2 workers": lambda: packing(2),
        }
        best = best_of(options.rounds, work, lambda: shutil.rmtree(output, ignore_errors=True))
        load = os.getloadavg()[0]
        print(f"{len(paths):,} FLAC files, {seconds / 3600:.2f} h, best of {options.rounds}, machine load {load:.1f}")
        print(f"{'':<24}{'wall s':>10}{'x real time':>14}{'processor s':>14}")
        for label, (wall, processor) in best.items():
            print(f"{label:<24}{wall:>10.2f}{seconds / wall:>14,.0f}{processor:>14.2f}")
        (bare, bare_processor), (one, one_processor), (two, two_processor) = best.values()
        print(f"{'':<24}{'wall':>10}{'goal':>14}{'processor':>14}")
        print(f"{'1 worker / bare decode':<24}{bare / one:>10.3f}{0.85:>14}{bare_processor / one_processor:>14.3f}")
        print(f"{'2 workers / 1 worker':<24}{one / two:>10.3f}{1.8:>14}{2 * one_processor / two_processor:>14.3f}")


if __name__ == "__main__":
    main()
