"""Diagnosis of fine-tuning runs: each symptom names its value and cause, healthy runs have none."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from d2v2ds.batch import Batch
from d2v2ds.objectives.protocol import Course
from d2v2ds.tasks.diagnosis import (
    LEAST_WANTED,
    class_symptoms,
    ctc_symptoms,
    input_metrics,
    input_sums,
    input_symptoms,
    loss_symptoms,
)
from d2v2ds.train.guard import Guard, HealthConfig

HEALTHY = {
    "ctc/loss_per_letter": 0.8,
    "ctc/blank": 0.7,
    "ctc/infeasible": 0.0,
    "ctc/unknown": 0.0,
    "ctc/over_uniform": 0.1,
    "optim/lr": 5e-4,
    "input/std": 1.0,
}


def course(**changes: Any) -> Course:
    """At step 200, with a loss that fell from 3 to 0.8."""
    start = Course(
        step=200,
        values=HEALTHY | {"optim/lr": changes.pop("lr", 5e-4)} | changes.pop("values", {}),
        first_step=1,
        first={"ctc/loss_per_letter": 3.0},
        lowest={"ctc/loss_per_letter": 0.9},
        lr_share=1.0,
    )
    return replace(start, **changes)


def sentences(at: Course, frozen_steps: int = 0) -> dict[str, str]:
    found = input_symptoms(at) + ctc_symptoms(at, num_outputs=32, frozen_steps=frozen_steps)
    return {symptom.kind: symptom.sentence for symptom in found}


def test_a_healthy_run_has_no_symptom() -> None:
    assert sentences(course()) == {}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("infeasible", {"ctc/infeasible": 0.2}, "20 % of the utterances have more letters than frames"),
        ("unknown", {"ctc/unknown": 0.5}, "50 % of the letters are not in the vocabulary"),
        ("vocabulary", {"ctc/over_uniform": 3.0}, "the loss is 3 times that of 32 equally likely outputs"),
        ("input", {"input/std": 3000.0}, "inputs have a standard deviation of 3e"),
        ("input", {"input/std": 0.0}, "silent or not normalised"),
    ],
)
def test_one_thing_amiss_gives_one_sentence(kind: str, values: dict[str, float], expected: str) -> None:
    found = sentences(course(values=values))
    assert list(found) == [kind]
    assert expected in found[kind]


@pytest.mark.parametrize(
    ("lr_share", "frozen_steps", "cause"),
    [(0.1, 0, "at 10 % of lr.peak"), (1.0, 500, "encoder is frozen"), (1.0, 0, "usual before the first letters")],
)
def test_blank_frames_have_the_likeliest_cause(lr_share: float, frozen_steps: int, cause: str) -> None:
    at = course(values={"ctc/blank": 0.9995, "ctc/loss_per_letter": 2.0}, lowest={"ctc/loss_per_letter": 2.1})
    found = sentences(replace(at, lr_share=lr_share), frozen_steps)
    assert list(found) == ["blank"]
    assert "99.95 % of the frames are blank" in found["blank"] and cause in found["blank"]


@pytest.mark.parametrize(("lr", "cause"), [(1e-7, "too low"), (0.1, "too high"), (1e-4, "labels may not belong")])
def test_a_loss_that_stands_is_explained_by_the_learning_rate(lr: float, cause: str) -> None:
    stands = {"ctc/loss_per_letter": 2.99, "ctc/blank": 1.0}
    found = sentences(course(lr=lr, values=stands, lowest={"ctc/loss_per_letter": 2.98}))
    assert list(found) == ["stuck"]
    assert "is 2.99, at step 1 it was 3" in found["stuck"] and cause in found["stuck"]
    early = course(lr=lr, values=stands, lowest={"ctc/loss_per_letter": 2.98}, lr_share=0.1)
    assert "stuck" not in sentences(early), "warm-up is no fault"
    assert "stuck" not in sentences(course(values=stands, lowest={"ctc/loss_per_letter": 2.98}), frozen_steps=1000)


def test_a_loss_that_rises_again_names_the_learning_rate() -> None:
    found = sentences(course(lr=0.05, values={"ctc/loss_per_letter": 2.0}))
    assert list(found) == ["rise"]
    assert "is 2 and was 0.9: the learning rate (0.05) is too high" in found["rise"]


def test_noise_of_a_small_loss_is_no_rise() -> None:
    at = course(values={"ctc/loss_per_letter": 0.14}, lowest={"ctc/loss_per_letter": 0.01})
    assert loss_symptoms(at, "ctc/loss_per_letter", frozen_steps=0) == []
    first, now = {"ctc/loss_per_letter": 2.1}, {"ctc/loss_per_letter": 2.05}
    at = replace(course(values=now, lowest={"ctc/loss_per_letter": 2.0}), first=first)
    assert loss_symptoms(at, "ctc/loss_per_letter", frozen_steps=0) == []


def test_classes_that_are_never_predicted_are_counted() -> None:
    assert class_symptoms(course(), 10) == []
    (symptom,) = class_symptoms(course(values={"score/missed_classes": 3.0}), 10)
    assert symptom.sentence.startswith("3 of 10 classes are never predicted")
    late = {"score/missed_classes": 3.0, "valid/score/missed_classes": 0.0}
    assert class_symptoms(course(values=late), 10) == [], "validation sees every class"
    assert LEAST_WANTED > 1


def test_inputs_are_measured_without_their_padding() -> None:
    source = torch.randn(3, 400) * 2 + 1
    padding = torch.zeros(3, 400, dtype=torch.bool)
    padding[1, 100:] = padding[2, 350:] = True
    found = input_metrics(input_sums(Batch(modality="audio", source=source, padding=padding, ids=torch.arange(3))))
    real = source[~padding].double()
    assert found["input/mean"] == pytest.approx(float(real.mean()))
    assert found["input/std"] == pytest.approx(float(real.std(correction=0)))
    pixels = Batch(modality="image", source=torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ids=torch.arange(1))
    assert input_metrics(input_sums(pixels)) == {}


def test_a_symptom_is_reported_once_and_again_when_it_returns() -> None:
    told: list[Course] = []

    def symptoms(course: Course) -> list[Any]:
        told.append(course)
        return ctc_symptoms(course, 32, 0)

    guard = Guard(HealthConfig(warm_up_steps=20), [], symptoms, lr_peak=1e-3)
    start, bad = HEALTHY | {"ctc/loss_per_letter": 3.0}, HEALTHY | {"ctc/infeasible": 0.5}
    records = [(10, start), (19, bad), (20, bad), (30, bad), (40, HEALTHY), (50, bad)]
    found = [len(guard.diagnose(step, values)) for step, values in records]
    assert found == [0, 0, 1, 0, 0, 1], "not before the warm-up has ended"
    assert (told[0].first_step, told[0].lr_share) == (10, 0.5)


def test_a_resumed_run_is_not_called_stuck() -> None:
    guard = Guard(HealthConfig(), [], lambda at: ctc_symptoms(at, 32, 0), lr_peak=0.0)
    guard.load_state_dict({"nonfinite_in_a_row": 0, "nonfinite_total": 0, "damaged_rows": 0})
    assert [guard.diagnose(step, HEALTHY) for step in (50, 100, 200)] == [[], [], []]
    fresh = Guard(guard.config, [], lambda at: ctc_symptoms(at, 32, 0), lr_peak=0.0)
    assert [len(fresh.diagnose(step, HEALTHY)) for step in (50, 100, 200)] == [0, 0, 0], "a rate of 0 is no warm-up"
