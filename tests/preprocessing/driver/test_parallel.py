"""Local workers and MPI ranks: the same bytes, and no rank that waits for ever."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError, D2V2Error
from preprocessing.driver.progress import Report
from preprocessing.driver.team.choose import check_world, choose_team
from preprocessing.driver.team.local import LocalTeam
from preprocessing.pack_audio import main
from tests.preprocessing.helpers import ROOT, clean_environment, contents, run_module

MPIRUN = Path(sys.executable).parent / "mpirun"
needs_mpi = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python: install the extra mpi")


SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Removes the shared memory that MPICH leaves behind when its ranks are aborted."""
    before = set(SHARED_MEMORY.glob("mpich_shm_*"))
    yield
    for left in set(SHARED_MEMORY.glob("mpich_shm_*")) - before:
        left.unlink()


def mpirun(
    ranks: int, *arguments: object, module: str = "preprocessing.pack_audio"
) -> subprocess.CompletedProcess[str]:
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        check=False,
        stdin=subprocess.DEVNULL,
    )


@needs_mpi
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpi_ranks_write_the_same_bytes_as_one_worker(recordings: Path, tmp_path: Path, ranks: int) -> None:
    arguments = ("--input", recordings, "--shard-bytes", "128K")
    assert main([*map(str, arguments), "--output", str(tmp_path / "one"), "--workers", "1"]) == 0
    result = mpirun(ranks, *arguments, "--output", tmp_path / "mpi")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("24 rows") == 1, "only the leader prints"
    assert contents(tmp_path / "mpi") == contents(tmp_path / "one")


@needs_mpi
@pytest.mark.distributed
def test_mpi_results_and_progress_of_two_calls_in_a_row_are_not_mixed() -> None:
    result = mpirun(3, module="tests.preprocessing.map_twice")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ("[['first 0', 'first 1', 'first 2', 'first 3'], ['second 0', 'second 1']] [4, 2]")


