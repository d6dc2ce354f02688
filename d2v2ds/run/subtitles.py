"""Words with times as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice
from d2v2ds.run.record_file import RecordFile

logger = logging.getLogger(__name__)

SUBTITLES = ("srt", "vtt")
_MOST_LETTERS = 80
_MOST_SECONDS = 6.0
_PAUSE_SECONDS = 0.8
"""Pause between two words that begins a new subtitle."""


class SubtitleFolder:
    """A file of subtitles for every recording; an `Output`. Files that are there count as done."""

    def __init__(self, folder: Path, form: str, files: Mapping[Path, str], records: RecordFile) -> None:
        """
        Args:
            folder: made if it is not there; has the folders of the recordings.
            form: srt or vtt.
            files: names of the recordings.
            records: of the recordings whose subtitles this work made.

        Raises:
            ConfigError: two recordings would have one file.
        """
        self._form, self._records = form, records
        self._places = {str(file): (folder / name).with_suffix(f".{form}") for file, name in files.items()}
        first: dict[Path, str] = {}
        for file, place in self._places.items():
            if place in first:
                raise ConfigError(f"{first[place]} and {file}: both would be {place}; transcribe them separately")
            first[place] = file
        self.done = {file for file, place in self._places.items() if file not in records.changed and place.exists()}
        """Recordings with subtitles."""
        if foreign := self.done - records.done:
            logger.warning(
                "%s: %d files without a record of this work are kept, such as %s; remove them to have them made again",
                folder, len(foreign), self._places[next(iter(foreign))],
            )  # fmt: skip

    def write(self, name: str, found: dict[str, Any], stamp: str = "") -> None:
        """Write the subtitles of one recording.

        Raises:
            MachineError: they cannot be written.
        """
        place = self._places[name]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            durable.replace_text(place, subtitles(found["words"], self._form))
        except OSError as error:
            raise MachineError(f"{place}: cannot be written: {error}; {advice(error)}") from error
        self._records.write(name, {"seconds": found["seconds"]}, stamp)


def subtitles(words: Sequence[dict[str, Any]], form: str) -> str:
    """Write words as subtitles of at most 80 letters and 6 seconds; a pause of 0.8 s begins a new one.

    `&`, `<` and `>` are character references in WebVTT (W3C, "WebVTT cue text span"), so that `-->` ends no cue. SubRip
    has no such form; words stand there as they are.

    Args:
        words: `word`, `start` and `end` (seconds).
        form: srt or vtt.
    """
    point, head = (",", "") if form == SUBTITLES[0] else (".", "WEBVTT\n\n")
    blocks = []
    for number, group in enumerate(_groups(words), 1):
        times = " --> ".join(_time(seconds, point) for seconds in (group[0]["start"], group[-1]["end"]))
        text = " ".join(one["word"] for one in group)
        blocks.append(f"{number}\n{times}\n{escape(text, quote=False) if head else text}\n")
    return head + "\n".join(blocks)


def _groups(words: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for word in words:
        letters = sum(len(one["word"]) + 1 for one in group) + len(word["word"])
        if group and (
            letters > _MOST_LETTERS
            or word["end"] - group[0]["start"] > _MOST_SECONDS
            or word["start"] - group[-1]["end"] >= _PAUSE_SECONDS
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _time(seconds: float, point: str) -> str:
    """Format a time: 00:01:02,345."""
    whole = round(seconds * 1000)
    return f"{whole // 3600000:02d}:{whole // 60000 % 60:02d}:{whole // 1000 % 60:02d}{point}{whole % 1000:03d}"
