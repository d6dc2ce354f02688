"""Tuning finds weights that repair a recogniser, continues after a kill, and other commands use what it writes."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2v2ds.decoding.beam import BeamConfig
from d2v2ds.errors import ConfigError
from d2v2ds.run import tuning
from d2v2ds.run.decoder_choice import DecoderChoice, add_arguments, choice_of, read_choice, write_choice
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.tuning import RANGES, TuningOptions, Utterances, settings_of, tune
from d2v2ds.tune_decoder import main
from tests.run.test_evaluation import ARPA, recogniser, recordings

pytest.importorskip("flashlight.lib.text.decoder")
assert recogniser and recordings


@pytest.fixture
def options(recordings: Path, tmp_path: Path) -> TuningOptions:
    (tmp_path / "lm.arpa").write_text(ARPA)
    return TuningOptions(
        shards=(recordings,), output=tmp_path / "decoder.json", start=DecoderChoice(lm=tmp_path / "lm.arpa"), trials=6
    )


@pytest.fixture(autouse=True)
def a_row_without_transcript_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = tuning.read_rows
    monkeypatch.setattr(tuning, "read_rows", lambda model, reader, device: read(model, reader, device, 0.2))


def test_the_best_trial_is_written_and_used(recogniser: Path, recordings: Path, options: TuningOptions) -> None:
    best = tune(recogniser, options)
    trials = [json.loads(line) for line in Path(f"{options.output}.trials.jsonl").read_text().splitlines()]
    assert [one["trial"] for one in trials] == list(range(6))
    assert trials[0]["settings"]["lm_weight"] == 2.0
    assert best["errors"] == min(one["errors"] for one in trials)
    choice = read_choice(options.output)
    assert choice.beam == BeamConfig(**best["settings"])
    stored = json.loads(options.output.read_text())
    assert stored["units"] == "emissions: natural logarithms; language model: log10, as in the official decoder"
    to = options.output.parent / "evaluation"
    given = EvaluationOptions(shards=(recordings,), to=to, max_unread=0.2, draws=20, decoder=choice)
    result = evaluate(recogniser, given)["beam"]
    assert result["wer"]["value"] == pytest.approx(best["wer"])
    assert (result["decoder"], result["lm"], result["settings"]) == ("decoder.json", "lm.arpa", best["settings"])


def test_a_killed_search_goes_on(recogniser: Path, options: TuningOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Path(f"{options.output}.trials.jsonl")
    tune(recogniser, options)
    whole, decoder = trials.read_text(), options.output.read_text()
    lines = whole.splitlines(keepends=True)
    trials.write_text("".join(lines[:4]) + lines[4][:10])
    monkeypatch.setattr(tuning, "read_rows", None)  # the outputs of the network are kept
    tune(recogniser, options)
    assert (trials.read_text(), options.output.read_text()) == (whole, decoder)
    with pytest.raises(ConfigError, match="made with another model, other inputs or other settings"):
        tune(recogniser, replace(options, seed=1))
    lm = options.start.lm
    assert lm is not None
    lm.write_text(ARPA.replace("-0.5\tb", "-0.4\tb"))
    with pytest.raises(ConfigError, match="made with another model, other inputs or other settings"):
        tune(recogniser, options)
    lm.write_text(ARPA)
    monkeypatch.undo()
    Path(f"{options.output}.logits.npz").write_bytes(b"damaged")
    monkeypatch.setattr(tuning, "read_rows", lambda *given: pytest.fail("computes again"))
    with pytest.raises(pytest.fail.Exception, match="computes again"):
        tune(recogniser, options)


def test_the_second_half_of_the_trials_is_near_the_best_of_the_first(options: TuningOptions) -> None:
    options = replace(options, trials=100)
    first = {i: {"errors": abs(i - 17), "settings": settings_of_dict(i, options)} for i in range(50)}
    best = first[17]["settings"]
    assert isinstance(best, dict)
    drawn = [settings_of(i, first, options) for i in range(50, 100)]
    for name, (low, high) in RANGES.items():
        values = torch.tensor([getattr(one, name) for one in drawn])
        assert low <= values.min() and values.max() <= high
        assert abs(values.mean() - best[name]) < 0.1 * (high - low) and values.std() < 0.15 * (high - low)
        uniform = torch.tensor([getattr(settings_of(i, {}, options), name) for i in range(1, 50)])
        assert uniform.min() < low + 0.2 * (high - low) and uniform.max() > high - 0.2 * (high - low)


def settings_of_dict(number: int, options: TuningOptions) -> dict[str, float]:
    found = settings_of(number, {}, options)
    return {name: getattr(found, name) for name in RANGES}


def test_weights_are_found_where_the_defaults_fail(
    recogniser: Path, options: TuningOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emissions that are right, and a word score of the first trial that forbids words."""
    wanted = ["ab", "b", "ab"]
    path = [0, *(n for word in wanted for n in [{"a": 5, "b": 6}[letter] for letter in word] + [4])]
    log_probs = (torch.eye(7)[path] * 6).log_softmax(-1)
    monkeypatch.setattr(tuning, "_utterances", lambda *given: Utterances([log_probs] * 2, [wanted] * 2))
    start = replace(options.start, beam=BeamConfig(word_score=-60.0))
    best = tune(recogniser, replace(options, start=start, trials=12))
    trials = [json.loads(line) for line in Path(f"{options.output}.trials.jsonl").read_text().splitlines()]
    assert trials[0]["errors"] > 0 and best["errors"] == 0


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A decoder's file whose folder was moved; language model and lexicon lie elsewhere."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "lm.bin").write_bytes(b"model")
    (tmp_path / "a" / "words.txt").write_text("ab\ta b |\n")
    choice = DecoderChoice(lm=tmp_path / "lm.bin", lexicon=tmp_path / "a" / "words.txt", beam=BeamConfig(beam=7))
    write_choice(tmp_path / "a" / "b" / "decoder.json", choice, {})
    (tmp_path / "a").rename(tmp_path / "c")
    return tmp_path / "c" / "b" / "decoder.json"


