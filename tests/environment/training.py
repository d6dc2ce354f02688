"""A tiny run, forked on a machine that lacks something."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.forked import ForkedProgram, Server
from tests.runs.launching import arguments_of, environment

SHORT = ("run.total_steps=4", "run.save_every_steps=2", "data.num_workers=2")
LIMIT_S = 120.0
"""Seconds in which a run ends, however it ends."""


def train(
    server: Server, shards: Path, run_dir: Path, *extra: str, lacks: str = "", before: Sequence[Callable[[], None]] = ()
) -> tuple[int, str]:
    """Run one rank until it ends; returns its exit code and what it printed.

    Args:
        server: forks the rank; data workers, which it forks too, lack nothing.
        shards, run_dir: data, and folder of the run.
        extra: settings beside `SHORT`.
        lacks: abilities that `tests.environment.shim` takes away.
        before: called in the rank first.
    """
    program = start(server, shards, run_dir, *extra, lacks=lacks, before=before)
    try:
        code = program.wait(LIMIT_S)
    finally:
        program.kill()
    return code, log_of(run_dir).read_text()


def start(
    server: Server, shards: Path, run_dir: Path, *extra: str, lacks: str = "", before: Sequence[Callable[[], None]] = ()
) -> ForkedProgram:
    """Start what `train` waits for."""
    arguments = arguments_of(shards, run_dir, *SHORT, *extra)
    variables = environment() | {"LACKS": lacks}
    return ForkedProgram("d2v2ds.pretrain", arguments, variables, log_of(run_dir), server=server, before=before)


def log_of(run_dir: Path) -> Path:
    """File of what a run prints."""
    return run_dir.with_name(f"{run_dir.name}.log")
