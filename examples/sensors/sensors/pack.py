"""Pack recordings into Arrow shards: ``python -m sensors.pack --input DIR_OR_TSV --output DIR --channels NAME...``.

Inputs are folders of `.npy` arrays, CSV and Parquet tables, one recording a file, or TSV manifests with the column
`path` and optionally `id`, `label`, `subject`. Files that are no recordings of these channels are listed in
``skipped.tsv``. Killed and started again with the same command, the packer keeps finished shards and ends with the same
bytes.

Exit codes: those of `preprocessing.driver.command`.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from d2v2ds.data.schema import Index
from d2v2ds.errors import ConfigError
from d2v2ds.io.walk import walk
from preprocessing.driver.command import common_parser, run
from preprocessing.driver.input_files import check_present, check_unique, read_manifest, source_name
from preprocessing.driver.packing import read_all
from preprocessing.driver.progress import MEBIBYTES, Report
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Plan, Skipped, cut_shards, fingerprint
from preprocessing.driver.team.protocol import Team
from sensors.recordings import SUFFIXES, BadRecordingError, check_header, mean_and_variance, read_recording, resample
from sensors.shards import SENSORS_LAYOUT, Piece, encode


@dataclass(frozen=True, kw_only=True)
class SensorSettings:
    """The options that change the bytes of a shard folder; a `Settings` of the driver."""

    channels: tuple[str, ...]
    """Names of the channels, in the order in which they are stored."""
    sample_rate_hz: float
    """Sample rate of the files."""
    resample_hz: float | None = None
    """Sample rate of the rows; None: that of the files."""
    min_seconds: float = 1.0
    """Shorter recordings are skipped."""
    max_seconds: float = 60.0
    """Longer recordings are cut into equal pieces."""
    shard_bytes: int = 256 << 20
    """Bytes of input files for one shard."""
    label_column: str = "label"
    """The manifest column stored as label."""

    @property
    def stored_hz(self) -> float:
        """Sample rate of the rows."""
        return self.resample_hz or self.sample_rate_hz

    def check(self) -> None:
        """Raise a `ConfigError` that names every setting that cannot work."""
        faults = []
        for name, value in (("--sample-rate", self.sample_rate_hz), ("--resample", self.stored_hz)):
            if not 0 < value < math.inf:
                faults.append(f"{name} {value}: expected a number above 0")
        if not 0 <= 2 * self.min_seconds <= self.max_seconds < math.inf:
            faults.append(f"--max-seconds {self.max_seconds} must be at least twice --min-seconds {self.min_seconds}")
        if doubled := [name for name, count in Counter(self.channels).items() if count > 1]:
            faults.append(f"--channels: {', '.join(doubled)} named more than once")
        if self.shard_bytes < 1:
            faults.append(f"--shard-bytes {self.shard_bytes} must be positive")
        if faults:
            raise ConfigError("\n".join(faults))

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in ``index.json``."""
        return vars(self) | {"channels": list(self.channels)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One input file; a `Unit` of the plan."""

    id: str
    path: str
    source: str
    """Name in the shards: the path below its input folder, or as the manifest writes it."""
    place: str
    """Name in messages: the path, or the manifest's line."""
    label: str | None = None
    subject: str | None = None
    order: int = 0
    """Position among all input files."""
    size: int = 0
    """Bytes."""
    files = 1

    @property
    def in_manifest(self) -> bool:
        """True if a manifest names it, False if it was found in a folder."""
        return self.place != self.path


@dataclass(frozen=True)
class Header:
    """Result of opening a file."""

    bytes: int
    """-1 for a file that does not exist."""
    fault: str | None = None
    """Why it cannot be packed."""


def find_recordings(inputs: Sequence[Path], label_column: str, ignored: Counter[str]) -> list[Recording]:
    """List the files of all inputs, in an order that depends on nothing else.

    Args:
        inputs: folders and TSV manifests.
        label_column: manifest column stored as label.
        ignored: other files of folders are counted here by suffix.

    Raises:
        ConfigError: an input is missing or empty, a manifest is malformed, or ids are not unique.
    """
    found: list[Recording] = []
    for root in inputs:
        if not root.exists():
            raise ConfigError(f"--input {root}: expected a folder or a TSV manifest, found nothing there")
        own = _of_folder(root, ignored) if root.is_dir() else _of_manifest(root, label_column)
        before = len(found)
        found.extend(own)
        if len(found) == before:
            raise ConfigError(f"--input {root}: expected recordings ({', '.join(sorted(SUFFIXES))}), found none")
    check_unique((one.id, one.place) for one in found)
    return [replace(one, order=order) for order, one in enumerate(found)]


def _of_folder(root: Path, ignored: Counter[str]) -> Iterator[Recording]:
    for folder, names in walk(root, SUFFIXES, ignored):
        for path in (str(Path(folder) / name) for name in names):
            source = source_name(root, path)
            yield Recording(id=source, path=path, source=source, place=path)


def _of_manifest(manifest: Path, label_column: str) -> Iterator[Recording]:
    required = [] if label_column == "label" else [label_column]
    for line in read_manifest(manifest, ("id", "subject", label_column), required):
        yield Recording(
            id=line.values["id"] or line.path,
            path=str(manifest.parent / line.path),
            source=line.path,
            place=line.place,
            label=line.values[label_column],
            subject=line.values["subject"],
        )


def read_headers(paths: Sequence[str], report: Report, channels: Sequence[str]) -> list[Header]:
    """Open every file once; no samples are read."""
    headers = []
    for path in map(Path, paths):
        try:
            check_header(path, channels)
            headers.append(Header(path.stat().st_size))
        except BadRecordingError as error:
            headers.append(Header(path.stat().st_size if path.exists() else -1, str(error)))
        report(1, 0)
    return headers


def make_plan(recordings: Sequence[Recording], headers: Sequence[Header], settings: SensorSettings) -> Plan:
    """Decide which files are skipped and where the shards are cut.

    Raises:
        ConfigError: a manifest names files that do not exist.
    """
    both = list(zip(recordings, headers, strict=True))
    check_present([one.place for one, header in both if header.bytes < 0 and one.in_manifest])
    units = [replace(one, size=header.bytes) for one, header in both if header.fault is None]
    return Plan(
        shards=cut_shards(units, settings.shard_bytes),
        skipped=tuple(Skipped(order=one.order, source=one.source, reason=h.fault) for one, h in both if h.fault),
        files=len(recordings),
        sha256=fingerprint((one.id, one.source, one.label, one.subject, header) for one, header in both),
    )


def rows_of(recording: Recording, settings: SensorSettings) -> Iterator[Row]:
    """The rows of one file: the whole recording, or pieces of equal length.

    Raises:
        BadRecordingError: the file is no recording of these channels, or too short.
    """
    samples = read_recording(Path(recording.path), settings.channels)
    samples = resample(samples, settings.sample_rate_hz, settings.stored_hz)  # (C, S)
    seconds = samples.shape[1] / settings.stored_hz
    if seconds < settings.min_seconds or not samples.shape[1]:
        raise BadRecordingError(f"{seconds:.3f} s is shorter than --min-seconds {settings.min_seconds:g}")
    mean, variance = mean_and_variance(samples)
    pieces = math.ceil(seconds / settings.max_seconds)
    bounds = [samples.shape[1] * number // pieces for number in range(pieces + 1)]
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        yield Row(
            encode(Piece(samples=samples[:, start:stop], mean=mean, variance=variance)),
            {
                "id": recording.id if pieces == 1 else f"{recording.id}#{number:04d}",
                "num_samples": stop - start,
                "label": recording.label,
                "subject": recording.subject,
                "source": recording.source,
                "start_sample": start,
            },
        )


@dataclass(frozen=True)
class SensorPacker:
    """Recordings to rows; the methods are those of `preprocessing.driver.protocol.Packer`."""

    settings: SensorSettings
    layout = SENSORS_LAYOUT
    measure = MEBIBYTES

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        """Open all files, spread over the team, and make the plan."""
        ignored: Counter[str] = Counter()  # by the leader
        found = team.share(lambda: find_recordings(inputs, self.settings.label_column, ignored))
        read = partial(read_headers, channels=self.settings.channels)
        headers = read_all(team, read, [one.path for one in found], "reading headers")
        return team.share(lambda: replace(make_plan(found, headers, self.settings), ignored=ignored))

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Nothing lies beside recordings."""
        return ()

    def format(self, folder: Path) -> dict[str, Any]:
        """Channels and sample rate of every row."""
        return {"channels": list(self.settings.channels), "sample_rate_hz": self.settings.stored_hz}

    def rows(self, units: Sequence[Recording], folder: Path, notes: Notes) -> Iterator[Row]:
        """Every recording read and cut; files that turn out bad are noted."""
        for unit in units:
            try:
                yield from rows_of(unit, self.settings)
            except BadRecordingError as error:
                notes.skipped.append(Skipped(order=unit.order, source=unit.source, reason=str(error)))
            notes.report(unit.files, unit.size)

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        """Samples of one channel, and hours."""
        return {"samples": size, "hours": size / self.settings.stored_hz / 3600}

    def describe(self, index: Index) -> str:
        """Hours, channels and rate."""
        found = index.format
        return f"{index.totals['hours']:.2f} h, {len(found['channels'])} channels at {found['sample_rate_hz']:g} Hz"

    def versions(self) -> dict[str, str]:
        """Library that resamples."""
        if self.settings.stored_hz == self.settings.sample_rate_hz:
            return {}
        import soxr

        return {"soxr": soxr.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    names = options.channels
    settings = SensorSettings(
        channels=tuple(map(str, range(int(names[0])))) if len(names) == 1 and names[0].isdigit() else tuple(names),
        sample_rate_hz=options.sample_rate,
        resample_hz=options.resample,
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        shard_bytes=options.shard_bytes,
        label_column=options.label_column,
    )
    return run(SensorPacker(settings), options, arguments)


def _parser() -> argparse.ArgumentParser:
    defaults = SensorSettings(channels=(), sample_rate_hz=1.0)
    parser = common_parser("sensors", __doc__, "DIR_OR_TSV", "folders and TSV manifests")
    parser.prog = "python -m sensors.pack"
    parser.set_defaults(program=parser.prog)
    add = parser.add_argument
    add("--channels", nargs="+", required=True, metavar="NAME",
        help="columns to store, in order; or one number, of channels without names")  # fmt: skip
    add("--sample-rate", type=float, required=True, metavar="HZ", help="of the files")
    add("--resample", type=float, metavar="HZ", help="of the rows, if it is another (needs soxr)")
    add("--min-seconds", type=float, default=defaults.min_seconds, metavar="S", help="skip shorter files (%(default)s)")
    add("--max-seconds", type=float, default=defaults.max_seconds, metavar="S", help="cut longer files (%(default)s)")
    add("--label-column", default=defaults.label_column, metavar="NAME", help="manifest column (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
