"""What the tests of the packer share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER_PREFIXES = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_", "HYDRA")


def noise(seconds: float, seed: int, rate: int = 16000) -> np.ndarray:
    """(S,) int16 noise with a slow swell."""
    count = int(seconds * rate)
    swell = 1 + np.sin(np.arange(count) / 4000)
    return (np.random.default_rng(seed).normal(0, 800, count) * swell).astype(np.int16)


def clean_environment() -> dict[str, str]:
    """The environment without traces of a scheduler or launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SCHEDULER_PREFIXES)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_module(module: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m module` in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean_environment() | variables, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a shard folder; of the index, all but ``created_by``."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "index.json" in files:
        files["index.json"] = files["index.json"].split(b'"created_by"')[0]
    return files
