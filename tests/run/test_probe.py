"""The probe's verdict and its options, without a run."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError
from d2v2ds.evals.letters import LEAST_ROWS
from d2v2ds.evals.probes import ProbeConfig, Score, gain, leave_one_out
from d2v2ds.probe import main
from d2v2ds.run.probe import random_start, table, verdict
from d2v2ds.run.probe_task import Question, Task
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images


def score(*folds: list[int]) -> Score:
    """Of folds with these hits (1) and misses (0)."""
    hits = {str(number): np.array(fold, dtype=float) for number, fold in enumerate(folds)}
    return Score("logistic", hits)


def pair(rows: int, won: int, lost: int) -> tuple[Score, Score]:
    """Student and random start on the same rows: `won` only the student has right, `lost` only the start."""
    both = ([0, 1] * rows)[: rows - won - lost]
    return score([1] * won + [0] * lost + both), score([0] * won + [1] * lost + both)


def test_standard_error_is_that_of_rows_scored_in_pairs() -> None:
    """Against many draws in which it is a coin toss which of the two has a disputed row right."""
    found = gain(*pair(rows=250, won=30, lost=16))
    assert found.points == pytest.approx(100 * 14 / 250)
    draws = np.random.default_rng(0).integers(0, 2, (20_000, 46)) * 2 - 1
    assert found.standard_error == pytest.approx(float(np.std(100 * draws.sum(1) / 250)), rel=0.02)


def test_folds_count_alike_in_the_gain_and_its_standard_error() -> None:
    """As in the score: a speaker with few rows weighs as much as one with many."""
    trained, start = score([1, 1, 0, 0], [1] * 10), score([0, 0, 1, 0], [1] * 10)
    found = gain(trained, start)
    assert found.points == pytest.approx(100 * (trained.value - start.value)) == pytest.approx(12.5)
    assert found.standard_error == pytest.approx(100 * np.sqrt(3) / 4 / 2)


@pytest.mark.parametrize(
    ("rows", "won", "lost", "learned"),
    [
        (40, 9, 4, False),  # +12.5 points on a minute of speech, standard error 9.0
        (250, 42, 29, False),  # +5.2, standard error 3.4
        (2000, 300, 180, True),  # +6.0, standard error 1.1
        (20_000, 600, 200, False),  # +2.0, standard error 0.14: sure, and too little
        (5, 3, 0, False),  # +60, standard error 35
        (40, 0, 0, False),
    ],
)
def test_learning_is_five_points_and_two_standard_errors(rows: int, won: int, lost: int, learned: bool) -> None:
    trained, start = pair(rows, won, lost)
    said = verdict(trained, start, "block 2")
    assert said.startswith("the model learned: " if learned else "no clear sign of learning: "), said
    found = gain(trained, start)
    assert f"({found.points:+.1f} points, standard error {found.standard_error:.1f})" in said
    assert ("expected" in said) == (not learned)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "0"),
        ("--memory-gib", "0"),
        ("--c", "0"),
        ("--c", "-1"),
        ("--c", "nan"),
        ("--c", "inf"),
        ("--neighbours", "0"),
        ("--neighbours", "-3"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_read(
    option: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "no run"), "--shards", str(tmp_path / "nothing"), option, value]) == 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{option} is {float(value):g}, expected ")


def test_a_probe_of_transcripts_refuses_rows_of_the_table_that_it_has_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path), "--shards", str(tmp_path), "--kind", "ctc", "--layers", "--all-blocks"]) == 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("--all-blocks: a probe of transcripts")
    assert "--layers: a probe" in message


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["la"] * 9 + ["lo"] * 20, "testing on b: 9 transcripts to fit on and 20 to test on"),
        (["la"] * 12 + ["   "] * 12, "testing on a: 0 transcripts to fit on and 12 to test on"),
    ],
)
def test_a_probe_of_few_transcripts_is_refused_before_any_work(labels: list[str], found: str) -> None:
    groups = ["a" if label == "la" else "b" for label in labels]
    task = Task((), labels, None, leave_one_out(groups), "")
    with pytest.raises(ConfigError, match=f"{found}; expected {LEAST_ROWS} or more, and 1 or more"):
        task.check(ProbeConfig(), frame_width=8, memory_gib=1.0)
    enough = ["la"] * LEAST_ROWS + ["lo"] * LEAST_ROWS
    Task((), enough, None, leave_one_out(enough), "").check(ProbeConfig(), frame_width=8, memory_gib=1.0)


def test_errors_gain_by_falling_and_the_verdict_names_them() -> None:
    low, high = (Score("cer", {"a": np.full(400, rate)}, is_error=True) for rate in (0.2, 0.6))
    assert gain(low, high).points == pytest.approx(40)
    assert gain(high, low).points == pytest.approx(-40)
    assert verdict(low, high, "block 1").startswith("the model learned: block 1 gives cer 20.0 % against 60.0 %")


@pytest.mark.parametrize("name", ["image_tiny", "mae/tiny", "data2vec1/image_tiny", "finetune/image_classify_tiny"])
def test_random_start_has_the_first_weights_of_the_run(name: str) -> None:
    config = load_config(name, ["run.seed=5"])
    objective = config.objective.build(config.model, 5)
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, 5)
    found = random_start(config).state_dict()
    assert found.keys() == network.trunk.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.trunk.state_dict().items())


def test_table_puts_every_score_beside_that_of_the_random_start() -> None:
    def found(own: float) -> dict[str, Score]:
        parts = {"a": np.full(4, own)}
        layers = Score("accuracy", parts, {"weight_0": 0.25, "weight_1": 0.75})
        return {"1": Score("logistic", parts, {"knn": own / 2}), "layers": layers}

    assert table(found(0.75), found(0.5)) == [
        "    block  logistic  random       kNN  random",
        "        1      75.0    50.0      37.5    25.0",
        "   layers      75.0    50.0                  ",
        "layer weights of the student: 0.25 0.75",
    ]


def test_folders_that_no_probe_can_be_fitted_on_are_named(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "pictures" / "cats" / f"{i}.png")
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).standard_normal(20_000) / 9, 16_000)
    images, sounds = tmp_path / "images", tmp_path / "sounds"
    assert pack_images(["--input", str(tmp_path / "pictures"), "--output", str(images), "--workers", "1"]) == 0
    assert pack_audio(["--input", str(tmp_path), "--output", str(sounds), "--workers", "1"]) == 0
    folders = [f"data.image.shards={images}", f"data.audio.shards={sounds}", "run.dir=x"]
    no_text = [f"{section}.text=null" for section in ("data", "model.modalities", "objective.modalities")]
    config = load_config("multimodal_tiny", [*folders, *no_text])
    with pytest.raises(ConfigError, match=r"images: expected rows of two classes or more of label, found only 'cats'"):
        Task.read(config, Question(folders=(images, images)))
    with pytest.raises(ConfigError, match=r"sounds: holds audio, .*images holds image; both must be of one modality"):
        Task.read(config, Question(folders=(images, sounds)))
