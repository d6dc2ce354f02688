"""Runs the packer under MPI; rank 1 raises an unexpected error while the others pack and wait."""

import sys

from mpi4py import MPI

from preprocessing import pack_audio
from preprocessing.driver import packing
from preprocessing.driver.progress import Report
from preprocessing.driver.writer import ShardJob, ShardResult, pack_shard


def fail(job: ShardJob, report: Report) -> ShardResult:
    if MPI.COMM_WORLD.rank == 1:
        raise RuntimeError("injected failure")
    return pack_shard(job, report)


if __name__ == "__main__":
    packing.pack_shard = fail
    sys.exit(pack_audio.main(["--input", sys.argv[1], "--output", sys.argv[2], *sys.argv[3:]]))
