"""Words with times as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice

SUBTITLES = ("srt", "vtt")
_MOST_LETTERS = 80
_MOST_SECONDS = 6.0
_PAUSE_SECONDS = 0.8
"""Pause between two words that begins a new subtitle."""


class SubtitleFolder:
    """A file of subtitles for every recording; an `Output`. Files that are there count as done."""

    def __init__(self, folder: Path, form: str, files: Mapping[Path, str]) -> None:
        """
        Args:
            folder: made if it is not there; has the folders of the recordings.
            form: srt or vtt.
            files: names of the recordings.

        Raises:
            ConfigError: two recordings would have one file.
        """
        self._form = form
        self._places = {str(file): (folder / name).with_suffix(f".{form}") for file, name in files.items()}
        first: dict[Path, str] = {}
        for file, place in self._places.items():
            if place in first:
                raise ConfigError(f"{first[place]} and {file}: both would be {place}; transcribe them separately")
            first[place] = file
        self._done = [file for file, place in self._places.items() if place.exists()]

    @property
    def done(self) -> Collection[str]:
        """Recordings with subtitles."""
        return self._done

    def write(self, name: str, found: dict[str, Any]) -> None:
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


def subtitles(words: Sequence[dict[str, Any]], form: str) -> str:
    """Write words as subtitles of at most 80 letters and 6 seconds; a pause of 0.8 s begins a new one.

    Args:
        words: `word`, `start` and `end` (seconds).
        form: srt or vtt.
    """
    point, head = (",", "") if form == SUBTITLES[0] else (".", "WEBVTT\n\n")
    blocks = []
    for number, group in enumerate(_groups(words), 1):
        times = " --> ".join(_time(seconds, point) for seconds in (group[0]["start"], group[-1]["end"]))
        blocks.append(f"{number}\n{times}\n{' '.join(one['word'] for one in group)}\n")
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
