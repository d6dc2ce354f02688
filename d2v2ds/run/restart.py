"""Decide whether a run that ended goes back into the queue: the policy of ``slurm/launch.sh``.

    python -m d2v2ds.run.restart --run DIR --code N --job ID --restart COUNT [--warned SIGNAL]

In: the exit code of the run and its newest checkpoint. Out: `requeue` or `stop` on stdout, the reason in one sentence
on stderr, and a line in `<run>/attempts.jsonl`. Needs the standard library only, and a tenth of a second.

An exit code of the run decides. Anything else is a crash, and a crash is started again, because most are crashes of
nodes, networks and disks; but not if repeated starts make no progress.
"""

import argparse
import datetime
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from d2v2ds.errors import (
    CheckpointError,
    CollapseError,
    ConfigError,
    D2V2Error,
    DamagedDataError,
    MachineError,
    NonFiniteError,
    PreemptedError,
    SaveError,
)
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, json_lines, read_text

FINISHED, SAVED = 0, PreemptedError.exit_code
STOPS = {
    ConfigError.exit_code: "its configuration or data is wrong",
    CollapseError.exit_code: "its representations collapsed",
    NonFiniteError.exit_code: "too many steps were not finite",
    CheckpointError.exit_code: "it has no usable checkpoint",
    DamagedDataError.exit_code: "too much of its data is damaged",
    SaveError.exit_code: "its checkpoints could not be written",
}
"""Exit codes of `d2v2ds.pretrain` that another start would only repeat."""
STARTS_AGAIN = {MachineError.exit_code}
"""Exit codes of `d2v2ds.pretrain` that count as crashes: another node may do."""
SAME_CRASHES = 3
"""Crashes in a row with one exit code and no new checkpoint after which a job stops."""
FRUITLESS_CRASHES = 6
"""The same whatever the exit codes, for which rank dies first is often chance, and whether warned or not."""
FILE_NAME = "attempts.jsonl"
_THEN = "mend the cause, then submit again"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run, as it ended; a line of `attempts.jsonl`."""

    time: str
    """Time of its end, ISO 8601 with time zone."""
    job: int
    """SLURM's number; it stays the same when a job is requeued."""
    restart: int
    """Earlier starts of this job by SLURM."""
    code: int
    """Exit code of the step: the largest of its ranks'."""
    checkpoint: str
    """The newest finished one, empty if there is none."""
    warned: str
    """The signal by which SLURM or somebody asked the run to stop, KILL if it killed the job's script, or empty."""

    @property
    def is_crash(self) -> bool:
        """It ended in a way that the run did not choose."""
        return self.code not in (FINISHED, SAVED, *STOPS)


@dataclass(frozen=True)
class Verdict:
    """Action for the job, and the reason in one sentence."""

    action: Literal["requeue", "stop"]
    reason: str


def decide(attempts: Sequence[Attempt]) -> Verdict:
    """Judge the last attempt in the light of those before it.

    Args:
        attempts: of one run, oldest first, at least one. Those of other jobs do not count: a person who submits a
            run again has changed something.
    """
    now = attempts[-1]
    where = f"newest checkpoint {now.checkpoint or 'none'}"
    if now.code == FINISHED:
        return Verdict("stop", "the run is finished")
    if now.code == SAVED:
        return Verdict("requeue", f"the run was asked to stop and saved ({where})")
    if now.code in STOPS:
        return Verdict("stop", f"the run ended with code {now.code}: {STOPS[now.code]}; it would end so again")
    stuck = _crashes_without_progress(attempts)
    if len(stuck) >= FRUITLESS_CRASHES:
        return Verdict("stop", f"GIVING UP: {len(stuck)} crashes in a row and no new checkpoint ({where}); {_THEN}")
    if now.warned:
        return Verdict("requeue", f"the run was ended ({_name(now.code)}) before it had saved ({where})")
    same = [one for one in stuck[-SAME_CRASHES:] if one.code == now.code and not one.warned]
    if len(same) == SAME_CRASHES:
        return Verdict("stop", f"GIVING UP: {SAME_CRASHES} crashes in a row with {_name(now.code)} and no new "
                       f"checkpoint ({where}); {_THEN}")  # fmt: skip
    return Verdict("requeue", f"the run crashed with {_name(now.code)} ({where}); crashes since then: {len(stuck)}")


def _crashes_without_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The last attempts of the job as far back as they crashed at the same checkpoint; oldest first."""
    now, found = attempts[-1], []
    for one in reversed([attempt for attempt in attempts if attempt.job == now.job]):
        if not one.is_crash or one.checkpoint != now.checkpoint:
            break
        found.append(one)
    return found[::-1]


def _name(code: int) -> str:
    """An exit code in words; a shell adds 128 to the number of a signal."""
    signals = {number.value: number.name for number in signal.Signals}
    return f"code {code} ({signals[code - 128]})" if code - 128 in signals else f"code {code}"


def newest_checkpoint(run_dir: Path) -> str:
    """Checkpoint that `latest` names, empty if there is none."""
    file = run_dir / "checkpoints" / "latest"
    try:
        return read_text(file, ConfigError, limit=4096).strip() if is_there(file, ConfigError) else ""
    except D2V2Error:
        return ""  # for the run itself to say


def read_attempts(run_dir: Path) -> list[Attempt]:
    """Attempts so far; lines that were cut short by a full disk or a lost node are left out."""
    types = {"time": str, "job": int, "restart": int, "code": int, "checkpoint": str, "warned": str}
    found = []
    try:
        for record in json_lines(run_dir / FILE_NAME, ConfigError):
            if record.keys() == types.keys() and all(type(record[name]) is kind for name, kind in types.items()):
                found.append(Attempt(**record))
    except D2V2Error as error:
        print(f"earlier attempts are not counted: {error}", file=sys.stderr)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code, which is 0 whatever the verdict."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.run.restart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--code", type=int, required=True, help="exit code of the run")
    parser.add_argument("--job", type=int, required=True, help="SLURM's job number")
    parser.add_argument("--restart", type=int, required=True, help="how often this job was started before")
    parser.add_argument("--warned", default="", metavar="SIGNAL", help="what asked the run to stop, if anything did")
    options = parser.parse_args(arguments)
    now = Attempt(
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        job=options.job,
        restart=options.restart,
        code=options.code,
        checkpoint=newest_checkpoint(options.run),
        warned=options.warned,
    )
    verdict = decide([*read_attempts(options.run), now])
    print(verdict.action)
    print(f"{verdict.action}: {verdict.reason}", file=sys.stderr)
    try:
        durable.append_line(options.run / FILE_NAME, json.dumps(asdict(now)))
    except OSError as error:
        print(f"{options.run / FILE_NAME}: this attempt could not be noted: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
