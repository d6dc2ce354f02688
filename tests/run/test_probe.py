"""The probe's verdict and its options, without a run."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError
from d2v2ds.evals.probes import Score, gain
from d2v2ds.probe import main
from d2v2ds.run.probe import Task, verdict
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images


def score(*folds: list[int]) -> Score:
    """Of folds with these hits (1) and misses (0)."""
    hits = {str(number): np.array(fold, dtype=bool) for number, fold in enumerate(folds)}
    return Score(hits=hits, knn=0.0)


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
    assert found.points == pytest.approx(100 * (trained.logistic - start.logistic)) == pytest.approx(12.5)
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
    said = verdict(trained, start, 2)
    assert said.startswith("the model learned: " if learned else "no clear sign of learning: "), said
    found = gain(trained, start)
    assert f"({found.points:+.1f} points, standard error {found.standard_error:.1f})" in said
    assert ("expected" in said) == (not learned)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--c", "0"), ("--c", "-1"), ("--c", "nan"), ("--c", "inf"), ("--neighbours", "0"), ("--neighbours", "-3")],
)
def test_impossible_settings_are_refused_before_anything_is_read(
    option: str, value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "no run"), "--shards", str(tmp_path / "nothing"), option, value]) == 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"{option} is {float(value):g}, expected ")


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
        Task.read(config, [images, images], "label", "speaker")
    with pytest.raises(ConfigError, match=r"sounds: holds audio, .*images holds image; both must be of one modality"):
        Task.read(config, [images, sounds], "label", "speaker")
