"""Transcripts of files: those of evaluation, continued after a kill, with unreadable files named."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from d2v2ds.errors import ConfigError
from d2v2ds.run.decoder_choice import DecoderChoice
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.subtitles import subtitles
from d2v2ds.run.transcription import TranscriptionOptions, transcribe
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.heads import PatchHeadConfig
from d2v2ds.transcribe import main
from preprocessing.pack_audio import main as pack_audio
from tests.run.test_evaluation import ARPA, write


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ctc") / "model", CtcConfig(modality="audio", vocabulary=("|", "a", "b")))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recordings of different lengths and rates, in two folders, with a manifest."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "deep").mkdir()
    rng, lines = np.random.default_rng(0), ["path\tid\ttext"]
    for number in range(5):
        name = f"{'deep/' if number % 2 else ''}{number}.wav"
        soundfile.write(folder / name, 0.1 * rng.standard_normal(4000 + 3500 * number), 16000 if number else 8000)
        lines.append(f"{name}\t{name}\tab b")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def transcripts(path: Path) -> dict[str, str]:
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return {name: found for name, _, found in lines}


@pytest.mark.parametrize("beam", [False, True])
def test_files_have_the_text_that_evaluation_finds(recogniser: Path, sounds: Path, tmp_path: Path, beam: bool) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    given = ["--input", str(sounds / "all.tsv"), "--output", str(tmp_path / "packed"), "--workers", "1", "--resample"]
    assert pack_audio([*given, "--min-seconds", "0.1"]) == 0
    decoder = DecoderChoice(lm=tmp_path / "lm.arpa") if beam else DecoderChoice()
    evaluate(recogniser, EvaluationOptions(shards=(tmp_path / "packed",), to=tmp_path, draws=20, decoder=decoder))
    expected = transcripts(tmp_path / f"transcripts_{'beam' if beam else 'greedy'}.tsv")
    output = tmp_path / "found.jsonl"
    options = TranscriptionOptions(inputs=(sounds,), output=output, decoder=decoder, word_times=True)
    assert transcribe(recogniser, options)
    found = {str(Path(one["file"]).relative_to(sounds)): one for one in records(output)}
    assert {name: one["text"] for name, one in found.items()} == expected
    assert any(expected.values())
    for name, one in found.items():
        info = soundfile.info(sounds / name)
        assert one["seconds"] == pytest.approx(info.duration, abs=0.03)
        assert " ".join(word["word"] for word in one["words"]) == one["text"]
        times = [time for word in one["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times) and all(0 <= time <= one["seconds"] for time in times)


def test_windows_give_the_text_of_the_whole(recogniser: Path, tmp_path: Path) -> None:
    """Windows of 2 s against one of 40 s; the model sees only its neighbourhood, less than the context."""
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(1).standard_normal(16000 * 6), 16000)
    found = []
    for window in (40.0, 2.0):
        output = tmp_path / f"{window}.jsonl"
        options = TranscriptionOptions(
            inputs=(tmp_path / "long.wav",), output=output, word_times=True, window_seconds=window, context_seconds=0.5
        )
        assert transcribe(recogniser, options)
        found.append(records(output)[0])
    whole, cut = found
    assert whole["seconds"] == cut["seconds"]
    one, other = whole["text"].split(), cut["text"].split()
    assert len(one) > 5
    assert abs(len(one) - len(other)) <= 0.1 * len(one)


def test_a_killed_transcription_goes_on(recogniser: Path, sounds: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    options = TranscriptionOptions(inputs=(sounds,), output=output)
    assert transcribe(recogniser, options)
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:2]) + lines[2][:30])
    assert transcribe(recogniser, options)
    assert output.read_text() == whole
    assert transcribe(recogniser, options)
    assert output.read_text() == whole, "nothing is left to do"
    with pytest.raises(ConfigError, match="made with another model, other inputs or other settings"):
        transcribe(recogniser, TranscriptionOptions(inputs=(sounds,), output=output, word_times=True))


def test_a_recording_that_changed_is_done_again(
    recogniser: Path, sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        _copy(sounds / "2.wav", tmp_path / f"{number}.wav")
    given = [str(recogniser), str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert main(given) == 0
    before = records(tmp_path / "out.jsonl")
    _copy(sounds / "4.wav", tmp_path / "1.wav")
    os.utime(tmp_path / "2.wav", (5, 5))
    caplog.set_level("INFO")
    assert main(given) == 0
    assert "2 inputs changed since and are done again" in caplog.text
    assert "2 recordings, " in caplog.text and "; 1 were there already" in caplog.text
    after = {one["file"]: one for one in records(tmp_path / "out.jsonl")}
    assert len(after) == len(records(tmp_path / "out.jsonl")) == 3
    changed = str(tmp_path / "1.wav")
    assert after[changed]["seconds"] > 1.5 * next(one["seconds"] for one in before if one["file"] == changed)


def test_another_language_model_of_the_same_name_does_not_go_on(recogniser: Path, sounds: Path, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    (tmp_path / "lm.arpa").write_text(ARPA)
    options = TranscriptionOptions(
        inputs=(sounds,), output=tmp_path / "out.jsonl", decoder=DecoderChoice(lm=tmp_path / "lm.arpa")
    )
    assert transcribe(recogniser, options)
    (tmp_path / "lm.arpa").rename(tmp_path / "other.arpa")
    moved = replace(options, decoder=DecoderChoice(lm=tmp_path / "other.arpa"))
    assert transcribe(recogniser, moved), "the same content of another name"
    (tmp_path / "lm.arpa").write_text(ARPA.replace("-0.5\tb", "-0.4\tb"))
    with pytest.raises(ConfigError, match="made with another model, other inputs or other settings"):
        transcribe(recogniser, options)


def test_unreadable_files_are_named_and_counted(
    recogniser: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    soundfile.write(tmp_path / "click.wav", np.ones(2), 16000)
    (tmp_path / "notes.txt").write_text("no sound")
    good = sounds / "0.wav"
    caplog.set_level("INFO")
    assert main([str(recogniser), str(tmp_path), str(good)]) == 3
    out = capsys.readouterr().out
    assert out.startswith(f"{good}\t") and len(out.splitlines()) == 1
    assert "bad.wav cannot be decoded" in caplog.text and "click.wav: 2 samples make no token" in caplog.text
    assert "1 files of other suffixes are left out" in caplog.text
    assert main([str(recogniser), str(good)]) == 0
    assert main([str(recogniser), str(tmp_path / "absent.wav")]) == 2
    assert main([str(recogniser), str(good), "--word-score", "1"]) == 2, "a weight without a language model"
    assert main([str(recogniser), str(good), "--format", "srt"]) == 2, "subtitles need a folder"


def test_subtitles_lie_beside_each_other_as_the_recordings_do(recogniser: Path, sounds: Path, tmp_path: Path) -> None:
    given = [str(recogniser), str(sounds), "--format", "srt", "--output", str(tmp_path / "subs")]
    assert main(given) == 0
    files = sorted(path.relative_to(tmp_path / "subs").as_posix() for path in (tmp_path / "subs").rglob("*.srt"))
    assert files == ["0.srt", "2.srt", "4.srt", "deep/1.srt", "deep/3.srt"]
    (tmp_path / "subs" / "0.srt").write_text("mine")
    assert main(given) == 0
    assert (tmp_path / "subs" / "0.srt").read_text() == "mine", "a file that is there is kept"
    (tmp_path / "subs" / "2.srt").unlink()
    assert main(given) == 0
    assert (tmp_path / "subs" / "2.srt").exists()
    with pytest.raises(ConfigError, match="both would be"):
        inputs = (sounds / "0.wav", _copy(sounds / "0.wav", tmp_path / "0.wav"))
        transcribe(recogniser, TranscriptionOptions(inputs=inputs, output=tmp_path / "x", format="vtt"))


def test_subtitles_of_other_work_are_not_mixed_with_these(
    recogniser: Path, sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _copy(sounds / "0.wav", tmp_path / "0.wav")
    (tmp_path / "subs").mkdir()
    (tmp_path / "subs" / "0.vtt").write_text("mine")
    given = [str(tmp_path / "0.wav"), "--format", "vtt", "--output", str(tmp_path / "subs")]
    assert main([str(recogniser), *given]) == 0
    assert (tmp_path / "subs" / "0.vtt").read_text() == "mine"
    assert "1 files without a record of this work are kept" in caplog.text
    (tmp_path / "subs" / "0.vtt").unlink()
    assert main([str(recogniser), *given]) == 0
    other = write(tmp_path / "other", CtcConfig(modality="audio", vocabulary=("|", "a", "b")), seed=6)
    assert main([str(other), *given]) == 2
    assert "made with another model" in caplog.text
    _copy(sounds / "4.wav", tmp_path / "0.wav")
    before = (tmp_path / "subs" / "0.vtt").read_text()
    assert main([str(recogniser), *given]) == 0
    assert (tmp_path / "subs" / "0.vtt").read_text() != before, "the recording is another one"


def test_words_cannot_end_a_subtitle_of_webvtt() -> None:
    words = [{"word": word, "start": 0.5 * i, "end": 0.5 * i + 0.4} for i, word in enumerate(("a<unk>&b", "-->"))]
    assert subtitles(words, "vtt").splitlines()[-1] == "a&lt;unk&gt;&amp;b --&gt;"
    assert subtitles(words, "srt").splitlines()[-1] == "a<unk>&b -->", "SubRip has no such form"


def _copy(source: Path, to: Path) -> Path:
    to.write_bytes(source.read_bytes())
    return to


def test_words_are_grouped_into_subtitles() -> None:
    words = [{"word": "ab", "start": 0.5, "end": 0.9}, {"word": "b", "start": 1.0, "end": 1.25}]
    words += [{"word": "c", "start": 3601.0, "end": 3602.5}]
    assert subtitles(words, "srt") == (
        "1\n00:00:00,500 --> 00:00:01,250\nab b\n\n2\n01:00:01,000 --> 01:00:02,500\nc\n"
    )
    assert subtitles(words, "vtt").startswith("WEBVTT\n\n1\n00:00:00.500 --> ")
    many = [{"word": "word", "start": 0.4 * i, "end": 0.4 * i + 0.3} for i in range(100)]
    blocks = subtitles(many, "srt").strip().split("\n\n")
    assert len(blocks) > 6 and all(len(block.splitlines()[2]) <= 80 for block in blocks)
    assert " ".join(block.splitlines()[2] for block in blocks).split() == ["word"] * 100


def test_a_classifier_transcribes_nothing(sounds: Path, tmp_path: Path) -> None:
    model = write(tmp_path / "model", ClassifyConfig(modality="image", classes=("a", "b"), head=PatchHeadConfig()))
    with pytest.raises(ConfigError, match=r"expected a recogniser, found classify; use d2v2ds.classify"):
        transcribe(model, TranscriptionOptions(inputs=(sounds,)))


def test_padding_that_changes_features_is_avoided(sounds: Path, tmp_path: Path) -> None:
    """A model that sees padding has the text of each file alone."""
    config = CtcConfig(modality="audio", vocabulary=("|", "a", "b"), hide_padding=False)
    model = write(tmp_path / "model", config)
    assert transcribe(model, TranscriptionOptions(inputs=(sounds,), output=tmp_path / "all.jsonl"))
    together = {one["file"]: one["text"] for one in records(tmp_path / "all.jsonl")}
    for name, text in together.items():
        output = tmp_path / f"{Path(name).stem}.jsonl"
        assert transcribe(model, TranscriptionOptions(inputs=(Path(name),), output=output))
        assert records(output)[0]["text"] == text
