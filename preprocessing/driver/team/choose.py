"""Choice between local workers and the ranks of an MPI job."""

import os
from collections.abc import Mapping

from d2v2ds.errors import ConfigError, MissingExtraError
from preprocessing.driver.team.local import LocalTeam
from preprocessing.driver.team.mpi import MpiTeam
from preprocessing.driver.team.protocol import Team

_TASK_VARIABLES = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
_LAUNCHER_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def choose_team(workers: int | None, use_mpi: bool, environment: Mapping[str, str] = os.environ) -> Team:
    """Return the ranks of the MPI job that this process belongs to, or local workers if there is none.

    Args:
        workers: local processes; None takes one per usable core.
        use_mpi: use MPI even if no launcher is detected.
        environment: variables that launchers set.

    Raises:
        ConfigError: if the scheduler started more tasks than the MPI world has, or workers are asked of MPI ranks.
    """
    tasks = _scheduled_tasks(environment)
    if not (use_mpi or tasks > 1 or any(name in environment for name in _LAUNCHER_VARIABLES)):
        return LocalTeam(len(os.sched_getaffinity(0)) if workers is None else workers)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library to load
        raise MissingExtraError(
            f"started by an MPI launcher or with --mpi, and MPI is missing ({error})", "mpi"
        ) from error
    world = MPI.COMM_WORLD
    check_world(tasks, world.size)
    if world.size == 1 and not use_mpi:
        return LocalTeam(len(os.sched_getaffinity(0)) if workers is None else workers)
    if workers is not None and workers > 1:
        raise ConfigError(f"--workers {workers} under MPI: expected one process per rank; start more ranks instead")
    return MpiTeam(world)


def check_world(tasks: int, world_size: int) -> None:
    """Raise a `ConfigError` if a scheduler started `tasks` processes that do not see each other."""
    if tasks > world_size:
        raise ConfigError(
            f"the scheduler reports {tasks} tasks, this process sees an MPI world of {world_size}: the tasks would "
            "all pack the same files.\n"
            "  Start with an MPI plugin that fits the MPI library: srun --mpi=pmi2 python -m preprocessing.pack_audio"
            " ... (`srun --mpi=list` names the plugins),\n"
            "  or with the library's own launcher: mpirun -n N python -m ...,\n"
            "  or ask for one task and use local workers: --ntasks=1 --cpus-per-task=N and --workers N"
        )


def _scheduled_tasks(environment: Mapping[str, str]) -> int:
    counts = [environment.get(name, "") for name in _TASK_VARIABLES]
    return max((int(count) for count in counts if count.isdigit()), default=1)
