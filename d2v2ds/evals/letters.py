"""Probe of transcripts: one linear layer on frozen frames, trained by CTC; letter error rate of greedy decoding."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from d2v2ds.errors import ConfigError
from d2v2ds.evals import trained
from d2v2ds.evals.probes import Fold, Score
from d2v2ds.tasks.ctc import ctc_losses, greedy, needed_frames
from d2v2ds.tasks.vocabulary import PAD, UNKNOWN, Vocabulary, count_letters
from d2v2ds.tasks.words import edit_counts

LEAST_ROWS = 10
"""Transcripts with a letter on which a layer is fitted, of every fold."""
_MOST_INFEASIBLE = 0.1
"""Share of utterances with too few frames beyond which the probe is an error."""
_NO_LETTER = -1


class FrameLayer(nn.Module):
    """Linear layer on every frame."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = trained.zero_linear(width, num_outputs)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.linear(frames)


class Letters:
    """Transcripts of N rows, spelled by the letters of the fitted rows."""

    def __init__(self, transcripts: Sequence[str], frames: Sequence[Tensor], fitted: NDArray[np.int64]) -> None:
        """
        Args:
            transcripts: of N rows.
            frames: (T, D) of N rows.
            fitted: rows whose letters make the vocabulary.
        """
        self.vocabulary = Vocabulary(count_letters(Counter(transcripts[i] for i in fitted)))
        self.numbers = [torch.tensor(self.vocabulary.encode(text)) for text in transcripts]
        self._frames = torch.tensor([len(one) for one in frames])

    def padded(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return letters (B, U) and lengths (B,)."""
        chosen = [self.numbers[i] for i in rows]
        return pad_sequence(chosen, batch_first=True, padding_value=PAD), torch.tensor([len(one) for one in chosen])

    def feasible(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows with frames enough for their letters.

        Raises:
            ConfigError: too many have not.
        """
        kept = rows[(needed_frames(*self.padded(rows)) <= self._frames[torch.from_numpy(rows)]).numpy()]
        if len(kept) < (1 - _MOST_INFEASIBLE) * len(rows):
            raise ConfigError(
                f"{len(rows) - len(kept)} of {len(rows)} transcripts have more letters than the model has frames for "
                f"them, at most {_MOST_INFEASIBLE:.0%} may; expected recordings that were not cut or joined"
            )
        return kept

    def loss(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Compute -ln p(letters | frames), mean over rows."""
        return ctc_losses(logits, self._frames[torch.from_numpy(rows)], *self.padded(rows)).mean()

    def errors(self, logits: Sequence[Tensor], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return numbers whose mean is the letter error rate, (N,); letters that the vocabulary lacks are errors."""
        edits, wanted = [], []
        for one, i in zip(logits, rows, strict=True):
            found = greedy(one[None], self._frames[i : i + 1])[0]
            known = [_NO_LETTER if number == UNKNOWN else number for number in self.numbers[i].tolist()]
            count = edit_counts(known, found)
            edits.append(count.errors)
            wanted.append(count.wanted)
        return np.array(edits) / np.mean(wanted)


def check_letters(transcripts: Sequence[str], folds: Sequence[Fold]) -> None:
    """Check that the layer can be fitted and tested in every fold.

    Raises:
        ConfigError: too few transcripts are left, or none of the tested ones has a letter.
    """
    has_letter = np.array([bool(text.strip()) for text in transcripts])
    for fold in folds:
        fitted, tested = (int((has_letter & part).sum()) for part in (fold.fitted, fold.tested))
        if fitted < LEAST_ROWS or not tested:
            raise ConfigError(
                f"testing on {fold.name}: {fitted} transcripts to fit on and {tested} to test on; expected "
                f"{LEAST_ROWS} or more, and 1 or more; give a folder of more labelled rows, or --test-shards"
            )


def score_letters(frames: Sequence[Tensor], transcripts: Sequence[str], folds: Sequence[Fold]) -> Score:
    """Fit and test a linear layer by CTC.

    Args:
        frames: (T, D) of N rows.
        transcripts: of the same.
        folds: at least one.

    Raises:
        ConfigError: too many transcripts have more letters than frames.
        MissingExtraError: rapidfuzz is not installed.
    """
    parts = {}
    for fold in folds:
        fitted, tested = fold.rows
        letters = Letters(transcripts, frames, fitted)
        head = FrameLayer(frames[0].shape[1], len(letters.vocabulary))
        inputs = trained.standardised_frames(frames, fitted)
        trained.fit(head, inputs, letters.loss, letters.feasible(fitted))
        parts[fold.name] = letters.errors(trained.outputs_of(head, inputs, tested), tested)
    return Score("cer", parts, is_error=True)
