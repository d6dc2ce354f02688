"""Probes on made-up features of which it is known what they hold."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.errors import ConfigError
from d2v2ds.evals.features import Features
from d2v2ds.evals.letters import Letters, score_letters
from d2v2ds.evals.probes import (
    Fold,
    ProbeConfig,
    Score,
    check_folds,
    fit_threads,
    leave_one_out,
    score,
    score_attention,
    score_layers,
)
from d2v2ds.evals.wanted import Number, OneClass, SeveralClasses, Wanted

ROWS, WIDTH = 120, 12
CLASSES = np.arange(ROWS) % 3
FOLDS = leave_one_out(["ab"[i // 3 % 2] for i in range(ROWS)])
CONFIG = ProbeConfig()


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def informative(seed: int = 1) -> NDArray[np.float32]:
    """Noise, in which the class moves three channels."""
    found = noise(ROWS, WIDTH, seed=seed)
    found[np.arange(ROWS), CLASSES] += 4
    return found


@pytest.fixture(scope="module")
def features() -> Features:
    """The class is in layer 1, and in one frame of many."""
    frames = [torch.from_numpy(noise(int(10 + i % 5), WIDTH, seed=i)) for i in range(ROWS)]
    for i, one in enumerate(frames):
        one[i % 7, CLASSES[i]] += 12
    return Features([noise(ROWS, WIDTH, seed=5), informative(), noise(ROWS, WIDTH, seed=6)], frames)


def of_kind(kind: str) -> Wanted:
    if kind == "one":
        return OneClass([f"class {number}" for number in CLASSES])
    if kind == "several":
        return SeveralClasses([f"class {number}; {'even' if number != 1 else 'odd'}" for number in CLASSES], ";")
    return Number([str(10.0 * number) for number in CLASSES])


@pytest.mark.parametrize("kind", ["one", "several", "number"])
def test_linear_probe_finds_what_features_hold_and_nothing_in_noise(kind: str, features: Features) -> None:
    with fit_threads(1):
        found, nothing = (score(features.layers[i], of_kind(kind), FOLDS, CONFIG) for i in (1, 0))
    assert found.value > {"one": 0.9, "several": 0.9, "number": 0.5}[kind]
    assert nothing.value < {"one": 0.5, "several": 0.7, "number": 0.15}[kind]
    assert sorted(found.values) == {"one": ["knn", "logistic"], "several": ["map"], "number": ["pearson", "r2"]}[kind]
    assert found.value == pytest.approx(np.mean(list(found.folds.values())))


@pytest.mark.parametrize("kind", ["one", "several", "number"])
def test_learned_layer_weights_find_the_layer(kind: str, features: Features) -> None:
    found = score_layers(features, of_kind(kind), FOLDS, CONFIG)
    weights = [found.more[f"weight_{i}"] for i in range(3)]
    assert sum(weights) == pytest.approx(1)
    assert weights[1] == max(weights)
    assert found.value > {"one": 0.9, "several": 0.85, "number": 0.3}[kind]
    assert found.values == score_layers(features, of_kind(kind), FOLDS, CONFIG).values, "no chance is in a fit"


def test_attention_finds_the_frame_that_a_mean_hides(features: Features) -> None:
    wanted = of_kind("one")
    means = np.stack([one.mean(0).numpy() for one in features.frames])
    found = score_attention(features, wanted, FOLDS, CONFIG)
    with fit_threads(1):
        assert found.value >= score(means, wanted, FOLDS, CONFIG).value
    assert found.value > 0.9


def test_attention_reads_no_padding(features: Features) -> None:
    """Frames of one length alone, and beside longer ones, have the same outputs."""
    from d2v2ds.evals import trained

    inputs, head = trained.standardised_frames(features.frames, np.arange(ROWS)), trained.AttentionPooling(WIDTH, 3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    short, long = 0, 4
    alone = head(*inputs(np.array([short])))
    beside = head(*inputs(np.array([short, long])))[:1]
    torch.testing.assert_close(alone, beside)


def test_r2_is_zero_for_the_mean_and_one_for_the_truth() -> None:
    wanted = of_kind("number")
    assert isinstance(wanted, Number)
    fitted, tested = FOLDS[0].rows
    constant = np.full((len(tested), 1), wanted.values[fitted].mean())
    assert wanted.parts(constant, fitted, tested).mean() == pytest.approx(0)
    assert wanted.parts(wanted.values[tested][:, None], fitted, tested).mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (lambda: Number(["1", "two"]), "--kind number: expected labels that are numbers, found 'two'"),
        (lambda: Number(["1", "nan"]), "found 'nan'"),
    ],
)
def test_labels_that_are_no_numbers_are_named(wanted: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted()  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["one", "several", "number"])
def test_folds_without_different_labels_are_refused(kind: str) -> None:
    same = {"one": OneClass(["x", "x", "y"]), "several": SeveralClasses(["x", "x", "y"], ","), "number": Number("113")}
    fitted = np.array([True, True, False])
    with pytest.raises(ConfigError, match="without the last, .*2 rows"):
        check_folds(same[kind], [Fold("the last", fitted, ~fitted)], ProbeConfig(neighbours=1))
    with pytest.raises(ConfigError, match="without the last, 2 rows are left; expected 5 or more"):
        check_folds(same[kind], [Fold("the last", fitted, ~fitted)], ProbeConfig())


# ------------------------------------------------------------------ transcripts


def spoken(seed: int, spread: float) -> tuple[list[str], list[Tensor]]:
    """Transcripts of three letters, and frames that say each letter for two or three frames."""
    rng, letters = np.random.default_rng(seed), noise(4, WIDTH, seed=9) * 3
    texts, frames = [], []
    for _ in range(ROWS):
        text = " ".join(rng.choice(["ab", "ba", "cab", "bc"], 2))
        said = np.concatenate([np.repeat(letters[[" abc".index(one)]], rng.integers(2, 4), 0) for one in text + " "])
        texts.append(text)
        frames.append(torch.from_numpy((said + spread * rng.standard_normal(said.shape)).astype(np.float32)))
    return texts, frames


def test_ctc_probe_reads_letters_from_frames_that_say_them() -> None:
    texts, frames = spoken(seed=0, spread=0.5)
    found = score_letters(frames, texts, FOLDS)
    nothing = score_letters([torch.randn_like(one) for one in frames], texts, FOLDS)
    assert found.is_error
    assert found.value < 0.2
    assert nothing.value > 0.5


def test_ctc_probe_counts_letters_that_the_fitted_rows_lack_as_errors() -> None:
    texts, frames = spoken(seed=0, spread=0.5)
    with_others = [text if fold else text.replace("c", "z") for text, fold in zip(texts, FOLDS[0].fitted, strict=True)]
    known = score_letters(frames, texts, FOLDS[:1]).value
    unknown = score_letters(frames, with_others, FOLDS[:1]).value
    assert unknown > known + 0.05


def test_output_for_unknown_letters_is_never_right() -> None:
    letters = Letters(["a", "z"], [torch.zeros(2, WIDTH)] * 2, np.array([0]))
    said = [letters.vocabulary.encode("z")] * 2  # unknown, word end
    logits = [torch.nn.functional.one_hot(torch.tensor(one), len(letters.vocabulary)).float() for one in said]
    assert letters.errors(logits, np.array([0, 1])).tolist() == [0.5, 0.5]


def test_ctc_probe_refuses_transcripts_longer_than_their_frames() -> None:
    texts, frames = spoken(seed=0, spread=0.5)
    with pytest.raises(ConfigError, match="60 of 60 transcripts have more letters than the model has frames"):
        score_letters([one[:3] for one in frames], texts, FOLDS)


def test_standard_error_is_that_of_a_mean_over_folds_of_means() -> None:
    rng = np.random.default_rng(0)
    draws = [
        Score("logistic", {"a": (rng.random(50) < 0.3).astype(float), "b": (rng.random(20) < 0.6).astype(float)})
        for _ in range(2000)
    ]
    assert float(np.mean([one.standard_error for one in draws])) == pytest.approx(
        float(np.std([one.value for one in draws])), rel=0.05
    )
