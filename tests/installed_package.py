"""A package of another project, as pip leaves it: modules and a dist-info folder with entry points."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def install(folder: Path, modules: Mapping[str, str], entry_points: str) -> None:
    """Write modules and the description of the package `sensors`.

    Args:
        folder: new; belongs on the path of a program.
        modules: sources by name.
        entry_points: contents of `entry_points.txt`.
    """
    information = folder / "sensors-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sensors\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(entry_points)
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


def run_beside(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that finds the package of `install` and this project."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
