"""The exception types of the project.

A message says where, what was expected, what was found and what to do. The exit code of `d2v2ds.pretrain` is that of
the error that ends it; `slurm/launch.sh` decides by it whether to start again.
`ValueError` stays the type for a caller's mistake in a pure function.
"""

from typing import ClassVar


class D2V2Error(Exception):
    """Base class of every error that d2v2ds raises on purpose."""

    exit_code: ClassVar[int] = 2
    """Exit code of a command that this error ends."""


class ConfigError(D2V2Error):
    """A run cannot start as configured. Raised on every rank, before any process group exists."""


class ShardError(D2V2Error):
    """A shard folder is incomplete, damaged, or not what the run expects."""


class CheckpointError(D2V2Error):
    """A checkpoint is missing, torn, or belongs to another model, stage or world size."""

    exit_code = 5


class SaveError(CheckpointError):
    """Checkpoints could not be written twice in a row; the earlier ones are intact."""

    exit_code = 7


class PreemptedError(D2V2Error):
    """A signal asked the run to stop; everything is saved, and the same command goes on."""

    exit_code = 75


class DamagedDataError(ShardError):
    """More rows of the data could not be read than the run allows."""

    exit_code = 6


class MachineError(D2V2Error):
    """The machine is at fault, not a file or a setting: no descriptors, no memory, a file system that failed."""

    exit_code = 8


class CollapseError(D2V2Error):
    """A health statistic crossed its floor in a run that was asked to stop there."""

    exit_code = 3


class NonFiniteError(D2V2Error):
    """Too many optimizer steps in a row had a non-finite loss or gradient."""

    exit_code = 4


class CellsFailedError(D2V2Error):
    """Runs of a sweep failed; the others are done, or the sweep stopped after too many in a row."""

    exit_code = 9


class MissingExtraError(D2V2Error):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, need: str, extra: str) -> None:
        """
        Args:
            need: who needs which package.
            extra: of `pyproject.toml` that has it; several with commas between.
        """
        super().__init__(need, extra)  # both, for an exception is rebuilt from them in another process

    def __str__(self) -> str:
        need, extra = self.args
        return f"{need}: in the checkout of d2v2ds, pip install '.[{extra}]'"
