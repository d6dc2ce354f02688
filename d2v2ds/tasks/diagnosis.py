"""Diagnosis of a fine-tuning run from its metrics: one sentence for each thing that is amiss, with value and cause.

Rules come from what users of such tools ask when a word error rate stays at 100 % or an accuracy at chance. The limits
are wide of every healthy run measured here (RESULTS.md).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.objectives.protocol import Course, Symptom

INPUT_UNITS = {
    "input/mean": "mean of waveforms or normalised pixels, padding left out; over the interval and all ranks",
    "input/std": "their standard deviation",
}
ALL_BLANK, MOST_WRONG, WARM = 0.999, 0.01, 0.5
"""Share of blank frames that is every frame; share of letters or utterances that may be wrong; share of the highest
learning rate from which warm-up is no excuse."""
INPUT_RANGE = 1e-3, 10.0
"""Standard deviations of inputs: unscaled 16-bit samples and pixels up to 255 are above, silence is below."""
USUAL_LR = 1e-5, 1e-3
"""Learning rates of the published fine-tuning runs."""
RISE = 0.25
"""Fraction of what the loss had fallen that it may rise again."""
NOISE = 0.05
"""Fraction of the first loss by which records differ by chance."""
FALL = 0.02
"""Fraction of the first loss that it must have fallen."""
LEAST_WANTED = 20
"""Inputs of a class without which it says nothing that none was taken for it."""


def input_sums(batch: Batch) -> dict[str, Tensor]:
    """Return `input`: (3,) fp64 number, sum, sum of squares of values without padding; nothing for ids and bytes."""
    if not batch.source.is_floating_point():
        return {}
    values = batch.source.detach()
    if batch.padding is None:
        number = torch.tensor(float(values.numel()), device=values.device)
    else:
        values, number = values.masked_fill(batch.padding, 0), (~batch.padding).sum()
    squares = values.square().sum(dtype=torch.float64)  # no copy of the batch in fp64
    return {"input": torch.stack((number.double(), values.sum(dtype=torch.float64), squares))}


def input_metrics(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return mean and standard deviation from the sums of `input_sums`."""
    if "input" not in statistics:
        return {}
    number, total, squares = statistics["input"].tolist()
    mean = total / max(number, 1.0)
    return {"input/mean": mean, "input/std": math.sqrt(max(squares / max(number, 1.0) - mean * mean, 0.0))}


def input_symptoms(course: Course) -> list[Symptom]:
    """Inputs that no encoder has seen."""
    std = course.values.get("input/std")
    if std is None or INPUT_RANGE[0] <= std <= INPUT_RANGE[1]:
        return []
    return [
        Symptom(
            "input",
            f"inputs have a standard deviation of {std:.3g}, encoders are trained with about 1: they are silent or not "
            "normalised; look at the data section of the configuration and at the recordings",
        )
    ]


def loss_symptoms(course: Course, name: str, *, frozen_steps: int) -> list[Symptom]:
    """A loss that rises again, or that has not fallen.

    Args:
        course: of the run.
        name: metric of the loss.
        frozen_steps: steps in which the head alone learns.
    """
    now, first, lowest = (record.get(name) for record in (course.values, course.first, course.lowest))
    if now is None or first is None or lowest is None:
        return []
    lr = course.values.get("optim/lr", 0.0)
    if now - lowest > max(RISE * (first - lowest), NOISE * abs(first)):
        return [
            Symptom(
                "rise",
                f"{name} is {now:.3g} and was {lowest:.3g}: the learning rate ({lr:.2g}) is too high; halve lr.peak, "
                "lengthen lr.warmup_steps, or set optim.clip_norm",
            )
        ]
    if course.lr_share >= WARM and first - min(now, lowest) < FALL * abs(first) and course.step >= frozen_steps:
        return [Symptom("stuck", f"{name} is {now:.3g}, at step {course.first_step} it was {first:.3g}: {_stuck(lr)}")]
    return []


def _stuck(lr: float) -> str:
    """Likely cause of a loss that does not fall at this learning rate."""
    if lr < USUAL_LR[0]:
        return f"the learning rate ({lr:.2g}) is too low; raise lr.peak"
    if lr > USUAL_LR[1]:
        return f"the learning rate ({lr:.2g}) is too high; lower lr.peak"
    return (
        f"at this learning rate ({lr:.2g}) the labels may not belong to the inputs, or objective.freeze holds what "
        "must learn; try another lr.peak within 1e-5 to 1e-3"
    )


def ctc_symptoms(course: Course, num_outputs: int, frozen_steps: int) -> list[Symptom]:
    """Why a word error rate stays at 100 %.

    Args:
        course: of the run.
        num_outputs: V.
        frozen_steps: steps in which the head alone learns.
    """
    values, found = course.values, []
    if (share := values.get("ctc/infeasible", 0.0)) > MOST_WRONG:
        found.append(
            Symptom(
                "infeasible",
                f"{100 * share:.3g} % of the utterances have more letters than frames and do not train: transcripts of "
                "whole files on cut recordings, or letters too small for frames of this length",
            )
        )
    if (share := values.get("ctc/unknown", 0.0)) > MOST_WRONG:
        found.append(
            Symptom(
                "unknown",
                f"{100 * share:.3g} % of the letters are not in the vocabulary: it was made of other transcripts or in "
                "another spelling (capitals); make it with d2v2ds.outputs from these shards",
            )
        )
    if (over := values.get("ctc/over_uniform", 0.0)) > 1.0:
        found.append(
            Symptom(
                "vocabulary",
                f"the loss is {over:.3g} times that of {num_outputs} equally likely outputs: the weights of the head "
                "belong to another vocabulary or another order of it (blank comes first), or the learning rate "
                f"({values.get('optim/lr', 0.0):.2g}) is too high",
            )
        )
    rise = loss_symptoms(course, "ctc/loss_per_letter", frozen_steps=frozen_steps)
    if (share := values.get("ctc/blank", 0.0)) >= ALL_BLANK and not rise:
        found.append(Symptom("blank", f"{100 * share:.4g} % of the frames are blank: {_blank(course, frozen_steps)}"))
    return found + rise


def _blank(course: Course, frozen_steps: int) -> str:
    """Likely cause of blank frames alone, in a run whose loss falls."""
    if course.step < frozen_steps:
        return f"usual while the encoder is frozen (objective.freeze_steps {frozen_steps})"
    if course.lr_share < WARM:
        return f"usual while the learning rate is at {100 * course.lr_share:.2g} % of lr.peak"
    return "usual before the first letters; if it lasts while the loss stands, raise lr.peak or compare the transcripts"


def search_symptoms(course: Course) -> list[Symptom]:
    """A validation with a language model that ran out of time."""
    share = course.values.get("valid/ctc/lm_decoded", 1.0)
    if share >= 1:
        return []
    return [
        Symptom(
            "search",
            f"{100 * share:.3g} % of the validation were decoded with valid.decoder in valid.decoder_seconds, so that "
            "there is no error rate with it: usual while most frames are undecided, else raise it or lower the beam",
        )
    ]


def class_symptoms(course: Course, num_classes: int) -> list[Symptom]:
    """Classes that are never predicted.

    Args:
        course: of the run.
        num_classes: C.
    """
    missed = course.values.get("valid/score/missed_classes", course.values.get("score/missed_classes", 0.0))
    if not missed or course.lr_share < WARM:
        return []
    return [
        Symptom(
            "class",
            f"{missed:.0f} of {num_classes} classes are never predicted: they are rare, look like another class, or "
            "the run is young; the confusion matrix of d2v2ds.evaluate names them",
        )
    ]
