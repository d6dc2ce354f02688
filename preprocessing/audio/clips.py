"""Recordings to pack: folder trees, LibriSpeech trees and TSV manifests become one list of `Clip`; headers are read.

A folder becomes a sorted list of its audio files. Inside it, a folder ``S/C`` that holds ``S-C.trans.txt`` is read as
LibriSpeech's: transcripts from that file, the speaker from the path, the file's stem as id. A manifest keeps its
order; it may be one of fairseq's.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2v2ds.data.codecs.flac import LARGEST_RATIO, STREAMINFO_BYTES, parse_streaminfo
from d2v2ds.errors import ConfigError
from d2v2ds.io.machine_faults import retried
from d2v2ds.io.walk import walk
from d2v2ds.modalities.audio.mixing import rate_fault
from d2v2ds.modalities.audio.shards import AUDIO_SUFFIXES
from d2v2ds.modalities.audio.sound_bytes import BadAudioError, open_bytes
from d2v2ds.modalities.audio.sound_file import open_sound
from preprocessing.audio.fairseq_manifest import read_fairseq_manifest
from preprocessing.driver.input_files import (
    check_unique,
    not_there,
    read_manifest,
    source_name,
    text_lines,
    unreadable,
    utf8,
)
from preprocessing.driver.progress import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One input file with what is known of it."""

    id: str
    path: str
    """Path to open."""
    source: str
    """Name in the shards: path below its input folder, or as its manifest writes it."""
    place: str
    """Location for messages: the path, or the manifest's line."""
    text: str | None = None
    label: str | None = None
    speaker: str | None = None
    samples: int | None = None
    """Length of the file, in samples at its own rate, as its manifest says."""

    @property
    def in_manifest(self) -> bool:
        """True if a manifest names the file, False if it was found in a folder."""
        return self.place != self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Findings from opening a file. `fault` says why it cannot be packed."""

    bytes: int = 0
    num_frames: int = 0
    sample_rate_hz: int = 0
    channels: int = 0
    fault: str | None = None
    missing: bool = False


def find_clips(inputs: Sequence[Path], label_column: str = "label", ignored: Counter[str] | None = None) -> list[Clip]:
    """List the files of all inputs, in an order that depends on nothing else.

    Args:
        inputs: folders and TSV manifests.
        label_column: the manifest column stored as label.
        ignored: other files of folders are counted here by suffix.

    Raises:
        ConfigError: if an input is missing or empty, a manifest is malformed, or ids are not unique.
    """
    clips: list[Clip] = []
    ignored = Counter() if ignored is None else ignored
    for root in inputs:
        if root.is_dir():
            found = list(_clips_of_folder(root, ignored))
        elif root.is_file():
            found = _clips_of_manifest(root, label_column)
        else:
            raise ConfigError(
                f"--input {utf8(str(root))}: expected a folder or a TSV manifest, found {not_there(root)}"
            )
        if not found:
            raise ConfigError(f"--input {root}: expected audio ({', '.join(sorted(AUDIO_SUFFIXES))}), found none")
        clips.extend(found)
    check_unique((clip.id, clip.place) for clip in clips)
    return clips


def read_headers(paths: Sequence[str], report: Report) -> list[Header]:
    """Open every file once and read its header; nothing is decoded."""
    headers = []
    for path in paths:
        headers.append(retried(partial(_read_header, path)))
        report(1, 0)
    return headers


def _read_header(path: str) -> Header:
    """Open a recording.

    Raises:
        MachineError: the machine is at fault.
    """
    try:
        with open_bytes(path) as data:
            size, info = data.size, parse_streaminfo(data.read_at(0, STREAMINFO_BYTES))
        if info is not None and info.frames <= size * LARGEST_RATIO:
            frames, rate, channels = info.frames, info.sample_rate_hz, info.channels
        else:
            with open_sound(path) as sound:
                frames, rate, channels = sound.frames, sound.rate, sound.channels
    except BadAudioError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return Header(bytes=_size_of(path), fault=reason(path, error), missing=missing)
    fault = rate_fault(rate) or (None if frames else f"no samples: its header says none, the file has {size} bytes")
    return Header(bytes=size, num_frames=frames, sample_rate_hz=rate, channels=channels, fault=fault)


def reason(path: str, error: BadAudioError) -> str:
    """Return why a file is skipped."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno:
        return unreadable(path, cause)
    return str(error).removeprefix(f"{path}: ")


def _size_of(path: str) -> int:
    """Return the size of a file, 0 if there is none."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return 0


def _clips_of_folder(root: Path, ignored: Counter[str]) -> Iterator[Clip]:
    for folder, names in walk(root, AUDIO_SUFFIXES, ignored):
        transcripts = _librispeech_transcripts(Path(folder))
        if transcripts is not None:
            ignored[".txt"] -= 1  # it is read
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118  (300,000 files)
            source = source_name(root, path)
            if transcripts is None:
                yield Clip(id=source, path=path, source=source, place=path)
            else:
                stem = utf8(Path(name).stem)
                speaker = utf8(Path(folder).parent.name)
                yield Clip(id=stem, path=path, source=source, place=path, text=transcripts.get(stem), speaker=speaker)


def _librispeech_transcripts(folder: Path) -> dict[str, str] | None:
    """Utterance id to transcript, if this is a chapter folder ``speaker/chapter`` of LibriSpeech; else None."""
    path = folder / f"{folder.parent.name}-{folder.name}.trans.txt"
    if not path.is_file():
        return None
    lines = text_lines(path)
    return {key: text for key, _, text in (line.partition(" ") for line in lines)}


def _clips_of_manifest(manifest: Path, label_column: str) -> list[Clip]:
    if (lines := read_fairseq_manifest(manifest)) is not None:
        if label_column != "label":
            raise ConfigError(
                f"{manifest}: a manifest of fairseq has no column {label_column!r}; give one with columns"
            )
        return [
            Clip(id=line.path, path=line.full_path, source=line.path, place=line.place, samples=line.samples)
            for line in lines
        ]
    required = [] if label_column == "label" else [label_column]
    return [
        Clip(
            id=line.values["id"] or line.path,
            path=os.path.join(manifest.parent, line.path),  # noqa: PTH118
            source=line.path,
            place=line.place,
            text=line.values["text"],
            label=line.values[label_column],
            speaker=line.values["speaker"],
        )
        for line in read_manifest(manifest, ("id", "text", "speaker", label_column), required)
    ]
