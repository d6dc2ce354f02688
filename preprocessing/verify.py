"""Re-read a whole shard folder and check it: ``python -m preprocessing.verify DIR [--workers N]``.

Checked: sizes and checksums of all files, columns, row counts, ``rows.npy`` against the shards, and every row against
its checksums and its bytes: audio decodes to the stated length, mean and variance, an image to the stated format and
size. Prints one line per fault (file, what, expected, found).
Exit codes: 0 everything is right; 1 at least one fault; 2 no such folder, or unfinished; 130 interrupted.
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

from d2v2ds.data.schema import (
    FileEntry,
    Index,
    Layout,
    ShardEntry,
    file_crc32,
    read_index,
    row_sizes,
    shard_schema,
)
from d2v2ds.data.shardfile import RowBatch
from d2v2ds.errors import D2V2Error, ShardError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error
from preprocessing.driver.exit_codes import EXIT_INTERRUPTED
from preprocessing.driver.notes import NOTES_NAME, said_notes
from preprocessing.driver.progress import Progress, Report
from preprocessing.driver.report_lines import fault
from preprocessing.driver.team.local import LocalTeam
from preprocessing.formats import format_of, open_shards

EXIT_FAULTY = 1
EXIT_UNREADABLE = 2


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """Everything one process needs to check one shard."""

    folder: Path
    number: int
    index: Index

    @property
    def entry(self) -> ShardEntry:
        """Entry of the shard in the index."""
        return self.index.shards[self.number]


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    for found in faults:
        print(found)
    index = read_index(options.folder)
    if index.notes:
        print(f"noted when it was packed: {said_notes(index)} (files in {NOTES_NAME})")
    print(f"{options.folder}: {index.rows:,} rows in {len(index.shards)} shards checked, {len(faults)} faults")
    return EXIT_FAULTY if faults else 0


def verify(folder: Path, workers: int = 1) -> list[str]:
    """Every fault of a shard folder, one line each; an empty list if there is none.

    Raises:
        ShardError: if the folder has no readable index.
        ConfigError: if nobody provides its format.
    """
    index = read_index(folder)
    total = format_of(index.modality, folder).shards.layout.total
    jobs = [ShardCheck(folder=folder, number=number, index=index) for number in range(len(index.shards))]
    progress = Progress("verifying", index.rows, unit="rows")
    with LocalTeam(workers) as team:
        faults = [found for part in team.map(check_shard, jobs, progress.add) for found in part]
    progress.finish()
    beside = [found for entry in (index.rows_file, *index.files_beside) for found in _file_faults(folder, entry)]
    faults = [*beside, *faults]
    for name, declared, summed in (
        ("rows", index.rows, sum(entry.rows for entry in index.shards)),
        (total, index.totals.get(total), sum(entry.size for entry in index.shards)),
    ):
        if summed != declared:
            faults.append(fault("index.json", f"total {name}", f"{summed} (sum over shards)", declared))
    return faults


def check_shard(job: ShardCheck, report: Report) -> list[str]:
    """The faults of one shard."""
    index, name = job.index, job.entry.file
    faults = _file_faults(job.folder, job.entry)
    found = format_of(index.modality, job.folder)
    layout, batch_faults = found.shards.layout, found.report().batch_faults
    if not (job.folder / name).is_file():
        return faults
    try:
        with pa.memory_map(str(job.folder / name)) as source, pa.ipc.open_file(source) as reader:
            if not reader.schema.equals(shard_schema(layout, index.format), check_metadata=True):
                return [*faults, fault(name, "columns and metadata", "those of the index", reader.schema.names)]
            sizes: list[int] = []
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                faults.extend(_doubled_ids(name, batch))
                faults.extend(_checksum_faults(job, layout, batch, len(sizes)))
                faults.extend(batch_faults(batch, index, name, len(sizes)))
                sizes.extend(row_sizes(layout, batch).tolist())
                report(batch.num_rows, 0)
    except (pa.ArrowException, OSError, ValueError) as error:  # the last from names that are not UTF-8
        if isinstance(error, OSError) and is_machine_fault(error):
            raise reading_error(job.folder / name, error, ShardError) from error
        return [*faults, fault(name, "format", "an Arrow IPC file", error)]
    if len(sizes) != job.entry.rows:
        faults.append(fault(name, "rows", job.entry.rows, len(sizes)))
    if sum(sizes) != job.entry.size:
        faults.append(fault(name, layout.total, job.entry.size, sum(sizes)))
    return [*faults, *_index_faults(job, sizes)]


def _doubled_ids(name: str, batch: pa.RecordBatch) -> Iterator[str]:
    counts = Counter(batch.column("id").to_pylist())
    counts.pop(None, None)  # rows of text have none
    doubled = [key for key, count in counts.items() if count > 1]
    if doubled:
        yield fault(name, "ids", "each once", f"{doubled[0]!r} more than once")


def _checksum_faults(job: ShardCheck, layout: Layout, batch: pa.RecordBatch, first: int) -> Iterator[str]:
    """Rows that training would leave out."""
    rows = RowBatch(batch, layout, job.number, first, job.entry.file)
    for row in range(batch.num_rows):
        try:
            rows.texts(row)
            rows.payload(row)
        except ShardError as error:
            yield str(error)


def _index_faults(job: ShardCheck, sizes: list[int]) -> Iterator[str]:
    """Compare the part of ``rows.npy`` that belongs to this shard."""
    try:
        shards = open_shards(job.folder)
    except ShardError:
        return  # reported with the file itself
    before = sum(entry.rows for entry in shards.index.shards[: job.number])
    records = shards.records[before : before + len(sizes)]
    expected = {
        "shard": np.full(len(records), job.number),
        "row": np.arange(len(records)),
        "size": np.array(sizes[: len(records)], dtype=np.int64),
    }
    for column, values in expected.items():
        if wrong := np.flatnonzero(records[column] != values).tolist():
            row = wrong[0]
            yield fault(f"rows.npy record {before + row}", column, values[row], records[column][row])


def _file_faults(folder: Path, entry: ShardEntry | FileEntry) -> list[str]:
    path = folder / entry.file
    if not path.is_file():
        return [fault(entry.file, "file", f"{entry.bytes} bytes", "no such file")]
    if (size := path.stat().st_size) != entry.bytes:
        return [fault(entry.file, "bytes", entry.bytes, size)]
    crc32 = file_crc32(path)
    return [] if crc32 == entry.crc32 else [fault(entry.file, "crc32", entry.crc32, crc32)]


if __name__ == "__main__":
    sys.exit(main())
