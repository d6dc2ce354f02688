"""Exit codes of the commands of this package."""

from d2v2ds.errors import ConfigError, D2V2Error, MissingExtraError

EXIT_FAILED = 1
EXIT_TOO_MANY_SKIPPED = 3
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells report it."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error: 2 for wrong input or settings, 4 for files, 1 for anything else."""
    if isinstance(error, (ConfigError, MissingExtraError)):
        return 2
    return 4 if isinstance(error, (D2V2Error, OSError)) else EXIT_FAILED
