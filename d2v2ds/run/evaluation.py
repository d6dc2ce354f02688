"""Evaluate a fine-tuned model on packed shards: numbers with intervals, the worst rows, pictures."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from d2v2ds.batch import Batch, Labels
from d2v2ds.data.mixture import DATASET_BITS, split_row_numbers
from d2v2ds.data.order import MicroBatch, PlanConfig, cut_micro_batches
from d2v2ds.data.reader import Reader
from d2v2ds.data.schema import read_index
from d2v2ds.decoding.beam import BeamDecoder
from d2v2ds.errors import ConfigError, MissingExtraError, ShardError
from d2v2ds.evals import classification, recognition
from d2v2ds.evals.pictures import draw_confusion, draw_rates_by_length
from d2v2ds.interop.export_folder import is_export
from d2v2ds.io import durable
from d2v2ds.io.machine_faults import advice
from d2v2ds.labels import join_labels
from d2v2ds.modalities.known import known_modalities, open_reader
from d2v2ds.run.decoder_choice import DecoderChoice
from d2v2ds.run.task_model import TaskModel, device_of, load_task
from d2v2ds.tasks.classify import Classify
from d2v2ds.tasks.ctc import Ctc, greedy

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included."""
_WORST = 20
_MOST_PICTURED = 100
"""Most classes of a confusion matrix that is drawn."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation."""

    shards: tuple[Path, ...]
    """Packed folders."""
    to: Path | None = None
    """Folder for evaluation.json and the pictures; None: RUN/evaluation, or EXPORT-evaluation."""
    tag: str | None = None
    """Checkpoint of a run; None: the best one."""
    device: str | None = None
    decoder: DecoderChoice = field(default_factory=DecoderChoice)
    """Beam search beside greedy decoding, if it has a language model."""
    draws: int = 1000
    """Sets of rows that are drawn for an interval."""
    max_unread: float = 0.01
    """Share of rows without a label, or that cannot be read, beyond which the evaluation is an error."""


@dataclass(frozen=True)
class Row:
    """Output of the network for one row."""

    folder: int
    row: int
    logits: Tensor
    """(T, V) of real frames, or (C,)."""
    wanted: Labels
    """Label of this row alone."""


