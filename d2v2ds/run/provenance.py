"""Write into a run's folder what it was made of: time, command, ranks, revision, library versions, machine."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from d2v2ds.distributed import comm
from d2v2ds.errors import ConfigError
from d2v2ds.io import durable
from d2v2ds.io.read import json_lines

PACKAGES = ("d2v2ds", "torch", "deepspeed", "numpy", "pyarrow")


def git_revision() -> str | None:
    """Revision of the checkout this package runs from, with `-dirty` if files differ; None outside of one."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> list[str]:
    """Command that starts this run, as a user would type it: launchers start a file and add a rank."""
    words = iter(sys.argv[1:])
    typed = []
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name != "--local-rank":
            typed.append(word)
        elif "=" not in word:
            next(words, None)
    return ["python", "-m", "d2v2ds.pretrain", *typed]


def count_starts(run_dir: Path) -> int:
    """Number of starts so far."""
    return sum(1 for _ in json_lines(run_dir / "starts.jsonl", ConfigError))


def write(run_dir: Path, config_yaml: str, ds_config: dict[str, Any]) -> None:
    """Write `config.yaml`, `deepspeed.json` and append one line to `starts.jsonl`. On one rank alone."""
    run_dir.mkdir(parents=True, exist_ok=True)
    durable.replace_text(run_dir / "config.yaml", config_yaml)
    durable.replace_text(run_dir / "deepspeed.json", json.dumps(ds_config, indent=2) + "\n")
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "world_size": comm.world(),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": platform.platform(),
    }
    durable.append_line(run_dir / "starts.jsonl", json.dumps(start))
