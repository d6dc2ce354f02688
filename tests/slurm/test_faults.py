"""What happens to nodes, controllers and single ranks: the job is requeued and finishes without a human.

Whatever it went through, every number of every step is that of the run to which nothing happened.
"""

import os
import signal
from pathlib import Path

import pytest

from d2v2ds.distributed.checkpoint.format import named_tag
from tests.runs.launching import records
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.jobs import STEPS, assert_same_run, attempts, pretrain

pytestmark = [pytest.mark.run, pytest.mark.slow]

SAVING = ("run.save_every_steps=4",)
"""For faults without a warning."""
PATIENCE_S = 300.0


def assert_finished(cluster: Cluster, job: int, run_dir: Path, unbroken: Path, restarts: int | None = 1) -> None:
    """The job has done its work, under one number; None if the number of restarts is a matter of chance."""
    ended = cluster.finished(job, PATIENCE_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.story()
    assert restarts is None or ended["Restarts"] == str(restarts), cluster.output(job)
    assert {one["job"] for one in attempts(run_dir)} == {job}
    assert attempts(run_dir)[-1]["code"] == 0
    assert_same_run(run_dir, unbroken)


def at_step(cluster: Cluster, run_dir: Path, step: int) -> None:
    """Wait for a record of the run, which is then far from its end."""
    cluster.until(lambda: records(run_dir) >= step, PATIENCE_S)
    assert records(run_dir) < STEPS - 4


def restarted(cluster: Cluster, job: int) -> None:
    cluster.until(lambda: int(cluster.job(job)["Restarts"]) >= 1, PATIENCE_S)


def all_idle(cluster: Cluster) -> bool:
    return set(cluster.client("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}


# ------------------------------------------------------------------ nodes


def test_node_set_down(cluster: Cluster, shards: Path, unbroken: Path) -> None:
    run_dir = cluster.jobs / "down"
    job = pretrain(cluster, shards, run_dir, extra=SAVING)
    at_step(cluster, run_dir, 6)
    cluster.client("scontrol", "update", "nodename=a2", "state=down", "reason=test")
    assert_finished(cluster, job, run_dir, unbroken)


@pytest.mark.parametrize("node", NODES)
def test_node_crashed(node: str, cluster: Cluster, shards: Path, unbroken: Path) -> None:
    """With or without the job's script on it. If ranks elsewhere end before SLURM notices, the script requeues."""
    run_dir = cluster.jobs / f"crash-{node}"
    job = pretrain(cluster, shards, run_dir, extra=SAVING)
    at_step(cluster, run_dir, 6)
    cluster.crash_node(node)
    restarted(cluster, job)
    cluster.until(lambda: not all_idle(cluster))
    cluster.start_node(node)
    assert_finished(cluster, job, run_dir, unbroken, restarts=None)
    cluster.until(lambda: all_idle(cluster))


# ------------------------------------------------------------------ the scheduler


def test_time_limit(cluster: Cluster, shards: Path, unbroken: Path) -> None:
    """The run is held until the warning comes, which may be at any time in the first minute of two."""
    run_dir = cluster.jobs / "limit"
    job = pretrain(cluster, shards, run_dir, "--time=2", "--signal=B:USR1@60")
    at_step(cluster, run_dir, 3)
    ranks = [pid for node in NODES for pid in cluster.ranks(node)]
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    cluster.until(lambda: "got SIGUSR1; asking all ranks to save" in cluster.output(job), PATIENCE_S)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    assert_finished(cluster, job, run_dir, unbroken)
    first = attempts(run_dir)[0]
    assert (first["code"], first["warned"]) == (75, "USR1")


@pytest.mark.parametrize("partition", ["main", "abrupt"])
def test_preemption(partition: str, cluster: Cluster, shards: Path, unbroken: Path) -> None:
    """With a time of grace, and with nothing but the seconds between TERM and KILL."""
    run_dir = cluster.jobs / f"preempted-{partition}"
    job = pretrain(cluster, shards, run_dir, f"--partition={partition}")
    at_step(cluster, run_dir, 3)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2")
    assert cluster.finished(urgent)["JobState"] == "COMPLETED"
    assert_finished(cluster, job, run_dir, unbroken)
    assert attempts(run_dir)[0]["code"] == 75


def test_controller_restarted(cluster: Cluster, shards: Path, unbroken: Path) -> None:
    run_dir = cluster.jobs / "controller"
    job = pretrain(cluster, shards, run_dir)
    at_step(cluster, run_dir, 3)
    cluster.stop_controller()
    at_step(cluster, run_dir, 8)
    cluster.start_controller()
    assert_finished(cluster, job, run_dir, unbroken, restarts=0)


def test_controller_away_when_the_run_is_warned(cluster: Cluster, shards: Path, unbroken: Path) -> None:
    run_dir = cluster.jobs / "away"
    job = pretrain(cluster, shards, run_dir)
    at_step(cluster, run_dir, 3)
    cluster.stop_controller()
    os.kill(cluster.ranks("a1")[0], signal.SIGUSR1)
    cluster.until(lambda: "ranks ended with 75" in cluster.output(job), PATIENCE_S)
    cluster.start_controller()
    assert_finished(cluster, job, run_dir, unbroken)


# ------------------------------------------------------------------ ranks


def test_rank_killed(cluster: Cluster, shards: Path, unbroken: Path) -> None:
    run_dir = cluster.jobs / "killed"
    job = pretrain(cluster, shards, run_dir, extra=SAVING)
    at_step(cluster, run_dir, 6)
    os.kill(cluster.ranks("a2")[0], signal.SIGKILL)
    assert_finished(cluster, job, run_dir, unbroken)
    first = attempts(run_dir)[0]
    assert first["code"] not in (0, 75) and first["warned"] == ""
    assert first["checkpoint"] >= "step00000004"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_one_rank_alone_signalled(number: signal.Signals, cluster: Cluster, shards: Path, unbroken: Path) -> None:
    run_dir = cluster.jobs / f"alone-{number.name}"
    job = pretrain(cluster, shards, run_dir)
    at_step(cluster, run_dir, 3)
    os.kill(cluster.ranks("a2")[0], number)
    restarted(cluster, job)
    stopped_at = records(run_dir)
    assert named_tag(run_dir / "checkpoints", "latest") == f"step{stopped_at:08d}"
    assert_finished(cluster, job, run_dir, unbroken)
    assert [one["code"] for one in attempts(run_dir)] == [75, 0]
