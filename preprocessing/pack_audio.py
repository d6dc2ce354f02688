"""Pack any folder of audio into Arrow shards: ``python -m preprocessing.pack_audio --input DIR_OR_TSV --output DIR``.

Headers are read, a plan is made, each shard is packed by one process, and the leader writes the index at the end.
Killed and started again with the same command, it keeps finished shards and ends with the same bytes.

Exit codes: 0 done; 2 wrong input or settings, nothing was packed; 3 the folder is complete, but more files than
--max-skipped were skipped; 4 a file could not be written or an input vanished, run again; 130 interrupted, run again.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import soxr

from d2v2ds import __version__
from d2v2ds.data.schema import CODECS, INDEX_NAME, SKIPPED_NAME, Index, read_index, write_index, write_json
from d2v2ds.errors import ConfigError, D2V2Error
from preprocessing.parallel import Team, choose_team, exit_code
from preprocessing.plan import SAMPLE_RATE_HZ, PackSettings, Plan, make_plan
from preprocessing.progress import Progress
from preprocessing.sources import Clip, find_clips, read_headers, utf8
from preprocessing.writer import (
    PACKING_NAME,
    ShardJob,
    ShardResult,
    finished_shard,
    pack_shard,
    write_rows,
    write_skipped,
)

EXIT_TOO_MANY_SKIPPED = 3
EXIT_INTERRUPTED = 130
_PLAN_NAME = "plan.json"
_HEADERS_PER_JOB = 4096
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    settings = PackSettings(
        codec=options.codec,
        resample=options.resample,
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        shard_bytes=options.shard_bytes,
        join_seconds=tuple(options.join_seconds) if options.join_seconds else None,
        seed=options.seed,
        label_column=options.label_column,
    )
    leads = True
    try:
        settings.check()
        team = choose_team(options.workers, options.mpi)
        leads = team.is_leader
        with team:
            index = pack(team, options.input, options.output, settings, shlex.join(arguments or sys.argv[1:]))
    except D2V2Error as error:
        if leads:
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    share = index.files_skipped / index.files
    too_many = share > options.max_skipped
    if leads:
        print(_summary(options.output, index))
        if too_many:
            print(
                f"error: {share:.2%} of the files were skipped, --max-skipped allows {options.max_skipped:.2%}; "
                f"reasons are in {options.output / SKIPPED_NAME}. The folder is complete and usable.",
                file=sys.stderr,
            )
    return EXIT_TOO_MANY_SKIPPED if too_many else 0


def pack(team: Team, inputs: Sequence[Path], output: Path, settings: PackSettings, command: str = "") -> Index:
    """Pack `inputs` into the shard folder `output`; every process of the team calls this.

    Raises:
        ConfigError: if inputs, settings or the output folder do not fit; nothing has been packed then.
        ShardError: if the disk is full.
    """
    clips = team.share(lambda: find_clips(inputs, settings.label_column))
    plan = _scan(team, clips, settings)
    results = team.share(lambda: _prepare(output, settings, plan))
    if isinstance(results, Index):
        return results
    todo = [number for number, result in enumerate(results) if result is None]
    jobs = [ShardJob(number=number, folder=output, units=plan.shards[number], settings=settings) for number in todo]
    files = sum(len(unit.clips) for job in jobs for unit in job.units)
    progress = Progress("packing", files, sum(unit.samples for job in jobs for unit in job.units), SAMPLE_RATE_HZ)
    for number, result in zip(todo, team.map(pack_shard, jobs, progress.add), strict=False):
        results[number] = result
    if team.is_leader:
        progress.finish()
    finished: list[ShardResult] = [result for result in results if result is not None]
    return team.share(lambda: _finish(output, settings, plan, finished, command, team.size))


def _scan(team: Team, clips: Sequence[Clip], settings: PackSettings) -> Plan:
    """Read all headers, spread over the team, and make the plan."""
    paths = [clip.path for clip in clips]
    jobs = [paths[start : start + _HEADERS_PER_JOB] for start in range(0, len(paths), _HEADERS_PER_JOB)]
    progress = Progress("reading headers", len(paths))
    parts = team.map(read_headers, jobs, progress.add)
    if team.is_leader:
        progress.finish()
    return team.share(lambda: make_plan(clips, [header for part in parts for header in part], settings))


def _prepare(output: Path, settings: PackSettings, plan: Plan) -> Index | list[ShardResult | None]:
    """Make or recognise the output folder: the index if it is finished, else what is finished of each shard.

    Raises:
        ConfigError: if the folder holds anything but the beginning of this very packing.
    """
    wanted = {"sample_rate_hz": SAMPLE_RATE_HZ, **settings.as_json(), "files": plan.files, "plan_sha256": plan.sha256}
    packing = output / PACKING_NAME
    if (output / INDEX_NAME).exists():
        index = read_index(output)
        own = ("sample_rate_hz", "files", "plan_sha256")
        _check_same(output, {**index.settings, **{name: getattr(index, name) for name in own}}, wanted)
        shutil.rmtree(packing, ignore_errors=True)
        return index
    if (packing / _PLAN_NAME).exists():
        _check_same(output, _read_plan(packing / _PLAN_NAME), wanted)
        for leftover in packing.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        return [finished_shard(output, number) for number in range(len(plan.shards))]
    if output.exists() and any(path.name != PACKING_NAME for path in output.iterdir()):
        raise ConfigError(
            f"--output {output}: expected an empty folder or an unfinished packing, found other files; "
            "take another folder or empty this one"
        )
    packing.mkdir(parents=True, exist_ok=True)
    write_json(packing / _PLAN_NAME, wanted)
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
    settings: PackSettings,
    plan: Plan,
    results: Sequence[ShardResult],
    command: str,
    processes: int,
) -> Index:
    """Write the files beside the shards, the index last, and remove what only a restart needs."""
    skipped = sorted([*plan.skipped, *(one for result in results for one in result.skipped)], key=lambda one: one.order)
    shards = tuple(result.entry for result in results)
    samples = sum(entry.samples for entry in shards)
    write_skipped(output, skipped)
    index = Index(
        modality="audio",
        sample_rate_hz=SAMPLE_RATE_HZ,
        codec=settings.codec,
        settings=settings.as_json(),
        files=plan.files,
        files_skipped=len(skipped),
        plan_sha256=plan.sha256,
        rows=sum(entry.rows for entry in shards),
        samples=samples,
        hours=samples / SAMPLE_RATE_HZ / 3600,
        rows_file=write_rows(output, shards),
        shards=shards,
        created_by={
            "command": utf8(f"python -m preprocessing.pack_audio {command}"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processes": processes,
            "versions": {
                "d2v2ds": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "soundfile": soundfile.__version__,
                "libsndfile": soundfile.__libsndfile_version__,
                "soxr": soxr.__version__,
            },
        },
    )
    write_index(output, index)
    shutil.rmtree(output / PACKING_NAME, ignore_errors=True)
    return index


def _read_plan(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _summary(output: Path, index: Index) -> str:
    size = sum(entry.bytes for entry in index.shards) / (1 << 20)
    return (
        f"{output}: {index.rows:,} rows, {index.hours:.2f} h, {len(index.shards)} shards of codec {index.codec}, "
        f"{size:,.1f} MiB; {index.files_skipped:,} of {index.files:,} files skipped"
    )


def _bytes(text: str) -> int:
    """Parse ``268435456``, ``256M`` or ``256MiB``."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)(iB)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected bytes such as 64M, 256MiB or 1G, found {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def _parser() -> argparse.ArgumentParser:
    defaults = PackSettings()
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.pack_audio",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="DIR_OR_TSV", help="folders and TSV manifests")
    add("--output", type=Path, required=True, metavar="DIR", help="new shard folder, or one to go on with")
    add("--workers", type=int, metavar="N", help="local processes (default: one per core)")
    add("--mpi", action="store_true", help="use MPI even if no launcher is detected")
    add("--resample", action="store_true", help=f"convert files of another rate to {SAMPLE_RATE_HZ} Hz")
    add("--min-seconds", type=float, default=defaults.min_seconds, metavar="S", help="skip shorter files (%(default)s)")
    add("--max-seconds", type=float, default=defaults.max_seconds, metavar="S",
        help="cut longer recordings at quiet points; 0 never cuts (%(default)s)")  # fmt: skip
    add("--codec", choices=CODECS, default=defaults.codec, help="pcm16: zero-copy; flac: half the disk (%(default)s)")
    add("--shard-bytes", type=_bytes, default=defaults.shard_bytes, metavar="BYTES", help="about this size (256M)")
    add("--join-seconds", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="join clips shorter than MIN of one speaker into rows of MIN to MAX seconds")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="of the order of joined clips (%(default)s)")
    add("--label-column", default=defaults.label_column, metavar="NAME", help="manifest column (%(default)s)")
    add("--max-skipped", type=float, default=0.01, metavar="SHARE", help="exit 3 above this share (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
