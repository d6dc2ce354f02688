"""Letters and classes of a run: counted, given, kept, compared with the data."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v2ds.config.load import load_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.errors import ConfigError
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.outputs import main
from d2v2ds.run.outputs import vocabulary_faults, with_outputs, write_outputs
from d2v2ds.tasks.ctc import CtcConfig
from preprocessing.pack_audio import main as pack

Packed = Callable[[str, list[str]], Path]


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    """Pack short recordings with transcripts."""

    def make(name: str, texts: list[str]) -> Path:
        lines = ["path\ttext"]
        for number, text in enumerate(texts):
            noise = 0.1 * np.random.default_rng(number).standard_normal(8000)
            soundfile.write(tmp_path / f"{name}{number}.wav", noise, 16000)
            lines.append(f"{name}{number}.wav\t{text}")
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        given = ["--input", str(tmp_path / f"{name}.tsv"), "--output", str(tmp_path / name), "--workers", "1"]
        assert pack([*given, "--min-seconds", "0.1"]) == 0
        return tmp_path / name

    return make


def config(shards: Path, run_dir: Path, *more: str) -> RunConfig:
    return load_config("finetune/ctc_tiny", [f"data.shards={shards}", f"run.dir={run_dir}", *more])


def letters(found: RunConfig) -> tuple[str, ...]:
    assert isinstance(found.objective, CtcConfig)
    return found.objective.vocabulary


def test_letters_are_counted_and_rows_without_any_are_said(
    packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = packed("a", ["bb a", "", "b", "  "])
    assert letters(with_outputs(config(shards, tmp_path / "run"))) == ("b", "|", "a")
    assert "2 of 4 rows have no text and are left out" in caplog.text


def test_letters_of_a_start_that_saved_nothing_are_not_kept(packed: Packed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_outputs(run_dir / "outputs.json", ["|", "X"])
    assert letters(with_outputs(config(packed("a", ["ab"]), run_dir))) == ("a", "b", "|")
    (run_dir / "checkpoints" / "step00000001").mkdir(parents=True)
    assert letters(with_outputs(config(tmp_path / "a", run_dir))) == ("|", "X"), "those of its checkpoints"


def test_a_given_file_is_taken(packed: Packed, tmp_path: Path) -> None:
    write_outputs(tmp_path / "given.json", ["|", "b", "a", "z"])
    given = config(packed("a", ["ab"]), tmp_path / "run", f"objective.outputs={tmp_path / 'given.json'}")
    assert letters(with_outputs(given)) == ("|", "b", "a", "z")


def test_a_vocabulary_of_another_case_is_refused_and_a_few_letters_are_said(
    packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lower = config(packed("a", ["abc ab"]), tmp_path / "run", "objective.vocabulary=['|', A, B, C]")
    (fault,) = vocabulary_faults(lower)
    assert "lacks 71.4% of the letters" in fault and "a b" in fault and "another case" in fault
    few = config(packed("b", ["ab " * 20 + "x"]), tmp_path / "run", "objective.vocabulary=['|', a, b]")
    assert vocabulary_faults(few) == []
    assert "lacks 1.6% of the letters" in caplog.text


@pytest.mark.parametrize("content", ["{}", '{"outputs": []}', '{"outputs": ["a", "a"]}', '{"outputs": [1]}', "[", ""])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "outputs.json").write_text(content)
    with pytest.raises(ConfigError, match="outputs.json"):
        read_outputs(tmp_path / "outputs.json")


def test_the_command_writes_what_a_run_would_count(
    packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = packed("a", ["bb a"])
    with caplog.at_level(logging.INFO):
        assert main([str(shards), "--config", "finetune/ctc_tiny", "--to", str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text()) == {"outputs": ["b", "|", "a"]}
    assert main([str(shards), "--config", "audio_tiny", "--to", str(tmp_path / "y.json")]) == 2
    assert "expected a fine-tuning task, found data2vec2" in caplog.text
