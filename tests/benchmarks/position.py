"""Opening a dataset of a hundred million rows at any position, from a cold disk.

    python tests/benchmarks/position.py --folder DIR [--rows 100000000] [--shards 10000]

Writes an index and a `rows.npy` of that size (1.6 GB; there are no shards behind it), drops them from the page cache,
and measures in a process of its own: reading the index, mapping the rows, what tells the dataset from others, and the
first global batch at a position in the middle of an epoch. The yardstick is plain NumPy reading as many random records
of the same cold file as one window has.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.data.order import WINDOW_ROWS, BatchPlan, PlanConfig, SamplerState
from d2v2ds.data.schema import INDEX_NAME, ROW_DTYPE, ROWS_NAME, FileEntry, Index, ShardEntry, write_index
from d2v2ds.modalities.audio.shards import AudioShards

RATE = 16000


def write(folder: Path, num_rows: int, num_shards: int) -> None:
    """A folder that looks packed."""
    folder.mkdir(parents=True, exist_ok=True)
    records = np.lib.format.open_memmap(folder / ROWS_NAME, mode="w+", dtype=ROW_DTYPE, shape=(num_rows,))
    per_shard = -(-num_rows // num_shards)
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, per_shard):
        stop = min(start + per_shard, num_rows)
        records["shard"][start:stop] = start // per_shard
        records["row"][start:stop] = np.arange(stop - start)
        records["size"][start:stop] = rng.integers(2 * RATE, 20 * RATE, stop - start)
    records.flush()
    size = (folder / ROWS_NAME).stat().st_size
    shards = tuple(
        ShardEntry(
            file=f"audio-{number:05d}.arrow",
            rows=min(per_shard, num_rows - number * per_shard),
            size=0,
            bytes=0,
            crc32=f"{number:08x}",
        )
        for number in range(num_shards)
    )
    index = Index(
        modality="audio",
        format={"codec": "pcm16", "sample_rate_hz": RATE},
        settings={},
        files=num_rows,
        files_skipped=0,
        plan_sha256="",
        rows=num_rows,
        totals={},
        rows_file=FileEntry(file=ROWS_NAME, bytes=size, crc32=""),
        shards=shards,
    )
    write_index(folder, index)


def drop_from_cache(folder: Path) -> None:
    """So that the next process reads from the disk."""
    for name in (INDEX_NAME, ROWS_NAME):
        descriptor = os.open(folder / name, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, what: str) -> None:
    """One measurement, printed as seconds."""
    start = time.perf_counter()
    if what == "plain":
        records = np.load(folder / ROWS_NAME, mmap_mode="r")
        rows = np.random.default_rng(1).choice(len(records), WINDOW_ROWS, replace=False)
        records["size"][np.sort(rows)].sum()
    else:
        shards = AudioShards(folder)
        config = PlanConfig(micro_size=60 * RATE, num_micro=63, min_size=2 * RATE, max_size=20 * RATE, crops=True)
        plan = BatchPlan(shards.sizes, config=config, seed=1)
        state = SamplerState(epoch=7, window=plan.num_windows(7) // 2, micro=100)
        next(plan.iter_from(state))
    print(time.perf_counter() - start)


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--measure", choices=("plain", "position"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.folder, options.measure)
        return
    write(options.folder, options.rows, options.shards)
    seconds = {}
    for what in ("plain", "position"):
        drop_from_cache(options.folder)
        command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", what]
        seconds[what] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(
        f"{options.rows:,} rows in {options.shards:,} shards, cold: first global batch at a position after "
        f"{seconds['position']:.2f} s; {WINDOW_ROWS:,} random records by plain NumPy {seconds['plain']:.2f} s; "
        f"ratio {seconds['plain'] / seconds['position']:.2f}"
    )
    for name in (INDEX_NAME, ROWS_NAME):
        (options.folder / name).unlink()


if __name__ == "__main__":
    main()