@needs_mpi
@pytest.mark.distributed
def test_an_error_that_all_ranks_share_is_printed_once(tmp_path: Path) -> None:
    result = mpirun(3, "--input", tmp_path / "absent", "--output", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.count("nothing there") == 1


@needs_mpi
@pytest.mark.distributed
@pytest.mark.usefixtures("no_leftovers")
def test_one_failing_rank_ends_all_of_them(recordings: Path, tmp_path: Path) -> None:
    result = mpirun(
        3, recordings, tmp_path / "out", "--shard-bytes", "128K", module="tests.preprocessing.fail_on_rank_one"
    )
    assert result.returncode != 0
    assert "injected failure" in result.stderr
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("variable", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_that_do_not_see_each_other_stop_with_advice(recordings: Path, tmp_path: Path, variable: str) -> None:
    arguments = ("--input", recordings, "--output", tmp_path / "out")
    result = run_module("preprocessing.pack_audio", *arguments, **{variable: "4"})
    assert result.returncode == 2, result.stderr
    assert "4 tasks" in result.stderr and "MPI world of 1" in result.stderr and "srun --mpi" in result.stderr
    assert not (tmp_path / "out").exists()


def test_as_many_tasks_as_ranks_or_fewer_are_fine() -> None:
    check_world(tasks=1, world_size=1)
    check_world(tasks=2, world_size=8)
    with pytest.raises(ConfigError, match="3 tasks"):
        check_world(tasks=3, world_size=2)


def test_without_a_launcher_mpi_is_not_even_imported() -> None:
    code = (
        "import sys; from preprocessing.driver.team.choose import choose_team; choose_team(2, False); "
        "sys.exit(any(name.startswith(('mpi4py', 'torch')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=clean_environment(), check=False).returncode == 0


def test_one_worker_per_core_by_default() -> None:
    assert choose_team(None, False, {}).size == len(os.sched_getaffinity(0))
    assert choose_team(3, False, {"SLURM_NTASKS": "1"}).size == 3
    with pytest.raises(ConfigError, match="--workers 0"):
        choose_team(0, False, {})
    with pytest.raises(ConfigError, match="--workers 0"):
        LocalTeam(0).map(square, [1], lambda files, samples: None)


def square(job: int, report: Report) -> int:
    report(1, job)
    return job * job


def fail_at_three(job: int, report: Report) -> int:
    if job == 3:
        raise D2V2Error("three is too many")
    return job


def die(job: int, report: Report) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    files = samples = 0

    def report(new_files: int, new_samples: int) -> None:
        nonlocal files, samples
        files += new_files
        samples += new_samples

    assert LocalTeam(workers).map(square, range(7), report) == [0, 1, 4, 9, 16, 25, 36]
    assert (files, samples) == (7, 21)


@pytest.mark.distributed
def test_error_of_a_worker_arrives_with_its_type() -> None:
    with pytest.raises(D2V2Error, match="three is too many"):
        LocalTeam(2).map(fail_at_three, range(5), lambda files, samples: None)


@pytest.mark.distributed
def test_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(D2V2Error, match="exit code -9"):
        LocalTeam(2).map(die, range(2), lambda files, samples: None)


def whoami(job: int, report: Report) -> int:
    return os.getpid()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.distributed
def test_workers_stay_for_the_next_call_and_end_with_the_team() -> None:
    with LocalTeam(3) as team:
        first = team.map(whoami, range(4), lambda files, samples: None)
        assert len(set(first)) == 3 and first[0] == first[3] and os.getpid() not in first
        assert team.map(whoami, range(2), lambda files, samples: None) == first[:2]
        assert team.map(whoami, range(1), lambda files, samples: None) == [os.getpid()], "one job is for this process"
        assert all(map(alive, first))
    assert not any(map(alive, first))


@pytest.mark.distributed
def test_after_an_error_no_worker_is_left_and_new_ones_start() -> None:
    with LocalTeam(2) as team:
        first = team.map(whoami, range(2), lambda files, samples: None)
        with pytest.raises(D2V2Error, match="three is too many"):
            team.map(fail_at_three, range(5), lambda files, samples: None)
        assert not any(map(alive, first))
        assert not set(first) & set(team.map(whoami, range(2), lambda files, samples: None))


@pytest.mark.distributed
def test_ctrl_c_while_workers_start_is_heard_by_their_parent_only(tmp_path: Path) -> None:
    """A terminal sends it to all of them, and workers import for a while before their own code runs."""
    # one write, for two processes share the pipe
    slow = "import os, sys, time\nif 'spawn_main' in ' '.join(sys.orig_argv): os.write(1, b'begun\\n'); time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    code = (
        "import sys; from tests.preprocessing.driver.test_parallel import LocalTeam, work_on\n"
        "try: LocalTeam(2).map(work_on, range(2), lambda files, samples: None)\n"
        "except KeyboardInterrupt: sys.exit('interrupted')"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == parent.stdout.readline() == "begun\n"
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=30)[1] == "interrupted\n"


def stop_or_fail(job: int, report: Report) -> None:
    if job == 1:
        time.sleep(1)  # until the other one is stopped
        raise D2V2Error("one is too many")
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.distributed
def test_a_worker_that_is_stopped_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.driver.team.local._PATIENCE_S", 0.5)
    team = LocalTeam(2)
    workers = team.map(whoami, range(2), lambda files, samples: None)
    failsafe = threading.Timer(20, os.kill, (workers[0], signal.SIGKILL))
    failsafe.start()
    start = time.monotonic()
    with pytest.raises(D2V2Error, match="one is too many"):
        team.map(stop_or_fail, range(2), lambda files, samples: None)
    failsafe.cancel()
    assert time.monotonic() - start < 15 and not any(map(alive, workers))


@pytest.mark.distributed
@pytest.mark.parametrize("state", ["idle", "at work"])
def test_workers_end_when_their_parent_is_killed(state: str, tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from preprocessing.driver.team.local import LocalTeam;"
        "from tests.preprocessing.driver.test_parallel import whoami, work_on; team = LocalTeam(2);"
        "print(*team.map(whoami, range(2), lambda files, samples: None), flush=True);"
        + ("team.map(work_on, range(2), lambda files, samples: None)" if state == "at work" else "time.sleep(60)")
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=clean_environment()) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(0.2)
        assert all(map(alive, workers))
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def work_on(job: int, report: Report) -> None:
    for _ in range(600):
        time.sleep(0.1)
        report(1, 1)


def test_sidecars_do_not_remain(recordings: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    main(["--input", str(recordings), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "audio-00000.arrow", "index.json", "rows.npy", "skipped.tsv",
    ]  # fmt: skip
