"""Several datasets with weights, and datasets that grow between two starts of a run."""

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from d2v2ds.data import order as sampler
from d2v2ds.data.mixture import DATASET_BITS, Dataset, Mixture, split_row_numbers
from d2v2ds.data.order import BatchPlan, PlanConfig, SamplerState
from d2v2ds.errors import CheckpointError, ShardError

CONFIG = PlanConfig(micro_size=2000, num_micro=3, min_size=100, max_size=800, crops=True)


@dataclass(frozen=True)
class Shards:
    """An identity made of the contents of shards of ten rows."""

    names: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        return len(self.names)

    def digest(self, num_shards: int) -> str:
        return hashlib.sha256(repr(self.names[:num_shards]).encode()).hexdigest()


def dataset(num_shards: int, name: str = "a", weight: float = 1.0) -> Dataset:
    sizes = np.random.default_rng(len(name)).integers(100, 800, 1000)[: 10 * num_shards]
    return Dataset(sizes=sizes, weight=weight, identity=Shards(tuple(f"{name}{i}" for i in range(num_shards))))


def seen(plan: BatchPlan, state: SamplerState, epochs: int) -> tuple[list[Counter[int]], SamplerState]:
    """How often each row is seen in each of the following epochs, from the beginning of one on."""
    counts = [Counter() for _ in range(epochs)]
    for batch, after in plan._stream(state):
        if batch.epoch == state.epoch + epochs:
            break
        counts[batch.epoch - state.epoch].update(batch.rows.tolist())
        last = after
    return counts, last


def test_row_numbers_say_dataset_and_row():
    numbers, rows = split_row_numbers([5, 2 << DATASET_BITS | 7])
    assert (numbers.tolist(), rows.tolist()) == ([0, 2], [5, 7])


@pytest.mark.parametrize("window_rows", [50, 65536])
def test_weights_decide_how_often_rows_are_seen(window_rows, monkeypatch):
    """Weights 2, 1, 0.5: every row of the first once an epoch, of the second in two, of the third in four."""
    monkeypatch.setattr(sampler, "WINDOW_ROWS", window_rows)
    plan = BatchPlan([dataset(9, "a", 2.0), dataset(7, "bb", 1.0), dataset(4, "ccc", 0.5)], config=CONFIG, seed=1)
    counts, _ = seen(plan, SamplerState(), 8)
    for epoch in counts:
        assert set(epoch.values()) == {1}, "no row is seen twice in an epoch"
        per_dataset = Counter(row >> DATASET_BITS for row in epoch)
        assert per_dataset == {0: 90, 1: 35, 2: 10}
    for number, rows, epochs in ((0, 90, 1), (1, 70, 2), (2, 40, 4)):
        for first in range(0, 8, epochs):
            total = sum((c for c in counts[first : first + epochs]), Counter())
            mine = {row: count for row, count in total.items() if row >> DATASET_BITS == number}
            assert sorted(mine) == [number << DATASET_BITS | row for row in range(rows)]
            assert set(mine.values()) == {1}, "each row once in a round"
    halves = [{row for row in counts[epoch] if row >> DATASET_BITS == 1} for epoch in (0, 2)]
    assert halves[0] != halves[1], "another round, another order"


def test_one_dataset_and_equal_weights_see_everything_once():
    for weights in ((1.0, 1.0), (3.0, 3.0)):
        plan = BatchPlan([dataset(3, "a", weights[0]), dataset(2, "bb", weights[1])], config=CONFIG, seed=1)
        (epoch,), _ = seen(plan, SamplerState(), 1)
        assert len(epoch) == 50 and set(epoch.values()) == {1}


def test_mixture_resumes_at_any_position():
    def plan():
        return BatchPlan([dataset(9, "a", 2.0), dataset(7, "bb", 0.7)], config=CONFIG, seed=1)

    batches = list(itertools.islice(plan().iter_from(SamplerState()), 40))
    for i in range(39):
        again = plan()
        state = again.load_state_dict(plan().state_dict(batches[i].state_after))
        following = next(again.iter_from(state))
        assert [m.rows.tolist() for m in following.micro] == [m.rows.tolist() for m in batches[i + 1].micro]


