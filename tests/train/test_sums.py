"""One accumulator for step, metrics and validation: fillers, merging, and sums over ranks."""

import pytest
import torch

from d2v2ds.distributed import comm
from d2v2ds.objectives.protocol import Losses, Totals
from d2v2ds.train.sums import Sums
from tests.ranks import run_distributed


def losses(number: int) -> Losses:
    """Losses of a micro-batch that differ from those of every other; all sums are exact in fp32."""
    value = torch.tensor(float(number), requires_grad=True)
    return Losses(
        sums={"regression": value * 3.0, "cls": value * 0.5},
        count=10 + number,
        statistics={
            "tokens": torch.tensor(2.0 * number, dtype=torch.float64),
            "moments": number * torch.arange(6, dtype=torch.float64).view(2, 3),
        },
        kept={"rows": torch.full((number % 3, 2), float(number))},
        output=None,
    )


def summed(numbers: list[int], fillers: list[int] | None = None) -> Sums:
    sums = Sums()
    for number in fillers or []:
        sums.add(losses(number), 0.0)
    for number in numbers:
        sums.add(losses(number), 1.0)
    return sums


def plain(totals: Totals | None) -> tuple[dict[str, float], float, dict[str, list[float]], list[list[float]]]:
    assert totals is not None
    statistics = {name: value.tolist() for name, value in totals.statistics.items()}
    return dict(totals.sums), totals.count, statistics, totals.kept["rows"].tolist()


def test_sums_are_those_of_all_micro_batches() -> None:
    found = summed([1, 2, 4]).reduce()
    assert plain(found) == (
        {"regression": 21.0, "cls": 3.5},
        37.0,
        {"tokens": 14.0, "moments": [[0.0, 7.0, 14.0], [21.0, 28.0, 35.0]]},
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [4.0, 4.0]],
    )


def test_a_filler_adds_its_names_and_nothing_else() -> None:
    sums = summed([], fillers=[5])
    assert sums.losses.keys() == {"regression", "cls"}
    assert sums.statistics.keys() == {"tokens", "moments"}
    assert sums.count == 0.0
    assert sums.reduce() is None, "there is no mean of nothing"
    assert plain(summed([1, 2], fillers=[5]).reduce()) == plain(summed([1, 2]).reduce())


def test_sums_keep_no_graph() -> None:
    sums = summed([1])
    sums.merge(summed([2]))
    assert not any(loss.requires_grad for loss in sums.losses.values())


def test_merging_equals_adding() -> None:
    merged = Sums()
    for part in (summed([1, 2]), summed([], fillers=[9]), summed([4])):
        merged.merge(part)
    assert plain(merged.reduce()) == plain(summed([1, 2, 4]).reduce())


def test_merging_leaves_the_other_alone() -> None:
    first, second = summed([1]), summed([2])
    first.merge(second)
    first.merge(second)
    assert plain(second.reduce()) == plain(summed([2]).reduce())


def reduce_on_ranks() -> list[Totals | None]:
    """Rank 1 has a filler alone at first, and meets the names in another order."""
    sums = summed([1, 2] if comm.rank() == 0 else [], fillers=[9])
    if comm.rank() == 1:
        sums.losses = dict(reversed(sums.losses.items()))
        sums.statistics = dict(reversed(sums.statistics.items()))
    first = sums.reduce()
    sums.merge(summed([4] if comm.rank() == 1 else [], fillers=[9]))
    return [first, sums.reduce(), summed([], fillers=[comm.rank()]).reduce()]


@pytest.mark.distributed
def test_sums_over_two_ranks_are_those_of_one() -> None:
    for first, second, nothing in run_distributed(reduce_on_ranks, 2):
        assert plain(first) == plain(summed([1, 2]).reduce())
        assert plain(second) == plain(summed([1, 2, 4]).reduce())
        assert nothing is None
