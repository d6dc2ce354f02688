"""Weights of a language model, tuned on a development set; see `d2v2ds.tune_decoder`.

Published results have weights of 128 trials: the language model's from 0 to 5, the word score from -5 to 5, the score
of word boundaries from -8 to 0 (official file of the sweep: Bayesian search on dev_other). Here the first trial has the
given settings. The others of the first half are uniform in these ranges, the second half is normal around the best of
the first, with a tenth of the ranges as standard deviation. A trial depends on the seed and the trials before it alone.
"""

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d2v2ds.data.schema import read_index
from d2v2ds.decoding.beam import BeamConfig, BeamDecoder
from d2v2ds.errors import ConfigError
from d2v2ds.io.crc import crc32
from d2v2ds.io.output import whole_file
from d2v2ds.io.read import open_regular
from d2v2ds.run.decoder_choice import DecoderChoice, write_choice
from d2v2ds.run.evaluation import labelled_reader, read_rows
from d2v2ds.run.file_inputs import work_name
from d2v2ds.run.record_file import RecordFile, open_records
from d2v2ds.run.task_model import TaskModel, load_task
from d2v2ds.tasks.ctc import Ctc
from d2v2ds.tasks.words import edit_counts

logger = logging.getLogger(__name__)

RANGES = {"lm_weight": (0.0, 5.0), "word_score": (-5.0, 5.0), "boundary_score": (-8.0, 0.0)}
"""Least and largest value of each weight."""
_SPREAD = 0.1
"""Standard deviation of the second half of the trials, over the range."""


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Options of a search for weights."""

    shards: tuple[Path, ...]
    """Packed folders of the development set."""
    output: Path
    """File of the decoder. FILE.trials.jsonl and FILE.logits.npz lie beside it."""
    start: DecoderChoice
    """Language model, lexicon, beam, and weights of the first trial."""
    trials: int = 128
    seed: int = 0
    tag: str | None = None
    """Checkpoint of a run; None: the best one."""
    device: str | None = None


@dataclass(frozen=True)
class Utterances:
    """Development set."""

    log_probs: list[Tensor]
    """(T, V) natural logarithms of every utterance."""
    wanted: list[list[str]]
    """Words of every reference."""


def tune(source: Path, options: TuningOptions) -> dict[str, Any]:
    """Tune the weights of a decoder, and write them.

    Returns:
        Record of the best trial: `trial`, `settings`, `errors`, `words`, `wer` (per 100 words).

    Raises:
        CheckpointError, ConfigError, ShardError, MachineError, MissingExtraError: with what to do.
    """
    model = load_task(source.resolve(), options.tag)
    if not isinstance(model.task, Ctc):
        raise ConfigError(f"{source}: expected a recogniser, found {model.task.config.name}")
    if options.start.lm is None:
        raise ConfigError("expected --lm, found none: without a language model there is nothing to tune")
    if options.trials < 1:
        raise ConfigError(f"--trials {options.trials}: expected 1 or more")
    decoder = options.start.build(model.task.vocabulary)
    assert decoder is not None
    rows = work_name(model, [_contents(folder) for folder in options.shards])
    work = f"{rows}-{crc32(repr((options.start.identity(), options.trials, options.seed)).encode()):08x}"
    with open_records(options.output.with_name(options.output.name + ".trials.jsonl"), work, "trial") as records:
        utterances = _utterances(model, options, rows)
        best = _run_trials(decoder, utterances, records, options)
    choice = replace(options.start, beam=BeamConfig(**best["settings"]))
    tuning = {name: best[name] for name in ("wer", "errors", "words", "trial")}
    about = {"model": source.name, "shards": [folder.name for folder in options.shards], "trials": options.trials}
    write_choice(options.output, choice, {**about, **tuning, "seed": options.seed})
    return best


def _run_trials(
    decoder: BeamDecoder, utterances: Utterances, records: RecordFile, options: TuningOptions
) -> dict[str, Any]:
    """Run the trials that are not recorded yet; returns the record of the best of all."""
    trials = {record["trial"]: record for record in records.read()}
    with tqdm(range(options.trials), "tuning", unit="trial", disable=None) as bar:
        for number in bar:
            if number not in trials:
                settings = settings_of(number, trials, options)
                counts = _errors(decoder.with_settings(settings), utterances)
                wer = 100.0 * counts[0] / counts[1]
                found = {"settings": asdict(settings), "errors": counts[0], "words": counts[1], "wer": wer}
                records.write(number, found)
                trials[number] = {"trial": number, **found}
            bar.set_postfix_str(f"WER {_best(trials, number + 1)['wer']:.2f} %")
    return _best(trials, options.trials)


def settings_of(number: int, done: Mapping[int, Mapping[str, Any]], options: TuningOptions) -> BeamConfig:
    """Draw the settings of a trial.

    Args:
        number: of the trial.
        done: records of the trials of the first half, if it is of the second.
        options: seed, number of trials, and settings of the first one.
    """
    if number == 0:
        return options.start.beam
    rng, half = np.random.default_rng((options.seed, number)), (options.trials + 1) // 2
    low, high = (np.array(ends) for ends in zip(*RANGES.values(), strict=True))
    if number < half:
        drawn = rng.uniform(low, high)
    else:
        centre = _best(done, half)["settings"]
        drawn = rng.normal([centre[name] for name in RANGES], _SPREAD * (high - low)).clip(low, high)
    values = dict(zip(RANGES, np.round(drawn, 3).tolist(), strict=True))
    return replace(options.start.beam, **values)


def _best(done: Mapping[int, Mapping[str, Any]], first: int) -> dict[str, Any]:
    """Return the record with the fewest errors of the first trials; of equal ones the earliest."""
    number = min(range(first), key=lambda one: (done[one]["errors"], one))
    return dict(done[number])


def _errors(decoder: BeamDecoder, utterances: Utterances) -> tuple[int, int]:
    """Decode the development set; returns wrong words and words of the references."""
    errors = words = 0
    for log_probs, wanted in zip(utterances.log_probs, utterances.wanted, strict=True):
        found = decoder(log_probs)
        counts = edit_counts(wanted, found[0].words if found else ())
        errors, words = errors + counts.errors, words + counts.wanted
    return errors, words


def _utterances(model: TaskModel, options: TuningOptions, work: str) -> Utterances:
    """Compute the outputs of the network, or read those of an earlier start.

    Raises:
        ConfigError, ShardError: the folders cannot be read, or have no words.
    """
    path = options.output.with_name(options.output.name + ".logits.npz")
    if (kept := _read_kept(path, work)) is not None:
        return kept
    reader = labelled_reader(model, options.shards)
    rows, unread = read_rows(model, reader, options.device)
    if unread:
        logger.warning("%d rows are left out; the first: %s", len(unread), unread[0])
    rows.sort(key=lambda row: (row.folder, row.row))
    texts = [reader.shards.parts[row.folder].read_labels(row.row).text or "" for row in rows]
    log_probs = [row.logits.log_softmax(-1) for row in rows]
    with whole_file(path) as file:
        np.savez(
            file, work=np.array(work), lengths=np.array([len(one) for one in log_probs]),
            log_probs=torch.cat(log_probs).numpy(), texts=np.frombuffer(json.dumps(texts).encode(), np.uint8),
        )  # fmt: skip
    return Utterances(log_probs, [text.split() for text in texts])


def _read_kept(path: Path, work: str) -> Utterances | None:
    """Read kept outputs; None if there are none, or of another model or set."""
    if not path.exists():
        return None
    try:
        with open_regular(path, ConfigError) as file, np.load(file, allow_pickle=False) as kept:
            if str(kept["work"]) != work:
                return None
            log_probs = torch.from_numpy(kept["log_probs"]).split(kept["lengths"].tolist())
            texts = json.loads(kept["texts"].tobytes())
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        logger.warning("%s: cannot be read (%s); the outputs are computed again", path, error)
        return None
    return Utterances(list(log_probs), [text.split() for text in texts])


def _contents(folder: Path) -> str:
    index = read_index(folder)
    return f"{index.rows} {index.digest(index.num_shards)}"