def evaluate(source: Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate a run's checkpoint or an export; returns what evaluation.json holds.

    Raises:
        CheckpointError, ConfigError, ShardError, MissingExtraError: with what to do.
    """
    source = source.resolve()
    beside = source.with_name(f"{source.name}-evaluation") if is_export(source) else source / "evaluation"
    to = options.to or beside
    model = load_task(source, options.tag)
    if isinstance(model.task, Ctc):
        recognition.count_errors([])  # says what is not installed before the work
    elif not isinstance(model.task, Classify):
        raise ConfigError(f"{source}: expected a recogniser or a classifier, found {model.task.config.name}")
    reader = labelled_reader(model, options.shards)
    decoder = _decoder(model, options)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{to}: cannot be made: {error}; {advice(error)}") from error
    rows, unread = read_rows(model, reader, options.device, options.max_unread)
    result: dict[str, Any] = {
        "model": source.name,
        "origin": {key: value for key, value in model.origin.items() if isinstance(value, str | int)},
        "shards": [folder.name for folder in options.shards],
        "rows": len(rows),
        "unread": len(unread),
    }
    if isinstance(model.task, Ctc):
        result |= _recognition(model.task, reader, rows, decoder, options, to)
    elif isinstance(model.task, Classify):
        result |= _classification(model.task, reader, rows, options, to)
    durable.replace_text(to / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def read_rows(
    model: TaskModel, reader: Reader, device: str | None, max_unread: float = 0.01
) -> tuple[list[Row], list[str]]:
    """Run every row through the network.

    Args:
        model: runs them.
        reader: of the rows, with labels.
        device: of the network; None: a GPU if there is one.
        max_unread: share of rows that may lack a label or be unreadable.

    Returns:
        Rows, and a message for each that was left out.

    Raises:
        ShardError: more were left out, or none is there.
    """
    unread: list[str] = []
    rows = list(run_rows(model, reader, device_of(device), unread))
    if not rows or len(unread) > max_unread * (len(rows) + len(unread)):
        folders = ", ".join(str(part.folder) for part in reader.shards.parts)
        raise ShardError(
            f"{folders}: {len(unread)} of {len(rows) + len(unread)} rows cannot be evaluated, at most "
            f"{max_unread:.0%} may; the first: {unread[0] if unread else 'no row'}"
        )
    return rows, unread


def labelled_reader(model: TaskModel, folders: Sequence[Path]) -> Reader:
    """Open packed folders for a fine-tuned model.

    Raises:
        ConfigError, ShardError: they cannot be read, or not by this model.
    """
    modality = known_modalities()[model.modality]
    data = modality.whole_inputs(folders[0], model.preprocessing)
    data = replace(data, shards=tuple(folders) if len(folders) > 1 else folders[0])
    network = model.task.trunk.modalities[model.modality]
    reader = open_reader(model.modality, data, network, None, model.task.labelled(model.modality), augments=False)
    problems = reader.misfits()
    of_rows = modality.describe_preprocessing(network, data, read_index(folders[0]))
    if unknown := sorted(of_rows.keys() - model.preprocessing.keys()):
        logger.info("not known of the model, taken from %s: %s", folders[0], ", ".join(unknown))
    facts = of_rows | model.preprocessing
    problems += [fault for folder in folders for fault in modality.row_faults(facts, folder)]
    if model.folder is not None:
        problems += [
            fault for folder in folders for fault in modality.packed_faults(model.folder, model.preprocessing, folder)
        ]
    if problems:
        raise ConfigError("; ".join(problems))
    return reader


def _decoder(model: TaskModel, options: EvaluationOptions) -> BeamDecoder | None:
    """Build the beam search, before anything is computed."""
    if options.decoder.lm is None:
        return None
    if not isinstance(model.task, Ctc):
        raise ConfigError(f"--lm: only a recogniser reads a language model, this is {model.task.config.name}")
    return options.decoder.build(model.task.vocabulary)


@torch.inference_mode()
def run_rows(model: TaskModel, reader: Reader, device: torch.device, unread: list[str]) -> Iterator[Row]:
    """Run every row through the network, longest first, in padded batches.

    Args:
        model: moved to the device.
        reader: of the rows, with labels.
        device: of the network.
        unread: gets a message for each row that cannot be read or has no label.
    """
    network = model.network.to(device)
    parts = enumerate(reader.datasets)
    rows = np.concatenate([(number << DATASET_BITS) + np.arange(len(part.sizes)) for number, part in parts])
    sizes = np.concatenate([np.asarray(part.sizes) for part in reader.datasets])
    tokens = np.array([reader.network.num_tokens(int(size)) for size in sizes])
    for row in rows[tokens < 1].tolist():
        unread.append(f"{reader.shards.name(row)}: too short for one token of the model")
    rows, sizes, tokens = rows[tokens >= 1], sizes[tokens >= 1], tokens[tokens >= 1]
    largest = int(sizes.max(initial=1))
    per_batch = max(1.0, _BATCH_TOKENS / max(int(tokens.max(initial=1)), 1))
    limits = PlanConfig(micro_size=int(largest * per_batch), num_micro=1, min_size=1, max_size=largest, crops=False)
    with tqdm(total=len(rows), desc="evaluating", unit="row", leave=False, disable=None) as bar:
        for members, size in cut_micro_batches(rows, sizes, limits):
            for batch, labels in _batches(reader, members, size, unread):
                yield from _rows_of(network(batch.to(device)), batch, labels)
            bar.update(len(members))


def _batches(
    reader: Reader, rows: NDArray[np.int64], size: int, unread: list[str]
) -> Iterator[tuple[Batch, list[Labels]]]:
    """Read rows as one batch; if one cannot be read, each alone. Rows without a label are left out and noted."""
    labels: dict[int, Labels] = {}
    for row in rows.tolist():
        try:
            own = reader.read_labels(np.array([row]))
        except ShardError as error:
            unread.append(str(error))
        else:
            assert own is not None
            labels[row] = own
    good = np.array(list(labels), dtype=np.int64)
    if not len(good):
        return
    try:
        examples = reader.read(MicroBatch(0, good, size), 0)
    except ShardError as error:
        if len(good) == 1:
            unread.append(str(error))
            return
        for row in good:
            yield from _batches(reader, np.array([row]), size, unread)
        return
    batch = Batch(
        modality=reader.modality,
        source=examples.source,
        padding=examples.padding,
        ids=torch.from_numpy(good),
        labels=join_labels(list(labels.values())),
    )
    yield batch, list(labels.values())


def _rows_of(out: Any, batch: Batch, labels: list[Labels]) -> Iterator[Row]:
    frames = out["frames"].tolist() if "frames" in out else [None] * len(labels)
    for number, count, logits, wanted in zip(
        batch.ids.tolist(), frames, out["logits"].float().cpu(), labels, strict=True
    ):
        folder, row = (int(part) for part in split_row_numbers(number))
        yield Row(folder, row, logits if count is None else logits[:count], wanted)


def _recognition(
    task: Ctc,
    reader: Reader,
    rows: Sequence[Row],
    decoder: BeamDecoder | None,
    options: EvaluationOptions,
    to: Path,
) -> dict[str, Any]:
    """Decode and score utterances."""
    result: dict[str, Any] = {}
    annotated = [reader.shards.parts[row.folder].read_labels(row.row) for row in rows]
    sizes = [int(reader.shards.parts[row.folder].sizes[row.row]) for row in rows]
    for name, decode in (("greedy", _greedy(task)), ("beam", None if decoder is None else _beam(decoder))):
        if decode is None:
            continue
        shown = tqdm(rows, f"decoding, {name}", unit="row", leave=False, disable=None)
        said = [decode(row.logits) for row in shown]
        utterances = [
            recognition.Utterance(label.id, " ".join(label.text.split()), text, label.speaker, reader.units(1, size))
            for label, text, size in zip(annotated, said, sizes, strict=True)
        ]
        result[name] = recognition.summarise(utterances, draws=options.draws, seed=0)
        result[name]["worst"] = [asdict(one) for one in recognition.worst(utterances, _WORST)]
        result[name]["by_length"] = recognition.rates_by_length(utterances)
        _picture(draw_rates_by_length, result[name]["by_length"], to / f"wer_by_length_{name}.png")
        lines = [f"{one.id}\t{one.wanted}\t{one.found}" for one in utterances]
        durable.replace_text(to / f"transcripts_{name}.tsv", "\n".join(["id\twanted\tfound", *lines]) + "\n")
    if decoder is not None:
        result["beam"] |= options.decoder.describe()
    return result


def _greedy(task: Ctc) -> Any:
    def decode(logits: Tensor) -> str:
        return " ".join(task.vocabulary.words(greedy(logits[None], torch.tensor([len(logits)]))[0]))

    return decode


def _beam(decoder: BeamDecoder) -> Any:
    def decode(logits: Tensor) -> str:
        found = decoder(logits.log_softmax(-1))
        return " ".join(found[0].words) if found else ""

    return decode


def _classification(
    task: Classify, reader: Reader, rows: Sequence[Row], options: EvaluationOptions, to: Path
) -> dict[str, Any]:
    """Score classes, sets of classes, or numbers."""
    kind, classes = task.config.kind, task.config.classes
    outputs = classification.Outputs(
        np.stack([row.logits.double().numpy() for row in rows]),
        np.concatenate([row.wanted.values.numpy() for row in rows]),
    )
    chosen: dict[str, Callable[[classification.Outputs], dict[str, classification.Score]]] = {
        "one": partial(classification.one_class, positive=task.positive),
        "several": classification.several_labels,
        "number": classification.numbers,
    }
    result: dict[str, Any] = {
        "scores": classification.summarise(chosen[kind](outputs), len(rows), draws=options.draws, seed=0)
    }
    ids = [str(reader.shards.parts[row.folder].read_labels(row.row).id) for row in rows]
    if kind == "one":
        result["classes"], result["worst"] = list(classes), classification.worst(outputs, ids, classes, _WORST)
        if len(classes) <= _MOST_PICTURED:
            counts = classification.confusion(outputs)
            result["confusion"] = counts.tolist()
            _picture(draw_confusion, counts, classes, to / "confusion.png")
    return result


def _picture(draw: Any, *given: Any) -> None:
    """Draw a picture, if matplotlib is installed."""
    try:
        draw(*given)
    except MissingExtraError as error:
        logger.info("no picture: %s", error)


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a reader."""
    lines = [f"{result['model']} on {', '.join(result['shards'])}: {result['rows']} rows, {result['unread']} left out"]
    for name in ("greedy", "beam"):
        for measure in ("wer", "cer") if name in result else ():
            one = result[name][measure]
            low, high = one["interval"]
            lines.append(
                f"{name:7s}{measure.upper()} {one['value']:6.2f} %  (95 %: {low:.2f} to {high:.2f})  "
                f"of {one['wanted']}: {one['substitutions']} substituted, {one['deletions']} deleted, "
                f"{one['insertions']} inserted"
            )
        speakers = result.get(name, {}).get("by_speaker", {})
        if 1 < len(speakers) <= _WORST:
            said = ", ".join(f"{speaker} {found['wer']:.1f}" for speaker, found in speakers.items())
            lines.append(f"{name:7s}WER by speaker: {said}")
        lines += [
            f"  {one['id']}: {one['wanted']} | {one['found']}" for one in result.get(name, {}).get("worst", [])[:3]
        ]
    for measure, one in result.get("scores", {}).items():
        low, high = one["interval"]
        lines.append(f"{measure:18s} {one['value']:6.2f}  (95 %: {low:.2f} to {high:.2f})")
    return lines