def grown(state: SamplerState, allow: bool = True) -> tuple[BatchPlan, SamplerState]:
    """A plan over ten shards that goes on from a position among six."""
    stored = BatchPlan([dataset(6)], config=CONFIG, seed=1).state_dict(state)
    plan = BatchPlan([dataset(10)], config=CONFIG, seed=1)
    return plan, plan.load_state_dict(stored, allow_grown=allow)


def test_grown_dataset_is_an_error_that_names_the_option():
    with pytest.raises(CheckpointError, match=r"dataset 0 had 60 rows, has 100; start with --allow-grown"):
        grown(SamplerState(1, 0, 2), allow=False)


def test_epoch_under_way_ends_with_the_rows_it_began_with():
    before = BatchPlan([dataset(6)], config=CONFIG, seed=1)
    plan, state = grown(SamplerState(1, 0, 2))
    old = [m.rows.tolist() for m in before.window(1, 0)][2:]
    stream = list(itertools.islice(plan._stream(state), len(old)))
    assert [m.rows.tolist() for m, _ in stream] == old
    assert stream[-1][1] == SamplerState(2, 0, 0)
    (epoch,), _ = seen(plan, SamplerState(2, 0, 0), 1)
    assert sorted(epoch) == list(range(100))


def test_dataset_that_grew_between_two_epochs_is_there_at_once():
    plan, state = grown(SamplerState(3, 0, 0))
    (epoch,), _ = seen(plan, state, 1)
    assert sorted(epoch) == list(range(100))


def test_growth_is_remembered_by_the_next_checkpoint():
    plan, state = grown(SamplerState(1, 0, 2))
    again = BatchPlan([dataset(10)], config=CONFIG, seed=1)
    assert again.load_state_dict(plan.state_dict(state)) == state
    assert again.mixture.history == [(0, [60]), (2, [100])]
    assert [m.rows.tolist() for m in again.window(1, 0)] == [m.rows.tolist() for m in plan.window(1, 0)]


def test_new_dataset_joins_in_the_next_epoch():
    stored = BatchPlan([dataset(6)], config=CONFIG, seed=1).state_dict(SamplerState(1, 0, 2))
    plan = BatchPlan([dataset(6), dataset(2, "bb")], config=CONFIG, seed=1)
    with pytest.raises(CheckpointError, match="dataset 1 is new"):
        plan.load_state_dict(stored)
    state = plan.load_state_dict(stored, allow_grown=True)
    assert plan.mixture.num_rows(1) == 60
    assert plan.mixture.num_rows(state.epoch + 1) == 80


@pytest.mark.parametrize(
    "data, message",
    [
        ([dataset(6, "b")], "dataset 0 had 60 rows, has 60, and its first rows are not the same"),
        ([dataset(7, "b")], "dataset 0 had 60 rows, has 70, and its first rows are not the same"),
        ([dataset(5)], "dataset 0 had 60 rows, has 50, and its first rows are not the same"),
        ([dataset(6, weight=2.0)], "the weight of dataset 0 was 1.0, is 2.0"),
    ],
)
def test_other_data_is_refused_even_where_growth_is_allowed(data, message):
    stored = BatchPlan([dataset(6)], config=CONFIG, seed=1).state_dict(SamplerState(1, 0, 2))
    with pytest.raises(CheckpointError, match=message):
        BatchPlan(data, config=CONFIG, seed=1).load_state_dict(stored, allow_grown=True)


def test_fewer_datasets_are_refused():
    stored = BatchPlan([dataset(6), dataset(2, "bb")], config=CONFIG, seed=1).state_dict(SamplerState())
    with pytest.raises(CheckpointError, match="there were 2 datasets, there are 1"):
        BatchPlan([dataset(6)], config=CONFIG, seed=1).load_state_dict(stored, allow_grown=True)


def test_empty_datasets_and_weights_are_refused():
    with pytest.raises(ShardError, match="has none"):
        Mixture([dataset(1), dataset(0)], seed=0)
    with pytest.raises(ValueError, match="more than 0"):
        Mixture([dataset(1, weight=0.0)], seed=0)