def test_a_decoder_file_names_its_files_relative_to_itself(moved: Path, tmp_path: Path) -> None:
    found = read_choice(moved)
    assert found.lm is not None and found.lexicon is not None
    assert (found.lm.resolve(), found.lexicon.resolve()) == (tmp_path / "lm.bin", tmp_path / "c" / "words.txt")
    assert found.beam.beam == 7
    for key, value in (("format", "other"), ("units", "ln for both")):
        values = json.loads(moved.read_text())
        (tmp_path / "x.json").write_text(json.dumps({**values, key: value}))
        with pytest.raises(ConfigError, match="tune it again with this version"):
            read_choice(tmp_path / "x.json")


def test_a_decoder_file_uses_no_file_but_those_it_was_tuned_with(moved: Path, tmp_path: Path) -> None:
    """A file from a stranger may name anything on this machine; nothing of it is used or shown."""
    secret = tmp_path / "secret"
    secret.write_text("password\n")
    values = json.loads(moved.read_text())
    for name in ("lm", "lexicon"):
        for file in (str(secret), "../../secret"):
            moved.write_text(json.dumps({**values, name: file}))
            with pytest.raises(
                ConfigError, match=f"{name}: expected the file that the decoder was tuned with"
            ) as error:
                read_choice(moved)
            assert "password" not in str(error.value)
        moved.write_text(json.dumps({**values, name: str(secret), "contents": {}}))
        with pytest.raises(ConfigError, match="expected the file that the decoder was tuned with"):
            read_choice(moved)
        moved.write_text(json.dumps({**values, name: "/dev/zero"}))
        with pytest.raises(ConfigError, match="/dev/zero: expected a file, found a device"):
            read_choice(moved)
    moved.write_text(json.dumps(values))
    (tmp_path / "lm.bin").write_bytes(b"madel")
    with pytest.raises(ConfigError, match="tune it again, or give the file with --lm"):
        read_choice(moved)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    chosen = choice_of(parser.parse_args(["--decoder", str(moved), "--lm", str(tmp_path / "lm.bin")]))
    assert chosen.lm == tmp_path / "lm.bin" and chosen.file is None and chosen.beam.beam == 7, "the user names it"


def test_the_command_says_what_it_needs(recogniser: Path, recordings: Path, tmp_path: Path) -> None:
    given = [str(recogniser), "--shards", str(recordings), "--output", str(tmp_path / "x.json")]
    assert main(given) == 2, "no language model"
    (tmp_path / "lm.arpa").write_text(ARPA)
    assert main([*given, "--lm", str(tmp_path / "lm.arpa"), "--trials", "0"]) == 2
    assert main([*given, "--lm", str(tmp_path / "lm.arpa"), "--trials", "2"]) == 0
    assert (tmp_path / "x.json").exists()
