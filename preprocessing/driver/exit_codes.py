"""Exit codes of the commands of this package."""

from d2v2ds.errors import ConfigError, D2V2Error, MissingExtraError

EXIT_FAILED = 1
EXIT_TOO_MANY_SKIPPED = 3
EXIT_INTERRUPTED = 130
"""Of every command here: what a shell makes of Ctrl-C."""


def exit_code(error: BaseException) -> int:
    """What the process returns to its caller for an error: 2 wrong input or settings, 4 files, else 1."""
    if isinstance(error, (ConfigError, MissingExtraError)):
        return 2
    return 4 if isinstance(error, (D2V2Error, OSError)) else EXIT_FAILED
