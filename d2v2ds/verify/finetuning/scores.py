"""Recorded scores of small examples, and the recorded evaluation transform of images."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2v2ds.errors import D2V2Error
from d2v2ds.evals import scores
from d2v2ds.modalities.image.inference import read_picture
from d2v2ds.model.local import normalise_pixels
from d2v2ds.shapes import resized_side
from d2v2ds.tasks.scores import average_precision, confusion_scores, correlation, pearson, spearman
from d2v2ds.tasks.vocabulary import Vocabulary
from d2v2ds.tasks.words import edit_counts
from d2v2ds.verify.case import ReadTensors
from d2v2ds.verify.report import Report

_LEAST_EXAMPLES = 100
"""Examples below which the official mean average precision is 0."""
_GREY_LEVEL = 1 / 255 / 0.225
"""Difference of one grey level after normalisation."""


def check_scores(values: Mapping[str, Any], report: Report) -> None:
    """Compare the contents of `metrics.json`.

    Raises:
        D2V2Error: an entry of an unknown kind.
    """
    for name, case in values.items():
        if name not in _KINDS:
            raise D2V2Error(f"{name}: expected one of {', '.join(_KINDS)}")
        _KINDS[name](case, report)


def _average_precision(case: Mapping[str, Any], report: Report) -> None:
    found = average_precision(np.array(case["targets"]), np.array(case["scores"]))
    for mine, wanted in zip(found.tolist(), case["average_precision"], strict=True):
        report.compare("average precision", mine, wanted)
    is_enough = len(case["scores"]) >= _LEAST_EXAMPLES
    report.compare("mean average precision", found.mean() if is_enough else 0.0, case["mAP"])


def _binary(case: Mapping[str, Any], report: Report) -> None:
    wanted, found = np.array(case["targ"]), np.array(case["pred"])
    values = {
        "accuracy": scores.accuracy(wanted, found),
        "f1": scores.f1(wanted, found, positive=1),
        "mcc": scores.mcc(wanted, found),
    }
    values["acc_and_f1"] = (values["accuracy"] + values["f1"]) / 2
    confusion = torch.zeros(2, 2)
    np.add.at(confusion.numpy(), (wanted, found), 1)
    sums = confusion_scores(confusion)
    for name, value in values.items():
        report.compare(name, value, case[name])
        if name in sums:
            report.compare(f"{name} from counts", sums[name], case[name])


def _regression(case: Mapping[str, Any], report: Report) -> None:
    wanted, found = np.array(case["targ"]), np.array(case["pred"])
    values = {"pearson": pearson(wanted, found), "spearman": spearman(wanted, found)}
    values["pearson_and_spearman"] = sum(values.values()) / 2
    for name, value in values.items():
        report.compare(name, value, case[name])
    moments = [found.sum(), wanted.sum(), found @ found, found @ wanted, wanted @ wanted]
    report.compare("pearson from sums", correlation(torch.tensor(moments), len(wanted)), case["pearson"])


def _words(case: Mapping[str, Any], report: Report) -> None:
    words, units = [], []
    for row in case["rows"]:
        sides = {side: row[f"{side}_units"].split() for side in ("ref", "hyp")}
        vocabulary = Vocabulary(sorted({"|", *sides["ref"], *sides["hyp"]}))
        for side, letters in sides.items():
            numbers = [vocabulary.symbols.index(letter) for letter in letters]
            report.compare("words", float(vocabulary.words(numbers) == row[f"{side}_words"]), 1.0)
        words.append(edit_counts(row["ref_words"], row["hyp_words"]))
        units.append(edit_counts(sides["ref"], sides["hyp"]))
        report.compare("word errors", words[-1].errors, row["word_errors"])
        report.compare("letter errors", units[-1].errors, row["unit_errors"])
    for name, counts in (("wer", words), ("uer", units)):
        rate = scores.error_rate([one.errors for one in counts], [one.wanted for one in counts])
        report.compare(name, rate, case[name])


_KINDS: dict[str, Callable[[Mapping[str, Any], Report], None]] = {
    "map": _average_precision,
    "binary": _binary,
    "regression": _regression,
    "wer": _words,
}


def check_transform(folder: Path, report: Report) -> None:
    """Compare `eval_transform`: images through our reader, normalised.

    Resampling of other libraries differs by a grey level here and there.

    Raises:
        D2V2Error: a tensor that nothing is compared with.
    """
    values = json.loads((folder / "eval_transform.json").read_text())
    tensors = ReadTensors(load_file(folder / "eval_transform.safetensors"))
    for name, case in values.items():
        pixels, side = tensors[f"{name}/image"], case["input_size"]
        report.compare(f"{name} size", torch.tensor(pixels.shape[:2]), torch.tensor(case["image_h_w"]))
        said = [f"Resize {resized_side(side)}", f"CenterCrop ({side}, {side})", "ToTensor ", "Normalize "]
        report.compare(f"{name} steps", float(said == case["pipeline"]), 1.0)
        found = _read(pixels, side)
        whole = tensors.get(f"{name}/out")
        wanted = tensors[f"{name}/out_rows_0_8"] if whole is None else whole
        difference = (found[:, : wanted.shape[1]] - wanted).abs()
        if found[:, : wanted.shape[1]].shape != wanted.shape:
            raise D2V2Error(f"{name}: expected {tuple(wanted.shape)}, found {tuple(found.shape)}")
        report.allow(f"{name} largest difference, of 3 grey levels", float(difference.max()) / (3.1 * _GREY_LEVEL))
        report.allow(f"{name} mean difference, of 0.5 grey levels", float(difference.mean()) / (0.5 * _GREY_LEVEL))
    if unseen := tensors.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")


def _read(pixels: Tensor, side: int) -> Tensor:
    """(Y, X, 3) uint8 -> (3, side, side), normalised."""
    from PIL import Image

    picture = read_picture(Image.fromarray(pixels.numpy()), side, "image")
    return normalise_pixels(picture[None], torch.float32)[0]
