"""Connectionist temporal classification (Graves et al. 2006): frames -> letters, without an alignment.

Source of the settings: the official examples/data2vec/config/v2, fine-tuning files of wav2vec_ctc.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.bounds import CountOrZero, Rate
from d2v2ds.errors import ConfigError
from d2v2ds.labels import Letters
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.protocol import Course, Losses, Symptom, Totals
from d2v2ds.tasks.diagnosis import INPUT_UNITS, ctc_symptoms, input_metrics, input_sums, input_symptoms, search_symptoms
from d2v2ds.tasks.encoding import TaskConfig, TaskNetwork
from d2v2ds.tasks.heads import TokenHead
from d2v2ds.tasks.search import TimedSearch
from d2v2ds.tasks.selection import select_faults, selected_mean
from d2v2ds.tasks.task import Task
from d2v2ds.tasks.units import Units, no_units, units_of
from d2v2ds.tasks.vocabulary import BLANK, NO_LETTER, UNKNOWN, WORD_END, Vocabulary, count_letters
from d2v2ds.tasks.words import edit_counts

UNITS: Mapping[str, str] = {
    **INPUT_UNITS,
    "loss/ctc": "-ln p(letters or units | frames) per utterance; mean over utterances",
    "ctc/loss_per_letter": "the same per letter or unit; mean over them",
    "ctc/infeasible": "utterances with more letters than frames, which do not train; share",
    "ctc/unknown": "letters or units of transcripts that the vocabulary lacks; share",
    "ctc/blank": "frames whose most likely output is blank; share of real frames",
    "ctc/over_uniform": "loss over that of equally likely outputs in every frame; ratio of means",
    "ctc/wer": "word error rate of greedy decoding; errors per 100 words of the reference, validation only",
    "ctc/lm_wer": "word error rate of beam search with valid.decoder; likewise, where every utterance was decoded",
    "ctc/lm_decoded": "utterances that this search decoded within valid.decoder_seconds; share, validation only",
    "ctc/lm_seconds": "seconds of this search; sum over ranks, validation only",
    "ctc/cer": "letter error rate of greedy decoding, word ends included; per 100 letters, validation only",
}


@dataclass(frozen=True, kw_only=True)
class CtcConfig(TaskConfig):
    """Settings of CTC."""

    name: Literal["ctc"] = "ctc"
    vocabulary: tuple[str, ...] = ()
    """Outputs behind the four special ones, most frequent first; empty: those of the training shards."""
    units: CountOrZero = 0
    """Sentencepiece units in place of letters: pieces of words that are trained on the transcripts. 0: letters, unless
    `outputs` names a sentencepiece model."""
    final_dropout: Rate = 0.0
    """Dropped fraction of the features before the output layer."""

    label_column = "text"

    @property
    def counts_outputs(self) -> bool:
        """True without a vocabulary."""
        return not self.vocabulary

    def names_of(self, annotations: Counter[str]) -> tuple[str, ...]:
        """Return the letters of transcripts, most frequent first."""
        return count_letters(annotations)

    @property
    def names(self) -> tuple[str, ...]:
        """Vocabulary."""
        return self.vocabulary

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        return super().check(trunk) + select_faults(self.select, ("wer", "cer", "lm_wer"), "ctc")

    def with_names(self, names: tuple[str, ...]) -> "CtcConfig":
        """Return these settings with a vocabulary.

        Raises:
            ConfigError: a unit has a blank, such as a line of a dictionary with its count.
        """
        if wrong := [name for name in names if name.split() != [name]]:
            raise ConfigError(
                f"vocabulary: expected letters or other units without blanks, found {wrong[0]!r:.40}; a dictionary "
                "with counts is to be named dict.txt"
            )
        return replace(self, vocabulary=names)

    def build(self, trunk: TrunkConfig, seed: int) -> "Ctc":
        """Build the objective of a run."""
        return Ctc(self, trunk, seed)


class CtcOutput(TypedDict):
    """Output of one forward."""

    logits: Tensor
    """(B, T, V)."""
    frames: Tensor
    """(B,) int64 real frames."""


class CtcNetwork(TaskNetwork):
    """Trunk and one output layer."""

    def __init__(
        self, trunk: TrunkConfig, config: CtcConfig, num_outputs: int, *, activation_checkpointing: bool = False
    ) -> None:
        """
        Args:
            trunk: settings of the trunk.
            config: settings of the task.
            num_outputs: V.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__(trunk, config, activation_checkpointing=activation_checkpointing)
        self.head = TokenHead(trunk.block.width, num_outputs, config.final_dropout)

    def forward(self, batch: Batch, kept_blocks: list[bool] | None = None, frozen: bool = False) -> CtcOutput:
        """See `TaskNetwork.encode`."""
        features, padding = self.encode(batch, kept_blocks, frozen)
        features = features[:, self.trunk.encoder(batch.modality).num_extra_tokens :]  # (B, T, D)
        full = torch.full((len(features),), features.shape[1], device=features.device)
        frames = full if padding is None else full - padding.sum(1)
        return CtcOutput(logits=self.head(features), frames=frames)


