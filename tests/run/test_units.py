"""Units of a run: trained, given, kept, contradicted; a recogniser of units is evaluated and transcribes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v2ds.errors import ConfigError
from d2v2ds.interop.fairseq.__main__ import main as fairseq
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.outputs import main as outputs
from d2v2ds.run.agreement import assumptions
from d2v2ds.run.decoder_choice import DecoderChoice, write_choice
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.outputs import vocabulary_faults
from d2v2ds.run.prepare import Prepared, prepare
from d2v2ds.run.task_model import load_task
from d2v2ds.run.transcription import TranscriptionOptions, transcribe
from d2v2ds.run.units import with_units, write_units
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.units import train_units, units_of
from tests.run.test_evaluation import ARPA, recordings, write
from tests.run.test_outputs import Packed, config, letters, packed

__all__ = ["packed", "recordings"]

TEXTS = ["abba cab", "abba b", "cab", "ab"]
COUNTED = {"abba": 2, "cab": 2, "b": 1, "ab": 1}


def test_units_are_those_of_the_training_transcripts(packed: Packed, tmp_path: Path) -> None:
    shards = packed("a", TEXTS)
    found, model = with_units(config(shards, tmp_path / "run", "objective.units=5"))
    assert model == train_units(COUNTED, 5)
    assert letters(found) == units_of(model, "x") and vocabulary_faults(found) == []
    plain = config(shards, tmp_path / "run")
    assert with_units(plain) == (plain, b"")


def test_units_of_a_run_come_first_then_a_given_file(packed: Packed, tmp_path: Path) -> None:
    run_dir, given = tmp_path / "run", tmp_path / "given.model"
    assert outputs([str(packed("a", TEXTS)), "--config", "finetune/ctc_tiny", "--units", "4", "--to", str(given)]) == 0
    assert given.read_bytes() == train_units(COUNTED, 4)
    found, model = with_units(config(tmp_path / "a", run_dir, f"objective.outputs={given}"))
    assert isinstance(found.objective, CtcConfig) and found.objective.units == 4 and model == given.read_bytes()
    (run_dir / "checkpoints" / "step00000001").mkdir(parents=True)
    write_units(run_dir / "units.model", train_units(COUNTED, 5))
    assert len(letters(with_units(config(tmp_path / "gone", run_dir, "objective.units=5"))[0])) == 6
    with pytest.raises(ConfigError, match=r"objective\.units is 4, .*units\.model has 5"):
        with_units(config(tmp_path / "gone", run_dir, "objective.units=4"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.units=500"], "500 units: .*expected at most"),
        (["objective.units=5", "objective.outputs=OTHER/letters.json"], "expected a sentencepiece model"),
        (["objective.units=5", "objective.vocabulary=['|', a]"], "objective.vocabulary is given"),
        (["objective.outputs=OTHER/broken.model"], "broken.model: expected a sentencepiece model, found none"),
        (["objective.outputs=OTHER/none.model"], "none.model"),
    ],
)
def test_contradictions_are_named(packed: Packed, tmp_path: Path, settings: list[str], said: str) -> None:
    (tmp_path / "broken.model").write_bytes(b"model")
    shards = packed("a", TEXTS)
    with pytest.raises(ConfigError, match=said):
        with_units(config(shards, tmp_path / "run", *(one.replace("OTHER", str(tmp_path)) for one in settings)))


def test_the_command_says_what_units_need(packed: Packed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = packed("a", TEXTS)
    for more in (["--to", "x.json"], ["--to", "x.model", "--config", "finetune/text_classify_tiny"]):
        assert outputs([str(shards), "--config", "finetune/ctc_tiny", "--units", "4", *more]) == 2
    assert "expected a task of ctc" in caplog.text


def test_ranks_compare_their_units(tmp_path: Path) -> None:
    given = config(tmp_path, tmp_path / "run")
    found = [
        assumptions(Prepared(given, given.objective.build(given.model, 0), {}, {}, {}, units)) for units in (b"a", b"b")
    ]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"objective: units.crc32"}


def test_a_decoder_that_does_not_fit_is_named_before_the_run(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA.replace("ab", "XY").replace("b", "Z"))
    write_choice(tmp_path / "decoder.json", DecoderChoice(lm=tmp_path / "lm.arpa"), {})
    given = [f"data.shards={packed('a', TEXTS)}", f"valid.audio={packed('b', TEXTS)}", f"run.dir={tmp_path / 'run'}"]
    given.append("engine.deepspeed=zero2_bf16")
    with pytest.raises(ConfigError, match=r"valid\.decoder .*decoder\.json: lexicon: none of its 2 words"):
        prepare("finetune/ctc_tiny", [*given, f"valid.decoder={tmp_path / 'decoder.json'}"], world=1)
    with pytest.raises(ConfigError, match=r"valid\.decoder .*none\.json"):
        prepare("finetune/ctc_tiny", [*given, f"valid.decoder={tmp_path / 'none.json'}"], world=1)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export with units; ab is one of them."""
    model = train_units({"ab": 50, "b": 5, "ba": 1}, 3)
    units = units_of(model, "x")
    assert "ab" in units
    folder = write(tmp_path_factory.mktemp("units") / "model", CtcConfig(modality="audio", vocabulary=units, units=3))
    write_units(folder / "units.model", model)
    return folder


