"""Settings of a CPU process take effect on every thread."""

import os
import subprocess
import sys

CODE = """
import torch
from d2v2ds.run.machine import tune_cpu
tune_cpu({processes})
tiny = torch.full((1 << 22,), 1e-30) * 1e-10  # shared by all threads
print(int(tiny.count_nonzero()), torch.get_num_threads())
"""


def _tuned(processes: int, **environment: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, "-c", CODE.format(processes=processes)]
    return [
        int(x) for x in subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout.split()
    ]


def test_no_thread_computes_with_denormal_numbers() -> None:
    assert _tuned(1) == [0, len(os.sched_getaffinity(0))]


def test_cores_are_shared_unless_the_user_said_how_many() -> None:
    assert _tuned(10_000)[1] == 1
    assert _tuned(10_000, OMP_NUM_THREADS="2")[1] == 2
