"""Files to classes, labels or numbers; see `d2v2ds.classify`.

An input is read as `d2v2ds.evaluate` reads its packed row. A recording longer than `window_seconds`, or a text longer
than the model's `max_tokens`, is cut into overlapping windows; its probabilities, or its number, are means over them.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from d2v2ds.errors import ConfigError
from d2v2ds.modalities.inference import InputOptions
from d2v2ds.run.file_inputs import (
    InputFiles,
    changed_since,
    file_inference,
    find_files,
    outputs_by_input,
    window_options,
    work_name,
)
from d2v2ds.run.record_file import Output, StandardOutput, open_records
from d2v2ds.run.task_model import device_of, load_task
from d2v2ds.tasks.classify import Classify

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabellingOptions:
    """Options of a classification of files."""

    inputs: tuple[Path, ...]
    """Files and folders of them; every line of a text file is an input."""
    output: Path | None = None
    """File of JSON lines; None: lines on standard output."""
    top: int = 5
    """Classes that are named, the most likely ones."""
    window_seconds: float = InputOptions.window_seconds
    """Longest stretch of a recording that the network reads at once (seconds)."""
    tag: str | None = None
    """Checkpoint of a run; None: the best one."""
    device: str | None = None


def probabilities(task: Classify, logits: Tensor) -> Tensor:
    """Convert logits (W, C) of windows to their mean (C,): probabilities of classes or labels, or a number."""
    if task.config.kind == "number":
        return logits.double().mean(0) * task.config.scale
    values = logits.double().softmax(-1) if task.config.kind == "one" else logits.double().sigmoid()
    return values.mean(0)


def describe(task: Classify, logits: Tensor, top: int) -> dict[str, Any]:
    """Describe one input.

    Args:
        task: kind and classes.
        logits: (W, C) of its windows.
        top: classes that are named.

    Returns:
        `top`, the most likely classes with their probabilities, or `value`; and `windows`.
    """
    values = probabilities(task, logits)
    found: dict[str, Any] = {"windows": len(logits)}
    if task.config.kind == "number":
        return {"value": float(values[0]), **found}
    names = task.config.classes or tuple(map(str, range(len(values))))
    order = torch.argsort(values, descending=True, stable=True)[:top].tolist()
    return {"top": [{"class": names[i], "probability": round(float(values[i]), 6)} for i in order], **found}


def label(source: Path, options: LabellingOptions) -> bool:
    """Classify files with a fine-tuned run or export.

    Returns:
        False if more than one in a hundred inputs could not be read; each is logged.

    Raises:
        CheckpointError, ConfigError, MachineError, MissingExtraError: with what to do.
    """
    if options.top < 1:
        raise ConfigError(f"--top {options.top}: expected 1 or more")
    windows = window_options(options.window_seconds)
    model = load_task(source.resolve(), options.tag)
    task = model.task
    if not isinstance(task, Classify):
        raise ConfigError(f"{source}: expected a classifier, found {task.config.name}; use d2v2ds.transcribe")
    if model.preprocessing.get("sentences") == 2:
        raise ConfigError(f"{source}: is of pairs of sentences; pack with --pair-columns and use d2v2ds.evaluate")
    inference = file_inference(model)
    files = [file for file, _ in find_files(options.inputs, inference.suffixes)]
    settings = {**asdict(windows), "top": options.top}
    with _output(options, files, lambda: work_name(model, settings)) as output, tqdm(unit="input", disable=None) as bar:
        inputs = InputFiles(inference, files, windows, output.done)
        for number, outputs in outputs_by_input(model, inputs, inference.fill, device_of(options.device)):
            logits = torch.stack([logits for _, logits in outputs])
            if (ended := inputs.end(number)) is not None:
                output.write(ended.name, describe(task, logits, options.top), ended.stamp)
            bar.update()
    logger.info(
        "%d inputs; %d were there already, %d could not be read",
        inputs.finished, inputs.left_out, inputs.unread,
    )  # fmt: skip
    return not inputs.too_many_unread


@contextmanager
def _output(options: LabellingOptions, files: Sequence[Path], work: Callable[[], str]) -> Iterator[Output]:
    """Open the place for results; `work` returns the name of this work, for a file that is continued."""
    if options.output is None:
        yield StandardOutput(_line)
        return
    with open_records(options.output, work(), "file", changed_since(files)) as records:
        yield records


def _line(name: str, found: dict[str, Any]) -> str:
    return json.dumps({"file": name, **found}, ensure_ascii=False)