def ctc_losses(logits: Tensor, frames: Tensor, letters: Tensor, lengths: Tensor) -> Tensor:
    """Compute -ln p(letters | frames) of every utterance, 0 where there are fewer frames than letters need.

    Args:
        logits: (B, T, V); output 0 is blank.
        frames: (B,) real frames.
        letters: (B, U) int64.
        lengths: (B,).

    Returns:
        (B,) fp32.
    """
    log_probs = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)  # (T, B, V)
    return F.ctc_loss(log_probs, letters, frames, lengths, blank=BLANK, reduction="none", zero_infinity=True)


def _inside(letters: Tensor, lengths: Tensor) -> Tensor:
    """(B, U), (B,) -> (B, U) bool, True for letters that are no padding."""
    return torch.arange(letters.shape[1], device=letters.device) < lengths[:, None]


def needed_frames(letters: Tensor, lengths: Tensor) -> Tensor:
    """(B, U), (B,) -> (B,) least frames for these letters: one each, and a blank between equal neighbours."""
    inside = _inside(letters, lengths)[:, 1:]
    repeats = ((letters[:, 1:] == letters[:, :-1]) & inside).sum(1)
    return lengths + repeats


def greedy(logits: Tensor, frames: Tensor) -> list[list[int]]:
    """Return the most likely output of every real frame, repeats merged, without blanks: (B, T, V) -> B lists."""
    found = []
    for best, count in zip(logits.argmax(-1).tolist(), frames.tolist(), strict=True):
        path = best[:count]
        found.append([one for one, before in zip(path, [BLANK, *path], strict=False) if one not in (BLANK, before)])
    return found


