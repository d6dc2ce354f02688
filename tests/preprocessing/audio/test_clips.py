"""Folder trees, LibriSpeech trees and manifests."""

import os
from collections import Counter
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from preprocessing.audio.clips import find_clips, read_headers
from preprocessing.driver.input_files import read_manifest


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folder_tree_is_sorted_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b/2.flac", "b/10.WAV", "a/x.mp3", "a/notes.txt", ".hidden/y.wav", "a/.z.wav", "c.ogg"):
        touch(tmp_path / name)
    clips = find_clips([tmp_path])
    assert [clip.source for clip in clips] == ["c.ogg", "a/x.mp3", "b/10.WAV", "b/2.flac"]
    assert all(clip.id == clip.source and clip.text is None for clip in clips)


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "real" / "a.wav")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert [clip.source for clip in find_clips([tmp_path / "in"])] == ["linked/a.wav"]


def test_librispeech_tree_gives_transcripts_speakers_and_utterance_ids(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech" / "train" / "19" / "198"
    touch(tmp_path / "LibriSpeech" / "SPEAKERS.TXT")
    touch(chapter / "19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n")
    touch(chapter / "19-198-0000.flac")
    touch(chapter / "19-198-0001.flac")
    ignored: Counter[str] = Counter()
    first, second = find_clips([tmp_path], ignored=ignored)
    assert ignored == {".txt": 1}, "transcripts are read"
    assert (first.id, first.text, first.speaker) == ("19-198-0000", "NORTHANGER ABBEY", "19")
    assert (second.id, second.text, second.label) == ("19-198-0001", "THIS LITTLE WORK", None)


def test_manifest_columns_are_found_by_name(tmp_path: Path) -> None:
    manifest = touch(tmp_path / "m.tsv", "speaker\tpath\tdigit\ttext\nanna\tx.wav\t7\tseven\n\ty.wav\t\t\n")
    first, second = find_clips([manifest], label_column="digit")
    assert (first.id, first.speaker, first.label, first.text) == ("x.wav", "anna", "7", "seven")
    assert first.path == str(tmp_path / "x.wav")
    assert (second.speaker, second.label, second.text) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\ttext\na.wav\thello\n", r"line 1.*'path'"),
        ("", r"line 1.*'path'"),
        ("path\ttext\na.wav\nb.wav\tx\ty\n", r"(?s)2 tab-separated.*line 2: 1 fields.*line 3: 3 fields"),
        ("path\ttext\n\thello\n", r"(?s)'path' is empty.*line 2"),
        ("path\na.wav\nb.wav\na.wav\n", r"(?s)more than once.*line 2: a\.wav and .*line 4: a\.wav"),
        ("path\tid\na.wav\tq\nb.wav\tq\n", r"(?s)'q'.*line 2: a\.wav and .*line 3: b\.wav"),
    ],
)
def test_bad_manifests_name_their_lines(tmp_path: Path, text: str, message: str) -> None:
    manifest = touch(tmp_path / "m.tsv", text)
    with pytest.raises(ConfigError, match=message):
        find_clips([manifest])


def test_missing_label_column_is_an_error(tmp_path: Path) -> None:
    manifest = touch(tmp_path / "m.tsv", "path\na.wav\n")
    with pytest.raises(ConfigError, match="'digit'"):
        find_clips([manifest], label_column="digit")


def test_same_id_in_two_inputs_names_both(tmp_path: Path) -> None:
    for name in ("one", "two"):
        touch(tmp_path / name / "a.wav")
    with pytest.raises(ConfigError, match=rf"'a\.wav': {tmp_path}/one/a\.wav and {tmp_path}/two/a\.wav"):
        find_clips([tmp_path / "one", tmp_path / "two"])


def test_missing_and_empty_inputs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing there"):
        find_clips([tmp_path / "absent"])
    with pytest.raises(ConfigError, match="expected audio"):
        find_clips([tmp_path])


def test_file_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"")
    (clip,) = find_clips([tmp_path])
    assert clip.source == "caf\\udce9.wav"
    assert read_headers([clip.path], lambda files, samples: None)[0].fault == "empty file (0 bytes)"


def test_lines_of_a_manifest_end_with_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_bytes("path\ttext\r\na.wav\tone\u2028two\x85three\x1cfour\r\n".encode())
    (line,) = read_manifest(tmp_path / "m.tsv", ["text"])
    assert line.values["text"] == "one\u2028two\x85three\x1cfour"


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.wav").write_bytes(b"")
    scandir = os.scandir

    def refusing(folder: str) -> object:  # root may read everything
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match="closed cannot be read: Permission denied"):
        find_clips([tmp_path])
