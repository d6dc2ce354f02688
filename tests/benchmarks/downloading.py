"""Downloading over loopback beside a plain urllib copy of the same bytes in the same run.

    python tests/benchmarks/downloading.py [--mib 512] [--files 2] [--rounds 3] [--scratch FOLDER]

The server is Python's own in another process. Each round copies all files with ``urllib`` and ``shutil.copyfileobj``,
copies them and reads them again for their SHA-256, and downloads them with one and with two jobs, everything included:
asking for sizes, records, syncing to the disk, checking. The best round of each counts.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from preprocessing.download.command import main as download


def write_files(folder: Path, files: int, size: int) -> dict[str, str]:
    """Noise under names; returns their SHA-256."""
    rng = np.random.default_rng(0)
    sums = {}
    for number in range(files):
        data = rng.bytes(size)
        (folder / f"{number}.bin").write_bytes(data)
        sums[f"{number}.bin"] = hashlib.sha256(data).hexdigest()
    return sums


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of `folder` in another process."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        finally:
            process.terminate()


def best_seconds(work: Callable[[Path], object], scratch: Path, rounds: int) -> float:
    """Of the fastest round, each into an empty folder, after the disk has come to rest."""
    seconds = []
    for _ in range(rounds):
        folder = scratch / "to"
        folder.mkdir()
        os.sync()
        start = time.perf_counter()
        work(folder)
        seconds.append(time.perf_counter() - start)
        shutil.rmtree(folder)
    return min(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of each file")
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        (scratch / "files").mkdir()
        sums = write_files(scratch / "files", options.files, options.mib << 20)
        with served(scratch / "files") as address:
            urls = scratch / "urls.tsv"
            urls.write_text("".join(f"{address}/{file}\t{value}\n" for file, value in sums.items()))

            def copy(folder: Path) -> None:
                for file in sums:
                    with urllib.request.urlopen(f"{address}/{file}") as source, (folder / file).open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                        os.fsync(sink.fileno())

            def copy_and_check(folder: Path) -> None:
                copy(folder)
                for file, value in sums.items():
                    with (folder / file).open("rb") as copied:
                        assert hashlib.file_digest(copied, "sha256").hexdigest() == value

            def fetch(jobs: int) -> Callable[[Path], None]:
                def run(folder: Path) -> None:
                    command = ["urls", "--list", str(urls), "--to", str(folder), "--jobs", str(jobs)]
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        assert download(command) == 0

                return run

            work = {
                "urllib copy": copy,
                "urllib copy, then sha256": copy_and_check,
                "download, 1 job": fetch(1),
                "download, 2 jobs": fetch(2),
            }
            seconds = {label: best_seconds(function, scratch, options.rounds) for label, function in work.items()}
    total = options.files * options.mib
    print(f"{options.files} files of {options.mib} MiB, best of {options.rounds}, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<28}{'s':>8}{'MiB/s':>10}{'/ copy':>10}{'/ copy, sha256':>16}")
    for label, value in seconds.items():
        ratios = [seconds[base] / value for base in ("urllib copy", "urllib copy, then sha256")]
        print(f"{label:<28}{value:>8.2f}{total / value:>10,.0f}{ratios[0]:>10.2f}{ratios[1]:>16.2f}")


if __name__ == "__main__":
    main()
