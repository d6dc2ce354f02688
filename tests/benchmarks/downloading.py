"""Download over loopback beside plain `curl` of the same bytes in the same run.

    python tests/benchmarks/downloading.py [--mib 512] [--rounds 3] [--scratch FOLDER]

Python's own server runs in another process. Each round fetches one file with curl alone, with curl and then SHA-256,
and with `preprocessing.download`, each into an empty folder. The best round of each counts.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from preprocessing.download.command import main as download


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` from another process; yields the address."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        finally:
            process.terminate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    options = parser.parse_args(arguments)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name, served(Path(name)) as address:
        data = Path(name) / "data.bin"
        data.write_bytes(np.random.default_rng(0).bytes(options.mib << 20))
        with data.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        urls, target = Path(name) / "urls.tsv", Path(name) / "to"
        urls.write_text(f"{address}/data.bin\t{checksum}\n")

        def curl() -> None:
            subprocess.run(["curl", "-sSf", "-o", target / "data.bin", f"{address}/data.bin"], check=True)

        def curl_and_check() -> None:
            curl()
            with (target / "data.bin").open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == checksum

        def ours() -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert download(["urls", "--list", str(urls), "--to", str(target)]) == 0

        for _ in range(options.rounds):
            for label, work in {"curl": curl, "curl, then sha256": curl_and_check, "download": ours}.items():
                target.mkdir()
                os.sync()
                start = time.perf_counter()
                work()
                best[label] = min(best.get(label, np.inf), time.perf_counter() - start)
                shutil.rmtree(target)
    print(f"{options.mib} MiB, best of {options.rounds}, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<20}{'s':>8}{'MiB/s':>10}{'/ curl':>10}{'/ curl, sha256':>16}")
    for label, seconds in best.items():
        ratios = [best[base] / seconds for base in ("curl", "curl, then sha256")]
        print(f"{label:<20}{seconds:>8.2f}{options.mib / seconds:>10,.0f}{ratios[0]:>10.2f}{ratios[1]:>16.2f}")


if __name__ == "__main__":
    main()
