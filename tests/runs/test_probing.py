"""A run that is probed while it goes on is the run that it would be without."""

import json
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError
from d2v2ds.run.prepare import prepare
from tests.runs.launching import STEPS, arguments_of, deterministic, pack_clips, train, weights

PROBE = ["probe.every_steps=4", "probe.kinds=[one, ctc]", "probe.niceness=0", "run.keep_checkpoints=0"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled recordings with transcripts."""
    return pack_clips(tmp_path_factory.mktemp("spoken"), texts=True)


@pytest.mark.run
def test_probes_change_no_bit_and_a_resumed_run_repeats_none(spoken: Path, tmp_path: Path) -> None:
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    train(1, spoken, plain, "run.keep_checkpoints=0")
    said = train(1, spoken, probed, *PROBE, f"probe.audio={spoken}")
    records = [json.loads(line) for line in (probed / "probes.jsonl").read_text().splitlines()]
    found = [(record["step"], record["kind"]) for record in records]
    assert found[-2:] == [(STEPS, "one"), (STEPS, "ctc")], "the end waits for the probe of the last step"
    assert found[:-2] in ([(4, "one"), (4, "ctc")], []), "that of step 4 may be late for nothing but the last step"
    assert f"step {STEPS}, probe of audio: " in said
    assert {"logistic", "knn", "folds"} == records[-2]["student"]["2"].keys()
    assert {"cer", "folds"} == records[-1]["random_init"]["2"].keys()
    assert list((probed / "tensorboard" / "probe").iterdir())
    assert sorted(path.name for path in probed.glob("probe-start-*")) == [
        "probe-start-audio-ctc.json",
        "probe-start-audio-one.json",
    ]
    assert deterministic(probed) == deterministic(plain)
    for step in (4, STEPS):
        before, after = weights(plain, step), weights(probed, step)
        assert all((before[name] == after[name]).all() for name in before)
    lines = (probed / "probes.jsonl").read_text()
    train(1, spoken, probed, *PROBE, f"probe.audio={spoken}")  # finished: it has nothing to do
    assert (probed / "probes.jsonl").read_text() == lines


def refusal(spoken: Path, run_dir: Path, *extra: str) -> str:
    _, config, *overrides = arguments_of(spoken, run_dir, "probe.every_steps=4", *extra)
    with pytest.raises(ConfigError) as caught:
        prepare(config, overrides, world=1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["probe.label=accent"], "probe.audio, kind one: {}: no annotation 'accent' to predict"),
        (["probe.leave_out=room"], "no annotation 'room' to predict or leave out"),
        (["probe.kinds=[number]", "probe.label=text"], "kind number: --kind number: expected labels that are numbers"),
        (["probe.kinds=[ctc]", "probe.memory_gib=1e-6"], "GiB, expected at most 1e-06"),
    ],
)
def test_folder_that_cannot_answer_is_named_before_the_first_step(
    extra: list[str], message: str, spoken: Path, tmp_path: Path
) -> None:
    said = refusal(spoken, tmp_path / "run", f"probe.audio={spoken}", *extra)
    assert message.format(spoken) in said


def test_folder_that_is_none_is_named_before_the_first_step(spoken: Path, tmp_path: Path) -> None:
    assert "probe.audio, kind one: " in refusal(spoken, tmp_path / "run", f"probe.audio={tmp_path / 'nothing'}")
