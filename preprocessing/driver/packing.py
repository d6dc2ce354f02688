"""The order of a packing, for every modality: scan, plan, prepare or go on, pack shards, finish.

The inputs are scanned, a plan is made, each shard is packed by one process, and the leader writes the index at the
end. Killed and started again with the same command, a packing keeps finished shards and ends with the same bytes.
Several commands may pack a part of the shards each at the same time (`--part`); one without a part then finds all of
them finished and writes the index. What a modality adds is its `Packer`; ``pack_MODALITY.py`` holds that and the
command line.

Exit codes: 0 done; 2 wrong input or settings, nothing was packed; 3 the folder is complete, but all files or more
than --max-skipped were skipped; 4 a file could not be written or an input vanished, run again; 130 interrupted, run
again.
"""

import argparse
import datetime
import json
import platform
import re
import secrets
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from d2v2ds import __version__
from d2v2ds.data.schema import (
    INDEX_NAME,
    SKIPPED_NAME,
    FileEntry,
    Index,
    file_crc32,
    move_into_place,
    read_index,
    write_index,
    write_json,
)
from d2v2ds.errors import ConfigError, D2V2Error
from preprocessing.driver.input_files import said_ignored, utf8
from preprocessing.driver.parallel import EXIT_INTERRUPTED, Team, choose_team, exit_code
from preprocessing.driver.plan import Plan
from preprocessing.driver.progress import Progress, Report
from preprocessing.driver.protocol import Packer
from preprocessing.driver.writer import (
    PACKING_NAME,
    ShardJob,
    ShardResult,
    finished_shard,
    pack_shard,
    write_rows,
    write_skipped,
)

Item = TypeVar("Item")
Found = TypeVar("Found")