class Ctc(Task[CtcConfig]):
    """`Objective` of CTC."""

    units = UNITS
    headline: tuple[str, ...] = ("ctc/wer", "ctc/cer", "ctc/lm_wer")

    _divide: Callable[[str], Sequence[str]] | None = None
    search: TimedSearch | None = None
    """Search beside greedy decoding in validation; None for none."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Outputs of the run."""
        return Vocabulary(self.config.vocabulary, self._divide or (no_units if self.config.units else tuple))

    def set_units(self, model: bytes, where: Any) -> None:
        """Divide words by a sentencepiece model.

        Args:
            model: content of its file.
            where: name of the file, for messages.

        Raises:
            ConfigError: it is none, or not that of these outputs.
        """
        if (found := units_of(model, where)) != self.config.vocabulary:
            raise ConfigError(
                f"{where}: expected the {len(self.config.vocabulary)} units of this recogniser, found {len(found)} "
                "others; take the file of its run"
            )
        self._divide = Units(model)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Vocabulary with the special outputs."""
        return self.vocabulary.symbols

    def new_network(self, activation_checkpointing: bool) -> CtcNetwork:
        """Build encoder and output layer."""
        outputs = len(self.vocabulary)
        return CtcNetwork(self.trunk, self.config, outputs, activation_checkpointing=activation_checkpointing)

    def encoder(self) -> Letters:
        """Spell the transcripts."""
        vocabulary = self.vocabulary
        numbers = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
        return Letters(numbers, WORD_END, UNKNOWN, vocabulary.divide)

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run one micro-batch; errors of greedy decoding are counted in validation."""
        labels = batch.required_labels()
        assert labels.lengths is not None
        out: CtcOutput = network(batch, self.kept_blocks(step), self.is_frozen(step))
        logits, frames = out["logits"], out["frames"]
        each = ctc_losses(logits, frames, labels.values, labels.lengths)  # (B,)
        real = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]  # (B, T)
        sums = {
            "letters": labels.lengths.sum(),
            "infeasible": (needed_frames(labels.values, labels.lengths) > frames).sum(),
            "unknown": ((labels.values == UNKNOWN) & _inside(labels.values, labels.lengths)).sum(),
            "blank": ((logits.detach().argmax(-1) == BLANK) & real).sum(),
            "frames": frames.sum(),
        }
        statistics = {name: value.double() for name, value in sums.items()} | input_sums(batch)
        if step is None:
            statistics |= self._errors(logits, frames, batch)
        return Losses(sums={"ctc": each.sum()}, count=len(each), statistics=statistics, output=out)

    def _errors(self, logits: Tensor, frames: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Count errors of words and letters of a micro-batch."""
        labels = batch.required_labels()
        assert labels.lengths is not None
        found = greedy(logits, frames)
        wanted = [row[:n] for row, n in zip(labels.values.tolist(), labels.lengths.tolist(), strict=True)]
        spell = self.vocabulary.words
        words = [edit_counts(spell(a, NO_LETTER), spell(b)) for a, b in zip(wanted, found, strict=True)]
        # a letter that the vocabulary lacks cannot be found
        one_by_one = self.vocabulary.letters
        known = [[-1 if letter == UNKNOWN else letter for letter in one_by_one(row)] for row in wanted]
        letters = [edit_counts(a, one_by_one(b)) for a, b in zip(known, found, strict=True)]
        totals: dict[str, float] = {
            "word_errors": sum(one.errors for one in words),
            "words": sum(one.wanted for one in words),
            "letter_errors": sum(one.errors for one in letters),
            "wanted_letters": sum(one.wanted for one in letters),
        }
        if self.search is not None:
            real = frames.tolist() if batch.loss_weight else []
            totals |= self.search.count(logits, real, [spell(one, NO_LETTER) for one in wanted])
        return {name: torch.tensor(float(total), dtype=torch.float64) for name, total in totals.items()}

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Compute shares and error rates."""
        sums = {name: float(value) for name, value in totals.statistics.items() if value.dim() == 0}
        letters = max(sums["letters"], 1.0)
        values = {
            "ctc/loss_per_letter": totals.sums["ctc"] / letters,
            "ctc/infeasible": sums["infeasible"] / totals.count,
            "ctc/unknown": sums["unknown"] / letters,
            "ctc/blank": sums["blank"] / max(sums["frames"], 1.0),
            "ctc/over_uniform": totals.sums["ctc"] / (max(sums["frames"], 1.0) * math.log(len(self.vocabulary))),
        } | input_metrics(totals.statistics)
        if "words" in sums:
            values["ctc/wer"] = 100 * sums["word_errors"] / max(sums["words"], 1.0)
            values["ctc/cer"] = 100 * sums["letter_errors"] / max(sums["wanted_letters"], 1.0)
        if "lm_rows" in sums:
            assert self.search is not None
            self.search.restart()
            values |= {"ctc/lm_decoded": sums["lm_rows"] / totals.count, "ctc/lm_seconds": sums["lm_seconds"]}
            if sums["lm_rows"] == totals.count:
                values["ctc/lm_wer"] = 100 * sums["lm_errors"] / max(sums["words"], 1.0)
        return values

    def symptoms(self, course: Course) -> list[Symptom]:
        """Say why a word error rate may stay at 100 %."""
        return (
            input_symptoms(course)
            + search_symptoms(course)
            + ctc_symptoms(course, len(self.vocabulary), self.config.freeze_steps)
        )

    def check_validation(self) -> None:
        """Try to count errors.

        Raises:
            MissingExtraError: rapidfuzz is not installed.
        """
        edit_counts([], [])

    def selection(self, values: Mapping[str, float]) -> float | None:
        """Return the mean of the selected error rates, or the loss."""
        return selected_mean(self.config.select or ("wer",), "ctc", values)
