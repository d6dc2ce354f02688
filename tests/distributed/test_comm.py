"""How a process finds its place, the small collectives, and the runner of the distributed tests itself."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from d2v2ds.distributed import comm
from d2v2ds.distributed.comm import launcher_environment
from d2v2ds.errors import CheckpointError, ConfigError, D2V2Error
from tests.ranks import RankError, run_distributed

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "MASTER_ADDR": "c1", "MASTER_PORT": "29500"}


def test_plain_process_is_rank_zero_of_one_on_the_loopback() -> None:
    added = launcher_environment({})
    assert (added["RANK"], added["LOCAL_RANK"], added["WORLD_SIZE"]) == ("0", "0", "1")
    assert added["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(added["MASTER_PORT"]) < 65536


def test_srun_task_takes_its_place_from_slurm() -> None:
    assert launcher_environment(SLURM) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


def test_step_of_fewer_tasks_than_the_job_counts_its_own() -> None:
    assert launcher_environment(SLURM | {"SLURM_STEP_NUM_TASKS": "6"})["WORLD_SIZE"] == "6"


def test_existing_rank_wins_over_slurm() -> None:
    launcher = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert launcher_environment(SLURM | launcher) == {}


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_environment_is_an_error_that_names_the_variable(missing: str) -> None:
    environ = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(ConfigError, match=f"{missing} not set"):
        launcher_environment(environ)


def small_collectives() -> dict[str, object]:
    return {
        "place": (comm.rank(), comm.world(), comm.local_rank()),
        "sums": comm.all_reduce_sum([comm.rank() + 1.0, 0.5]),
        "broadcast": comm.broadcast_object({"from": comm.rank()}),
        "gathered": comm.gather_objects(comm.rank() * 10),
        "port": os.environ["MASTER_PORT"],
    }


@pytest.mark.distributed
def test_small_collectives_give_every_rank_the_same() -> None:
    first, second = run_distributed(small_collectives, 2)
    assert (first.pop("place"), second.pop("place")) == ((0, 2, 0), (1, 2, 1))
    port = first["port"]
    assert first == second
    assert first["sums"] == [3.0, 1.0]
    assert first["broadcast"] == {"from": 0}
    assert first["gathered"] == [0, 10]
    assert not [file for file in Path("/dev/shm").iterdir() if str(port) in file.name]


def one_rank_raises() -> None:
    if comm.rank() == 1:
        raise ValueError("the reason of rank 1")
    comm.barrier()


def one_rank_dies() -> None:
    if comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()


def one_rank_hangs(folder: Path) -> None:
    (folder / str(comm.rank())).write_text(str(os.getpid()))
    if comm.rank() == 1:
        time.sleep(600)


@pytest.mark.distributed
def test_runner_shows_the_failing_rank_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1: Traceback[\s\S]*the reason of rank 1"):
        run_distributed(one_rank_raises, 2)
    with pytest.raises(RankError, match="rank 1: died without a report.*SIGKILL"):
        run_distributed(one_rank_dies, 2)
    with pytest.raises(RankError, match="ranks .*1.* did not report in time"):
        run_distributed(one_rank_hangs, 2, tmp_path, timeout_s=5)
    for file in tmp_path.iterdir():
        assert not Path(f"/proc/{file.read_text()}").exists()


@pytest.mark.parametrize(
    ("count", "local_rank", "index"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (4, 3, 3), (4, 4, None), (2, 7, None)]
)
def test_a_rank_takes_the_gpu_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int, index: int | None
) -> None:
    """`--gpus-per-task=1` shows every rank one GPU, number 0, whatever its local rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if index is None:
        with pytest.raises(ConfigError, match=f"expected a GPU for each rank of this node, found {count} visible"):
            comm.device()
    else:
        assert comm.device() == torch.device("cuda", index)


@pytest.mark.distributed
def test_a_port_in_use_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = "from d2v2ds.distributed import comm\nfrom d2v2ds.errors import MachineError\n"
        code += "try: comm.initialise()\nexcept MachineError as error: print(error)"
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables, "MASTER_PORT": str(taken.getsockname()[1])},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("rank 0: no connection at 127.0.0.1:")
    assert "choose one with `--master_port`" in done.stdout


def _together(failing: int, kind: str) -> str:
    def act() -> int:
        if comm.rank() == failing:
            raise {"machine": OSError(5, "Input/output error"), "file": CheckpointError("x: damaged")}.get(
                kind, MemoryError()
            )
        return comm.rank()

    try:
        return str(comm.together(act, "here"))
    except D2V2Error as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.distributed
def test_what_fails_on_one_rank_fails_on_all() -> None:
    assert run_distributed(_together, 2, -1, "") == ["0", "1"]
    for kind, expected in (
        ("machine", "MachineError here: rank 1: [Errno 5] Input/output error; the disk or its network failed"),
        ("file", "CheckpointError x: damaged"),
        ("memory", "MachineError here: rank 1: no memory left"),
    ):
        found = run_distributed(_together, 2, 1, kind)
        assert found[0] == found[1] and found[0].startswith(expected)
