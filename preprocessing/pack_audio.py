"""Pack any folder of audio into Arrow shards: ``python -m preprocessing.pack_audio --input DIR_OR_TSV --output DIR``.

Headers are read, a plan is made, each shard is packed by one process, and the leader writes the index at the end.
Killed and started again with the same command, it keeps finished shards and ends with the same bytes.

Exit codes: 0 done; 2 wrong input or settings, nothing was packed; 3 the folder is complete, but all files or more
than --max-skipped were skipped, or notes on more than --max-noted of the content; 4 a file could not be written or an
input vanished, run again; 130 interrupted, run again.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile
import soxr

from d2v2ds.data.codecs.flac import DECODER
from d2v2ds.data.schema import Index
from d2v2ds.modalities.audio.shards import AUDIO_LAYOUT, CODECS
from preprocessing.audio.clips import find_clips, read_headers
from preprocessing.audio.rows import rows_of
from preprocessing.audio.shard_plan import SAMPLE_RATE_HZ, AudioSettings, AudioUnit, make_plan
from preprocessing.audio.waveform import Decoder
from preprocessing.driver.command import common_parser, run
from preprocessing.driver.packing import read_all
from preprocessing.driver.progress import Measure
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Plan
from preprocessing.driver.team.protocol import Team

MEASURE = Measure(
    amount=SAMPLE_RATE_HZ * 3600, amount_unit="h", amount_decimals=2, speed=SAMPLE_RATE_HZ, speed_unit="x real time"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    settings = AudioSettings(
        codec=options.codec,
        resample=options.resample,
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        shard_bytes=options.shard_bytes,
        join_seconds=tuple(options.join_seconds) if options.join_seconds else None,
        seed=options.seed,
        label_column=options.label_column,
    )
    return run(AudioPacker(settings), options, arguments)


@dataclass(frozen=True)
class AudioPacker:
    """Recordings to rows; the methods are those of `preprocessing.driver.protocol.Packer`."""

    settings: AudioSettings
    layout = AUDIO_LAYOUT
    measure = MEASURE

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        """Read all headers, spread over the team, and make the plan."""
        ignored: Counter[str] = Counter()  # by the leader
        clips = team.share(lambda: find_clips(inputs, self.settings.label_column, ignored))
        headers = read_all(team, read_headers, [clip.path for clip in clips], "reading headers")
        ignored = +ignored  # without suffixes all of whose files turned out to be transcripts
        return team.share(lambda: replace(make_plan(clips, headers, self.settings), ignored=ignored))

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        """Nothing lies beside recordings."""
        return ()

    def format(self, folder: Path) -> dict[str, Any]:
        """Codec and rate."""
        return {"codec": self.settings.codec, "sample_rate_hz": SAMPLE_RATE_HZ}

    def rows(self, units: Sequence[AudioUnit], folder: Path, notes: Notes) -> Iterator[Row]:
        """Every recording decoded, and cut or joined."""
        decoder = Decoder(SAMPLE_RATE_HZ)
        for unit in units:
            yield from rows_of(unit, decoder, self.settings, notes)
            notes.report(unit.files, unit.size)

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        """Samples and hours."""
        return {"samples": size, "hours": size / SAMPLE_RATE_HZ / 3600}

    def describe(self, index: Index) -> str:
        """Hours and codec."""
        return f"{index.totals['hours']:.2f} h, codec {index.format['codec']}"

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decode and resample."""
        return {
            "soundfile": soundfile.__version__,
            "libsndfile": soundfile.__libsndfile_version__,
            "soxr": soxr.__version__,
            "flac": DECODER,
        }


def _parser() -> argparse.ArgumentParser:
    defaults = AudioSettings()
    parser = common_parser("audio", __doc__, "DIR_OR_TSV", "folders and TSV manifests")
    add = parser.add_argument
    add("--resample", action="store_true", help=f"convert files of another rate to {SAMPLE_RATE_HZ} Hz")
    add("--min-seconds", type=float, default=defaults.min_seconds, metavar="S", help="skip shorter files (%(default)s)")
    add("--max-seconds", type=float, default=defaults.max_seconds, metavar="S",
        help="cut longer recordings at quiet points; 0 never cuts (%(default)s)")  # fmt: skip
    add("--codec", choices=CODECS, default=defaults.codec, help="pcm16: zero-copy; flac: half the disk (%(default)s)")
    add("--join-seconds", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="join clips shorter than MIN of one speaker into rows of MIN to MAX seconds")  # fmt: skip
    add("--seed", type=int, default=defaults.seed, help="of the order of joined clips (%(default)s)")
    add("--label-column", default=defaults.label_column, metavar="NAME", help="manifest column (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
