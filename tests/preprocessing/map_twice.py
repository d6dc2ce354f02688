"""Runs two `map` calls in a row under MPI; rank 0 is slow in the first, the others are done with both by then."""

import time

from mpi4py import MPI

from preprocessing.driver.progress import Report
from preprocessing.driver.team.mpi import MpiTeam


def first(job: int, report: Report) -> str:
    time.sleep(0.5 if MPI.COMM_WORLD.rank == 0 else 0)
    report(1, 0)
    return f"first {job}"


def second(job: int, report: Report) -> str:
    report(1, 0)
    return f"second {job}"


if __name__ == "__main__":
    counts = [0, 0]

    def count(number: int, files: int) -> None:
        counts[number] += files

    team = MpiTeam(MPI.COMM_WORLD)
    results = [
        team.map(first, range(4), lambda files, size: count(0, files)),
        team.map(second, range(2), lambda files, size: count(1, files)),
    ]
    if team.is_leader:
        print(results, counts)
