"""The order of a packing, for every modality: scan, plan, prepare or go on, pack shards, finish.

The inputs are scanned, a plan is made, each shard is packed by one process, and the leader writes the index at the
end. Killed and started again with the same command, a packing keeps finished shards and ends with the same bytes.
Several commands may pack a part of the shards each at the same time (`--part`); one without a part then finds all of
them finished and writes the index. What a modality adds is its `Packer`.
"""

import datetime
import json
import platform
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from d2v2ds import __version__
from d2v2ds.data.schema import (
    INDEX_NAME,
    FileEntry,
    Index,
    file_crc32,
    move_into_place,
    read_index,
    write_index,
    write_json,
)
from d2v2ds.errors import ConfigError
from preprocessing.driver.input_files import utf8
from preprocessing.driver.notes import count_notes
from preprocessing.driver.progress import Progress, Report
from preprocessing.driver.protocol import Packer
from preprocessing.driver.shard_plan import Plan
from preprocessing.driver.team.protocol import Team
from preprocessing.driver.writer import (
    PACKING_NAME,
    ShardJob,
    ShardResult,
    finished_shard,
    pack_shard,
    write_notes,
    write_rows,
    write_skipped,
)

Item = TypeVar("Item")
Found = TypeVar("Found")

_PLAN_NAME = "plan.json"


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
    noted = sorted([*plan.noted, *(one for result in results for one in result.noted)], key=lambda one: one.order)
    write_skipped(output, skipped)
    if noted:
        write_notes(output, noted)
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
        notes=count_notes(noted, plan.files),
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
