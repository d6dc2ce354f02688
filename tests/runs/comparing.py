"""Start a tiny run again, and compare it with the run that nothing happened to."""

from pathlib import Path

from tests.runs.launching import STEPS, Ranks, deterministic, weights


def finish(world: int, shards: Path, run_dir: Path, *extra: str) -> str:
    """Start the run again, to its end; returns what rank 0 said."""
    with Ranks(world, shards, run_dir, *extra, logs=run_dir.parent / "again") as ranks:
        assert ranks.wait() == [0] * world, ranks.printed(0)[-3000:]
        return ranks.printed(0)


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Bit for bit: every record, every weight, every average."""
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
