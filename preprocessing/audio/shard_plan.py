"""Plan the recordings to pack, join and skip from their headers, before anything is decoded."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2v2ds.errors import ConfigError
from d2v2ds.modalities.audio.shards import Codec
from preprocessing.audio.clips import Clip, Header
from preprocessing.driver.input_files import check_present, listed
from preprocessing.driver.shard_plan import Noted, Plan, Skipped, cut_shards, fingerprint

SAMPLE_RATE_HZ = 16000
"""Sampling rate of every row, as in every published speech recipe."""
_PLANNED_BYTES = {"pcm16": 2.0, "flac": 1.1}
"""Bytes per sample: exact for pcm16; of read speech measured for flac."""


@dataclass(frozen=True, kw_only=True)
class AudioSettings:
    """The options that change the bytes of a shard folder."""

    codec: Codec = "pcm16"
    resample: bool = False
    min_seconds: float = 0.1
    """Shorter clips are skipped."""
    max_seconds: float = 40.0
    """Longer recordings are cut; 0 never cuts. LibriSpeech's longest utterance has 35 s."""
    shard_bytes: int = 256 << 20
    """Planned size of a shard."""
    join_seconds: tuple[float, float] | None = None
    """(shortest, longest) row made of one speaker's short clips; None joins nothing."""
    seed: int = 0
    """Seed of the order in which clips are joined."""
    label_column: str = "label"
    """The manifest column stored as label."""

    def check(self) -> None:
        """Raise a `ConfigError` that names every setting that cannot work."""
        faults = []
        if not (0 <= self.min_seconds < math.inf and 0 <= self.max_seconds < math.inf):
            faults.append(
                f"--min-seconds {self.min_seconds} and --max-seconds {self.max_seconds} must be finite and not negative"
            )
        if self.max_seconds and self.max_seconds < 2 * self.min_seconds + 0.02:
            faults.append(f"--max-seconds {self.max_seconds} must exceed twice --min-seconds {self.min_seconds}")
        if self.shard_bytes < 1:
            faults.append(f"--shard-bytes {self.shard_bytes} must be positive")
        if self.join_seconds:
            shortest, longest = self.join_seconds
            if not 0 < shortest <= longest / 2:
                faults.append(f"--join-seconds {shortest} {longest}: the longest must be at least twice the shortest")
            if self.max_seconds and longest > self.max_seconds:
                faults.append(f"--join-seconds longest {longest} must not exceed --max-seconds {self.max_seconds}")
        if faults:
            raise ConfigError("\n".join(faults))

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in ``index.json``."""
        return vars(self) | {"join_seconds": list(self.join_seconds) if self.join_seconds else None}


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioUnit:
    """Clips that are stored together: one, or several of one speaker that are joined into one row."""

    clips: tuple[Clip, ...]
    order: int
    """Position of the first clip in the list of clips."""
    size: int
    """Length in samples at `SAMPLE_RATE_HZ` by the headers."""

    @property
    def files(self) -> int:
        """Input files in it."""
        return len(self.clips)


def make_plan(clips: Sequence[Clip], headers: Sequence[Header], settings: AudioSettings) -> Plan:
    """Decide what is packed, joined and skipped, and where the shards are cut.

    Raises:
        ConfigError: if a manifest names missing files, rates differ from `SAMPLE_RATE_HZ` without ``--resample``,
            or clips are to be joined whose speaker is not known.
    """
    _check_headers(clips, headers, settings)
    units, skipped, noted = [], [], []
    for order, (clip, header) in enumerate(zip(clips, headers, strict=True)):
        reason = header.fault
        if reason is None and clip.samples not in (None, header.num_frames):
            detail = f"the manifest says {clip.samples} samples, the file has {header.num_frames}"
            noted.append(Noted(order=order, source=clip.source, kind="other length", detail=detail, lost=0.0))
        if reason is None and header.num_frames < settings.min_seconds * header.sample_rate_hz:
            seconds = header.num_frames / header.sample_rate_hz
            reason = f"{seconds:.3f} s is shorter than --min-seconds {settings.min_seconds:g}"
        if reason is None:
            samples = -(-header.num_frames * SAMPLE_RATE_HZ // header.sample_rate_hz)
            units.append(AudioUnit(clips=(clip,), order=order, size=samples))
        else:
            skipped.append(Skipped(order=order, source=clip.source, reason=reason))
    if settings.join_seconds:
        units = join_units(units, settings.join_seconds, settings.seed)
    return Plan(
        shards=cut_shards(units, settings.shard_bytes, _PLANNED_BYTES[settings.codec]),
        skipped=tuple(skipped),
        noted=tuple(noted),
        files=len(clips),
        sha256=fingerprint(
            (
                (clip.id, clip.source, clip.text, clip.label, clip.speaker),
                header.bytes,
                header.num_frames,
                header.sample_rate_hz,
                header.fault,
            )
            for clip, header in zip(clips, headers, strict=True)
        ),
    )


def join_units(units: Sequence[AudioUnit], join_seconds: tuple[float, float], seed: int) -> list[AudioUnit]:
    """Join the short clips of each speaker into strings whose lengths lie between two bounds.

    Clips of at least the shorter bound stay as they are. The others are shuffled, and a string is filled until it
    reaches a length drawn evenly between the bounds, or until the next clip would carry it past the longer one. Every
    string is at least as long as the shorter bound but the last of each speaker, which keeps what is left.
    """
    shortest, longest = (round(seconds * SAMPLE_RATE_HZ) for seconds in join_seconds)
    by_speaker: dict[str, list[AudioUnit]] = {}
    joined = []
    for unit in units:
        if unit.size >= shortest:
            joined.append(unit)
        else:
            by_speaker.setdefault(unit.clips[0].speaker or "", []).append(unit)
    for speaker, short in by_speaker.items():
        # named by the speaker, so that another speaker's clips do not change these strings
        entropy = int.from_bytes(hashlib.sha256(speaker.encode()).digest()[:8], "little")
        rng = np.random.default_rng([seed, entropy])
        string: list[AudioUnit] = []
        length, target = 0, int(rng.integers(shortest, longest + 1))
        for number in rng.permutation(len(short)):
            unit = short[int(number)]
            if string and (length >= target or length + unit.size > longest):
                joined.append(_joined(string))
                string, length, target = [], 0, int(rng.integers(shortest, longest + 1))
            string.append(unit)
            length += unit.size
        joined.append(_joined(string))
    return sorted(joined, key=lambda unit: unit.order)


def _joined(units: Sequence[AudioUnit]) -> AudioUnit:
    return AudioUnit(
        clips=tuple(unit.clips[0] for unit in units),
        order=units[0].order,
        size=sum(unit.size for unit in units),
    )


def _check_headers(clips: Sequence[Clip], headers: Sequence[Header], settings: AudioSettings) -> None:
    both = list(zip(clips, headers, strict=True))
    check_present([clip.place for clip, header in both if header.missing and clip.in_manifest])
    if not settings.resample:
        wrong = [
            f"{clip.place}: {header.sample_rate_hz} Hz"
            for clip, header in both
            if header.fault is None and header.sample_rate_hz != SAMPLE_RATE_HZ
        ]
        if wrong:
            raise ConfigError(
                f"{len(wrong)} files are not sampled at {SAMPLE_RATE_HZ} Hz; add --resample to convert them:\n"
                f"{listed(wrong, len(wrong))}"
            )
    if settings.join_seconds:
        nameless = [clip.place for clip, header in both if header.fault is None and not clip.speaker]
        if nameless:
            raise ConfigError(
                f"--join-seconds joins clips of one speaker, and {len(nameless)} files have none; give a manifest "
                f"with a 'speaker' column:\n{listed(nameless, len(nameless))}"
            )
