"""Re-read a whole shard folder and check it: ``python -m preprocessing.verify DIR [--workers N]``.

Checked: sizes and checksums of all files, columns, row counts, ``rows.npy`` against the shards, and for every row that
its audio decodes to the stated length, mean and variance. Prints one line per fault (file, what, expected, found).
Exit codes: 0 everything is right; 1 at least one fault; 2 no such folder, or unfinished.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2v2ds.data.schema import SAMPLE_DTYPE, Codec, FileEntry, ShardEntry, audio_schema, file_crc32, read_index
from d2v2ds.data.shards import ArrowShards, decode_flac
from d2v2ds.errors import D2V2Error, ShardError
from preprocessing.parallel import LocalTeam
from preprocessing.progress import Progress
from preprocessing.sources import Report
from preprocessing.waveform import Samples, mean_and_variance

EXIT_FAULTY = 1
EXIT_UNREADABLE = 2


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """Everything one process needs to check one shard."""

    folder: Path
    number: int
    entry: ShardEntry
    codec: Codec
    sample_rate_hz: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args(arguments)
    try:
        faults = verify(options.folder, options.workers)
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    for fault in faults:
        print(fault)
    index = read_index(options.folder)
    print(f"{options.folder}: {index.rows:,} rows in {len(index.shards)} shards checked, {len(faults)} faults")
    return EXIT_FAULTY if faults else 0


def verify(folder: Path, workers: int = 1) -> list[str]:
    """Every fault of a shard folder, one line each; an empty list if there is none.

    Raises:
        ShardError: if the folder has no readable index.
    """
    index = read_index(folder)
    jobs = [
        ShardCheck(folder=folder, number=number, entry=entry, codec=index.codec, sample_rate_hz=index.sample_rate_hz)
        for number, entry in enumerate(index.shards)
    ]
    progress = Progress("verifying", index.rows, index.samples, index.sample_rate_hz, unit="rows")
    faults = [fault for part in LocalTeam(workers).map(check_shard, jobs, progress.add) for fault in part]
    progress.finish()
    faults = [*_file_faults(folder, index.rows_file), *faults]
    for name in ("rows", "samples"):
        total, declared = sum(getattr(entry, name) for entry in index.shards), getattr(index, name)
        if total != declared:
            faults.append(_fault("index.json", f"total {name}", f"{total} (sum over shards)", declared))
    return faults


def check_shard(job: ShardCheck, report: Report) -> list[str]:
    """The faults of one shard."""
    faults = _file_faults(job.folder, job.entry)
    name = job.entry.file
    if not (job.folder / name).is_file():
        return faults
    try:
        with pa.memory_map(str(job.folder / name)) as source, pa.ipc.open_file(source) as reader:
            if not reader.schema.equals(audio_schema(job.codec, job.sample_rate_hz), check_metadata=True):
                return [*faults, _fault(name, "columns and metadata", "those of the index", reader.schema.names)]
            lengths: list[int] = []
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                faults.extend(_row_faults(name, len(lengths), batch, job.codec))
                lengths.extend(batch.column("num_samples").to_pylist())
                report(batch.num_rows, sum(lengths[-batch.num_rows :]))
    except (pa.ArrowInvalid, pa.ArrowSerializationError, OSError) as error:
        return [*faults, _fault(name, "format", "an Arrow IPC file", error)]
    if len(lengths) != job.entry.rows:
        faults.append(_fault(name, "rows", job.entry.rows, len(lengths)))
    if sum(lengths) != job.entry.samples:
        faults.append(_fault(name, "samples", job.entry.samples, sum(lengths)))
    return [*faults, *_index_faults(job, lengths)]


def _row_faults(name: str, first: int, batch: pa.RecordBatch, codec: Codec) -> Iterator[str]:
    doubled = [key for key, count in Counter(batch.column("id").to_pylist()).items() if count > 1]
    if doubled:
        yield _fault(name, "ids", "each once", f"{doubled[0]!r} more than once")
    for row in range(batch.num_rows):
        where = f"{name} row {first + row}"
        length = batch.column("num_samples")[row].as_py()
        encoded = np.frombuffer(batch.column("audio")[row].as_buffer(), dtype=np.uint8)
        try:
            samples: Samples = (
                decode_flac(encoded, 0, length + 1, where) if codec == "flac" else encoded.view(SAMPLE_DTYPE)
            )
        except (ShardError, ValueError) as error:
            yield _fault(where, "audio", f"{length} samples of {codec}", error)
            continue
        if len(samples) != length:
            yield _fault(where, "audio", f"{length} samples", f"{len(samples)} samples")
            continue
        found = tuple(batch.column(column)[row].as_py() for column in ("mean", "var"))
        if found != (expected := mean_and_variance(samples)):
            yield _fault(where, "mean and variance", expected, found)


def _index_faults(job: ShardCheck, lengths: list[int]) -> Iterator[str]:
    """Compare the part of ``rows.npy`` that belongs to this shard."""
    try:
        shards = ArrowShards(job.folder)
    except ShardError:
        return  # reported with the file itself
    before = sum(entry.rows for entry in shards.index.shards[: job.number])
    records = shards.records[before : before + len(lengths)]
    expected = {
        "shard": np.full(len(records), job.number),
        "row": np.arange(len(records)),
        "num_samples": np.array(lengths[: len(records)], dtype=np.int64),
    }
    for column, values in expected.items():
        if wrong := np.flatnonzero(records[column] != values).tolist():
            row = wrong[0]
            yield _fault(f"rows.npy record {before + row}", column, values[row], records[column][row])


def _file_faults(folder: Path, entry: ShardEntry | FileEntry) -> list[str]:
    path = folder / entry.file
    if not path.is_file():
        return [_fault(entry.file, "file", f"{entry.bytes} bytes", "no such file")]
    if (size := path.stat().st_size) != entry.bytes:
        return [_fault(entry.file, "bytes", entry.bytes, size)]
    crc32 = file_crc32(path)
    return [] if crc32 == entry.crc32 else [_fault(entry.file, "crc32", entry.crc32, crc32)]


def _fault(where: str, what: str, expected: object, found: object) -> str:
    return f"{where}: {what}: expected {expected}, found {found}"


if __name__ == "__main__":
    sys.exit(main())