def test_evaluation_and_transcription_find_the_same_words(recogniser: Path, recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    decoder = DecoderChoice(lm=tmp_path / "lm.arpa")
    sound = 0.1 * np.random.default_rng(0).standard_normal(4000 + 1500 * 6)
    soundfile.write(tmp_path / "6.wav", sound[-13000:], 16000)
    result = evaluate(recogniser, EvaluationOptions(shards=(recordings,), to=tmp_path, max_unread=0.2, decoder=decoder))
    assert result["rows"] == 6
    beam = [line.split("\t")[2] for line in (tmp_path / "transcripts_beam.tsv").read_text().splitlines()[1:]]
    assert any(beam) and {word for line in beam for word in line.split()} <= {"ab", "b"}
    greedy = [line.split("\t")[2] for line in (tmp_path / "transcripts_greedy.tsv").read_text().splitlines()[1:]]
    assert any("ab" in line for line in greedy)
    for choice, name in ((DecoderChoice(), "greedy"), (decoder, "beam")):
        to = tmp_path / f"{name}.jsonl"
        options = TranscriptionOptions(inputs=(tmp_path / "6.wav",), output=to, word_times=True, decoder=choice)
        assert transcribe(recogniser, options)
        (record,) = [one for one in map(json.loads, to.read_text().splitlines()) if "file" in one]
        assert record["text"] == " ".join(one["word"] for one in record["words"]) != ""
        assert all(one["start"] < one["end"] <= record["seconds"] for one in record["words"])


def test_a_recogniser_that_lost_its_model_transcribes_and_says_what_evaluation_needs(
    recogniser: Path, recordings: Path, tmp_path: Path
) -> None:
    (recogniser / "units.model").rename(tmp_path / "kept")
    try:
        assert load_task(recogniser).task.vocabulary.words([4, 5])
        with pytest.raises(ConfigError, match=r"units\.model beside it, found none"):
            evaluate(recogniser, EvaluationOptions(shards=(recordings,), to=tmp_path, max_unread=0.2))
    finally:
        (tmp_path / "kept").rename(recogniser / "units.model")
    (recogniser / "units.model").write_bytes((recogniser / "units.model").read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"units\.model: expected"):
        load_task(recogniser)


def test_official_layouts_have_no_units(recogniser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fairseq(["export", str(recogniser), "--out", str(tmp_path / "x.pt")]) != 0
    assert "official dictionaries have no model of them" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"units\.model: expected names of letters.*found a sentencepiece model"):
        read_outputs(recogniser / "units.model")
