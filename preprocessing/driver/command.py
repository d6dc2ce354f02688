"""The command line that all packers share: options, exit codes, and the last line of a packing.

Exit codes: 0 done; 2 wrong input or settings, nothing was packed; 3 the folder is complete, but all files or more
than --max-skipped were skipped, or notes on more than --max-noted of the content; 4 a file could not be written or an
input vanished, run again; 130 interrupted, run again.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from d2v2ds.data.schema import SKIPPED_NAME, Index
from d2v2ds.errors import D2V2Error, MachineError
from d2v2ds.io.machine_faults import advice, is_out_of_memory
from preprocessing.driver.exit_codes import EXIT_INTERRUPTED, EXIT_TOO_MANY_SKIPPED, exit_code
from preprocessing.driver.input_files import said_ignored
from preprocessing.driver.notes import NOTES_NAME, excess_notes, said_notes
from preprocessing.driver.packing import pack
from preprocessing.driver.protocol import Packer
from preprocessing.driver.team.choose import choose_team

DEFAULT_SHARD_BYTES = 256 << 20
_KEPT = "finished shards are kept, the same command goes on from there"
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
    add("--max-skipped", type=parse_share, default=0.01, metavar="SHARE", help="exit 3 above this share (%(default)s)")
    add("--max-noted", type=parse_share, default=0.01, metavar="SHARE",
        help=f"exit 3 if one kind of {NOTES_NAME} lost more than this share of the content (%(default)s)")  # fmt: skip
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
            kept = f"; {_KEPT}" if isinstance(error, MachineError) else ""
            print(f"error: {error}{kept}", file=sys.stderr)
        return exit_code(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: no memory left: use fewer --workers; {_KEPT}", file=sys.stderr)
        return exit_code(MachineError())
    except OSError as error:
        print(f"error: {error}; {advice(error)}; {_KEPT}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(f"interrupted; {_KEPT}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if index is None:
        if leads:
            print(f"{options.output}: part {'/'.join(map(str, options.part))} is packed; no index yet")
        return 0
    faults = _excesses(index, options)
    if leads:
        print("; ".join(filter(None, [summary(options.output, index, packer), said_notes(index), ignored])))
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
    return EXIT_TOO_MANY_SKIPPED if faults else 0


def _excesses(index: Index, options: argparse.Namespace) -> list[str]:
    """Return one message for each limit that a finished folder exceeds."""
    reasons = f"reasons are in {options.output / SKIPPED_NAME}"
    if not index.rows:
        return [f"no rows came out of {index.files:,} files; {reasons}"]
    usable = "The folder is complete and usable."
    faults = []
    share = index.files_skipped / max(1, index.files)
    if share > options.max_skipped:
        allowed = f"--max-skipped allows {options.max_skipped:.2%}"
        faults.append(f"{share:.2%} of the files were skipped, {allowed}; {reasons}. {usable}")
    if excess := excess_notes(index, options.max_noted):
        faults.append(f"{excess}; the files are in {options.output / NOTES_NAME}. {usable}")
    return faults


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


def parse_share(text: str) -> float:
    """Parse a share from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, found {text!r}")
    return share


def parse_part(text: str) -> tuple[int, int]:
    """Parse ``I/N``, a number from 0 to N - 1 and how many parts there are."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/10, found {text!r}")
    return int(match[1]), int(match[2])