DEFAULT_SHARD_BYTES = 256 << 20
EXIT_TOO_MANY_SKIPPED = 3
_PLAN_NAME = "plan.json"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def common_parser(
    name: str,
    description: str | None,
    input_metavar: str,
    input_help: str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> argparse.ArgumentParser:
    """The options that every packer has; the modality adds its own.

    Args:
        name: of the command, behind ``pack_``.
        description: for ``--help``.
        input_metavar: how ``--help`` calls an input.
        input_help: what an input may be.
        shard_bytes: default size of a shard.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m preprocessing.pack_{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(program=parser.prog)
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar=input_metavar, help=input_help)
    add("--output", type=Path, required=True, metavar="DIR", help="new shard folder, or one to go on with")
    add("--workers", type=int, metavar="N", help="local processes (default: one per core)")
    add("--mpi", action="store_true", help="use MPI even if no launcher is detected")
    add(
        "--shard-bytes",
        type=parse_bytes,
        default=shard_bytes,
        metavar="BYTES",
        help=f"about this size ({shard_bytes >> 20}M)",
    )
    add(
        "--part",
        type=parse_part,
        metavar="I/N",
        help="pack every N-th shard from shard I on and write no index, beside N - 1 commands that pack the others; "
        "the same command without --part, after all of them, writes it",
    )
    add("--max-skipped", type=float, default=0.01, metavar="SHARE", help="exit 3 above this share (%(default)s)")
    return parser


def run(packer: Packer, options: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """Pack as the command line says; returns the exit code.

    Args:
        packer: of the modality, with its settings.
        options: of `common_parser`.
        arguments: what was parsed, None for those of the process; they are noted in the index.
    """
    leads = True
    try:
        packer.settings.check()
        team = choose_team(options.workers, options.mpi)
        leads = team.is_leader
        with team:
            plan = packer.scan(team, options.input)
            ignored = said_ignored(plan.ignored)
            if leads and ignored:  # before hours of packing, and again at the end
                print(ignored, file=sys.stderr)
            index = pack(
                team,
                plan,
                options.output,
                packer,
                f"{options.program} {shlex.join(arguments or sys.argv[1:])}",
                options.part,
            )
    except D2V2Error as error:
        if leads:
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        print(f"error: {error}; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    if index is None:
        if leads:
            print(f"{options.output}: part {'/'.join(map(str, options.part))} is packed; no index yet")
        return 0
    share = index.files_skipped / max(1, index.files)
    reasons = f"reasons are in {options.output / SKIPPED_NAME}"
    fault = None
    if not index.rows:
        fault = f"no rows came out of {index.files:,} files; {reasons}"
    elif share > options.max_skipped:
        fault = (
            f"{share:.2%} of the files were skipped, --max-skipped allows {options.max_skipped:.2%}; {reasons}. "
            "The folder is complete and usable."
        )
    if leads:
        print("; ".join(filter(None, [summary(options.output, index, packer), ignored])))
        if fault:
            print(f"error: {fault}", file=sys.stderr)
    return EXIT_TOO_MANY_SKIPPED if fault else 0


def pack(
    team: Team,
    plan: Plan,
    output: Path,
    packer: Packer,
    command: str = "",
    part: tuple[int, int] | None = None,
) -> Index | None:
    """Pack what a plan holds into the shard folder `output`; every process of the team calls this.

    Args:
        team: who packs.
        plan: of `Packer.scan`.
        output: a new folder, or one to go on with.
        packer: of the modality.
        command: noted in the index.
        part: (I, N) packs only shards whose number is I modulo N and writes no index; None packs all.

    Returns:
        The index; None after a part, unless the folder was finished before.

    Raises:
        ConfigError: if settings or the output folder do not fit; nothing has been packed then.
        ShardError: if the disk is full.
    """
    results = team.share(lambda: _prepare(output, packer, plan, part))
    if isinstance(results, Index):
        return results
    beside = team.share(lambda: packer.make_beside(output, plan))
    first, step = part or (0, 1)
    todo = [number for number in range(first, len(results), step) if results[number] is None]
    jobs = [ShardJob(number=number, folder=output, units=plan.shards[number], packer=packer) for number in todo]
    units = [unit for job in jobs for unit in job.units]
    progress = Progress("packing", sum(unit.files for unit in units), sum(unit.size for unit in units), packer.measure)
    for number, result in zip(todo, team.map(pack_shard, jobs, progress.add), strict=False):
        results[number] = result
    if team.is_leader:
        progress.finish()
    if part is not None:
        return None
    finished: list[ShardResult] = [result for result in results if result is not None]
    return team.share(lambda: _finish(output, packer, plan, finished, beside, command, team.size))


def read_all(
    team: Team,
    read: Callable[[Sequence[Item], Report], list[Found]],
    items: Sequence[Item],
    name: str,
    items_per_job: int = 4096,
) -> list[Found]:
    """Look at every item of a scan, spread over the team: what `read` found, in order, for the leader.

    Args:
        team: all of its processes call this.
        read: answers one result per item of a job and reports (1, 0) for each.
        items: the same in every process.
        name: first word of the progress line.
        items_per_job: items that are read by one process in one go.
    """
    jobs = [items[start : start + items_per_job] for start in range(0, len(items), items_per_job)]
    progress = Progress(name, len(items))
    parts = team.map(read, jobs, progress.add)
    if team.is_leader:
        progress.finish()
    return [found for part in parts for found in part]


def summary(output: Path, index: Index, packer: Packer) -> str:
    """One line that says what a finished folder holds."""
    size = sum(entry.bytes for entry in index.shards) / (1 << 20)
    return (
        f"{output}: {index.rows:,} rows, {packer.describe(index)}, {len(index.shards)} shards, {size:,.1f} MiB; "
        f"{index.files_skipped:,} of {index.files:,} files skipped"
    )


def parse_bytes(text: str) -> int:
    """Parse ``268435456``, ``256M`` or ``256MiB``."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)(iB)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes such as 64M, 256MiB or 1G, found {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def parse_part(text: str) -> tuple[int, int]:
    """Parse ``I/N``, a number from 0 to N - 1 and how many parts there are."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/10, found {text!r}")
    return int(match[1]), int(match[2])


def _prepare(
    output: Path, packer: Packer, plan: Plan, part: tuple[int, int] | None
) -> Index | list[ShardResult | None]:
    """Make or recognise the output folder: the index if it is finished, else what is finished of each shard.

    Raises:
        ConfigError: if the folder holds anything but the beginning of this very packing.
    """
    own = {"modality": packer.layout.name, "files": plan.files, "plan_sha256": plan.sha256}
    wanted = packer.settings.as_json() | own
    packing = output / PACKING_NAME
    if (output / INDEX_NAME).exists():
        index = read_index(output)
        _check_same(output, {**index.settings, **{name: getattr(index, name) for name in own}}, wanted)
        shutil.rmtree(packing, ignore_errors=True)
        return index
    # looked for before the plan: another part may begin meanwhile, and writes its plan before its first shard
    is_foreign = output.exists() and any(path.name != PACKING_NAME for path in output.iterdir())
    if (packing / _PLAN_NAME).exists():
        _check_same(output, json.loads((packing / _PLAN_NAME).read_text(encoding="utf-8")), wanted)
        for leftover in packing.glob("*.tmp") if part is None else ():  # another part may be writing them
            leftover.unlink(missing_ok=True)
        return [finished_shard(output, packer.layout.name, number) for number in range(len(plan.shards))]
    if is_foreign:
        raise ConfigError(
            f"--output {output}: expected an empty folder or an unfinished packing, found other files; "
            "take another folder or empty this one"
        )
    packing.mkdir(parents=True, exist_ok=True)
    draft = packing / f"{secrets.token_hex(8)}.tmp"  # parts on two machines may have the same process id
    write_json(draft, wanted)
    move_into_place(draft, packing / _PLAN_NAME)
    return [None] * len(plan.shards)


def _check_same(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a `ConfigError` that shows every setting in which a folder differs from this command."""
    names = sorted(found.keys() | wanted.keys())
    differing = [
        f"  {name}: the folder has {found.get(name)!r}, this command {wanted.get(name)!r}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ConfigError(
            f"--output {output} was packed with other settings or from other files (plan_sha256); shards are never "
            "mixed: take another folder, or delete this one\n" + "\n".join(differing)
        )


def _finish(
    output: Path,
    packer: Packer,
    plan: Plan,
    results: Sequence[ShardResult],
    beside: Sequence[str],
    command: str,
    processes: int,
) -> Index:
    """Write the files beside the shards, the index last, and remove what only a restart needs."""
    skipped = sorted([*plan.skipped, *(one for result in results for one in result.skipped)], key=lambda one: one.order)
    shards = tuple(result.entry for result in results)
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    write_skipped(output, skipped)
    index = Index(
        modality=packer.layout.name,
        format=packer.format(output),
        settings=packer.settings.as_json(),
        files=plan.files,
        files_skipped=len(skipped),
        plan_sha256=plan.sha256,
        rows=sum(entry.rows for entry in shards),
        totals=packer.totals(sum(entry.size for entry in shards), counts),
        rows_file=write_rows(output, shards),
        files_beside=tuple(_file_entry(output / name) for name in beside),
        shards=shards,
        created_by={
            "command": utf8(command),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processes": processes,
            "versions": {
                "d2v2ds": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                **packer.versions(),
            },
        },
    )
    write_index(output, index)
    shutil.rmtree(output / PACKING_NAME, ignore_errors=True)
    return index


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(file=path.name, bytes=path.stat().st_size, crc32=file_crc32(path))
