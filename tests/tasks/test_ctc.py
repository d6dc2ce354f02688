"""Losses equal the sum over all paths; frames that letters need; greedy decoding; error rates."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2v2ds.batch import Labels
from d2v2ds.objectives.protocol import Course, Totals
from d2v2ds.tasks.ctc import CtcConfig, ctc_losses, greedy, needed_frames
from d2v2ds.tasks.search import TimedSearch
from d2v2ds.tasks.vocabulary import LIBRISPEECH
from tests.oracles.ctc import collapse, paths, sums
from tests.tasks.tiny import audio_batch, built


def logits_of(rows: int, frames: int, outputs: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, frames, outputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 4, 5])
def test_loss_is_the_sum_over_all_paths(frames: int) -> None:
    logits = logits_of(1, frames, 4)
    expected = sums(logits.double().log_softmax(-1)[0].numpy())
    for letters in (one for n in range(frames + 2) for one in itertools.product((1, 2, 3), repeat=n)):
        found = ctc_losses(logits, torch.tensor([frames]), torch.tensor([[*letters, 1]]), torch.tensor([len(letters)]))
        assert float(found) == pytest.approx(-expected.get(letters, 0.0), rel=1e-5, abs=1e-5), letters


def test_rows_of_different_lengths_have_the_losses_that_they_have_alone() -> None:
    logits, frames, lengths = logits_of(3, 5, 4), torch.tensor([5, 2, 3]), torch.tensor([2, 1, 0])
    letters = torch.tensor([[2, 2, 1], [3, 1, 1], [1, 1, 1]])
    together = ctc_losses(logits, frames, letters, lengths)
    for row in range(3):
        own = sums(logits[row, : frames[row]].double().log_softmax(-1).numpy())
        assert float(together[row]) == pytest.approx(-own[tuple(letters[row, : lengths[row]].tolist())], rel=1e-5)


def test_needed_frames_are_the_shortest_path_that_exists() -> None:
    shortest: dict[tuple[int, ...], int] = {}
    for frames in range(1, 7):
        for path in paths(frames, 3):
            shortest.setdefault(collapse(path), frames)
    every = [one for one in shortest if one and len(one) <= 3]
    padded = torch.tensor([[*one, *[1] * (4 - len(one))] for one in every])  # padding equals a letter on purpose
    found = needed_frames(padded, torch.tensor([len(one) for one in every]))
    assert found.tolist() == [shortest[one] for one in every]
    assert needed_frames(torch.tensor([[1, 1]]), torch.tensor([0])).tolist() == [0]


def test_infeasible_rows_have_no_loss_no_gradient_and_still_count() -> None:
    logits = logits_of(2, 3, 4).requires_grad_()
    letters, lengths = torch.tensor([[2, 2, 3], [2, 3, 1]]), torch.tensor([3, 2])
    losses = ctc_losses(logits, torch.tensor([3, 3]), letters, lengths)
    losses.sum().backward()
    assert losses[0] == 0 and losses[1] > 0
    assert logits.grad is not None and not logits.grad[0].any() and logits.grad[1].any()
    assert torch.isfinite(logits.grad).all()


def test_greedy_is_the_collapsed_best_path_of_real_frames() -> None:
    logits, frames = logits_of(40, 6, 4), torch.arange(40) % 7
    wanted = [list(collapse(row[:n].tolist())) for row, n in zip(logits.argmax(-1), frames.tolist(), strict=True)]
    assert greedy(logits, frames) == wanted
    assert wanted[0] == []


def config(**changes: object) -> CtcConfig:
    return CtcConfig(modality="audio", vocabulary=LIBRISPEECH, **changes)  # type: ignore[arg-type]


def labels(*texts: str) -> Labels:
    numbers = [config().build(None, 0).vocabulary.encode(text) for text in texts]  # type: ignore[arg-type]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in numbers], batch_first=True, padding_value=1)
    return Labels(values=rows, lengths=torch.tensor([len(one) for one in numbers]))


def test_statistics_count_letters_blanks_frames_and_infeasible_rows() -> None:
    task, network = built(config())
    batch = audio_batch(lengths=(400, 120), labels=labels("A CAB", "EE SEE EE SEE EE"))
    with torch.no_grad():
        losses = task.losses(network.eval(), batch, None)
    frames = losses.output["frames"].tolist()
    best = losses.output["logits"].argmax(-1)
    assert losses.count == 2 and losses.statistics["letters"] == 6 + 17
    assert losses.statistics["frames"] == sum(frames) and frames[0] > frames[1]
    assert losses.statistics["infeasible"] == 1
    assert losses.statistics["blank"] == sum(int((best[i, :n] == 0).sum()) for i, n in enumerate(frames))
    rates = task.metrics("audio", Totals(sums={"ctc": 46.0}, count=2.0, statistics=losses.statistics))
    assert rates["ctc/loss_per_letter"] == pytest.approx(2.0)
    assert rates["ctc/infeasible"] == 0.5


def test_error_rates_of_known_outputs() -> None:
    task, _ = built(config())
    batch = audio_batch(lengths=(400, 400), labels=labels("THE CAT", "A"))
    said = [task.vocabulary.encode(text) for text in ("THE CUT", "")]
    logits = torch.full((2, 16, len(task.vocabulary)), -9.0)
    logits[..., 0] = 0.0
    for row, numbers in enumerate(said):
        for i, number in enumerate(numbers):
            logits[row, 2 * i, number] = 5.0

    def network(*_: object) -> dict[str, torch.Tensor]:
        return {"logits": logits, "frames": torch.tensor([16, 16])}

    losses = task.losses(network, batch, None)
    rates = task.metrics("audio", Totals(sums={"ctc": 1.0}, count=2.0, statistics=losses.statistics))
    assert rates["ctc/wer"] == pytest.approx(100 * 2 / 3)
    assert rates["ctc/cer"] == pytest.approx(100 * (1 + 2) / 10)
    assert "word_errors" not in task.losses(network, batch, 0).statistics


@pytest.mark.parametrize(
    ("select", "value"),
    [(None, 20.0), (("cer",), 8.0), (("wer", "other/wer"), 25.0), (("other/loss",), 3.0), (("third/wer",), None)],
)
def test_the_best_checkpoint_is_that_of_the_selected_rates(select: tuple[str, ...] | None, value: float | None) -> None:
    values = {"valid/ctc/wer": 20.0, "valid/ctc/cer": 8.0, "valid/other/ctc/wer": 30.0, "valid/other/loss/total": 3.0}
    task, _ = built(config(select=select))
    assert task.selection(values) == value


@pytest.mark.parametrize("select", [(), ("wer", "wer"), ("accuracy",), ("wer", "other/loss")])
def test_rates_that_cannot_be_averaged_are_named(select: tuple[str, ...]) -> None:
    task, _ = built(config())
    (fault,) = config(select=select).check(task.trunk)
    assert fault.startswith("select: expected some of wer, cer") and (", ".join(select) or "none") in fault


def test_a_batch_without_letters_has_no_rate_that_divides_by_zero() -> None:
    task, network = built(config())
    batch = audio_batch(lengths=(400,), labels=Labels(values=torch.ones(1, 1).long(), lengths=torch.tensor([0])))
    with torch.no_grad():
        losses = task.losses(network.eval(), batch, None)
    rates = task.metrics("audio", Totals(sums={"ctc": 1.0}, count=1.0, statistics=losses.statistics))
    assert all(np.isfinite(value) for value in rates.values())


def searched(find: Callable[[torch.Tensor], list[str]], limit_s: float, *, fillers: int = 0) -> dict[str, float]:
    """Rates of two utterances, "the cat" and "a", with a search beside greedy decoding."""
    task, network = built(config())
    task.search = TimedSearch(find, limit_s)
    batch = audio_batch(lengths=(400, 120), labels=labels("THE CAT", "A"))
    with torch.no_grad():
        parts = [task.losses(network.eval(), batch, None)]
        parts += [task.losses(network, replace(batch, loss_weight=0.0), None) for _ in range(fillers)]
    assert all(part.statistics.keys() == parts[0].statistics.keys() for part in parts)
    assert all(part.statistics["lm_rows"] == 0 for part in parts[1:]), "fillers are not decoded"
    return task.metrics("audio", Totals(sums={"ctc": 1.0}, count=2.0, statistics=parts[0].statistics))


def test_a_search_counts_its_errors_beside_the_greedy_ones() -> None:
    seen = []

    def find(logits: torch.Tensor) -> list[str]:
        seen.append(len(logits))
        return ["THE", "CUT", "A"]

    rates = searched(find, 100.0, fillers=1)
    assert rates["ctc/lm_wer"] == pytest.approx(100 * (2 + 2) / 3) and rates["ctc/lm_decoded"] == 1.0
    assert rates["ctc/lm_wer"] != rates["ctc/wer"] and rates["ctc/lm_seconds"] > 0
    assert len(seen) == 2 and seen[0] > seen[1], "real frames of each"


def test_a_search_that_runs_out_of_time_has_no_rate_and_says_so() -> None:
    rates = searched(lambda logits: time.sleep(0.05) or ["A"], 0.04)  # type: ignore[func-returns-value]
    assert rates["ctc/lm_decoded"] == 0.5 and "ctc/lm_wer" not in rates and "ctc/wer" in rates
    course = Course(
        step=200, values={f"valid/{name}": rate for name, rate in rates.items()}, first_step=1, first={}, lowest={},
        lr_share=1.0,
    )  # fmt: skip
    (symptom,) = (one for one in built(config())[0].symptoms(course) if one.kind == "search")
    assert symptom.sentence.startswith("50 % of the validation were decoded")


def test_each_validation_set_has_its_own_time() -> None:
    search = TimedSearch(lambda logits: time.sleep(0.05) or [], 0.04)  # type: ignore[func-returns-value]
    logits = torch.zeros(1, 2, 3)
    assert [search.count(logits, [2], [["A"]])["lm_rows"] for _ in range(2)] == [1, 0]
    search.restart()
    assert search.count(logits, [2], [["A"]])["lm_rows"] == 1
