"""Steps of the demonstration that prepare data: each is the command that a user would type."""

import hashlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class StepFailedError(Exception):
    """A command of the demonstration ended with an error; the command has said why."""


def run(*command: str) -> None:
    """Print a command and run it with this interpreter's packages."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise StepFailedError(f"{shlex.join(command)}: exit code {done.returncode}")


def python(module: str, *arguments: str) -> None:
    """Run a module as a user would."""
    run(sys.executable, "-m", module, *arguments)


@dataclass(frozen=True)
class FineTuning:
    """A task for the pretrained network and for its random start."""

    config: str
    """Configuration of `d2v2ds.finetune`."""
    train: Path
    """Labelled shards to learn from."""
    valid: Path
    """Labelled shards to score."""
    score: tuple[str, str]
    """Keys of the score in evaluation.json."""
    says: str
    """The score in words."""
    overrides: tuple[str, ...] = ()
    """Settings that they need."""


@dataclass(frozen=True)
class Prepared:
    """Packed data of one modality."""

    train: Path
    """Shards to pretrain on."""
    overrides: tuple[str, ...] = ()
    """Settings that they need."""
    probe: tuple[str, ...] | None = None
    """Arguments of `d2v2ds.probe`; None without labels."""
    fine_tuning: FineTuning | None = None
    """None without labels."""


def pack(kind: str, source: Path, output: Path, *arguments: str) -> Path:
    """Pack one folder; a finished packing of the same data is kept."""
    python(f"preprocessing.pack_{kind}", "--input", str(source), "--output", str(output), *arguments)
    return output


def key_of(data: Path) -> str:
    """A name by which packings of different data do not mix."""
    return hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]
