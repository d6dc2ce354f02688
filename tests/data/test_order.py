"""The order of the data: published order in a window, nothing lost or repeated, the same for any rank count."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from d2v2ds.data import order as sampler
from d2v2ds.data.order import BatchPlan, PlanConfig, SamplerState, cut_micro_batches, for_rank
from d2v2ds.data.permutation import permute
from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.rng import hash64

RATE = 100
CONFIG = PlanConfig(micro_size=20 * RATE, num_micro=3, min_size=RATE, max_size=8 * RATE, crops=True)


def lengths(num_rows, seed=0):
    return np.random.default_rng(seed).integers(RATE // 2, 12 * RATE, num_rows)


def make_plan(num_samples, config=CONFIG, seed=3):
    return BatchPlan(num_samples, config=config, seed=seed)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(sampler, "WINDOW_ROWS", 50)


def take(plan, count, state=None):
    return list(itertools.islice(plan.iter_from(state or SamplerState()), count))


def content(micro):
    return [(m.epoch, m.rows.tolist(), m.size) for m in micro]


def first_epoch(plan):
    """The micro-batches of epoch 0, from the stream of global batches."""
    stream = (micro for batch in plan.iter_from(SamplerState()) for micro in batch.micro)
    return list(itertools.takewhile(lambda micro: micro.epoch == 0, stream))


# ---- permutation ----


@pytest.mark.parametrize("size", [1, 2, 3, 10, 255, 256, 257, 5000])
def test_permute_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, hash64(1))) == list(range(size))


def test_permute_needs_only_the_positions_asked_for():
    size, key = 10**12, hash64(5)
    some = permute(np.array([0, 999, size - 1]), size, key)
    assert [permute(np.array([i]), size, key)[0] for i in (0, 999, size - 1)] == some.tolist()
    assert (some < size).all()


def test_permute_mixes():
    """Places of a permutation of 4,000: uniform on average, unrelated to their neighbours and to another key."""
    size = 4000
    a, b = (permute(np.arange(size), size, hash64(key)) for key in (1, 2))
    for x, y in [(a, np.arange(size)), (a, b), (a[1:], a[:-1])]:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(size)
    assert np.bincount(a[:1000] // 400, minlength=10).std() < 4 * np.sqrt(100)


# ---- micro-batches ----


def test_micro_batches_are_greedy_by_length():
    """By hand: longest first, 900 counts as 800, and clips x longest stays within 2,000."""
    groups = cut_micro_batches(
        np.array([10, 11, 12, 13, 14, 15, 16]),
        np.array([300, 900, 800, 99, 500, 450, 310]),
        PlanConfig(micro_size=2000, num_micro=1, min_size=100, max_size=800, crops=True),
    )
    assert [(rows.tolist(), length) for rows, length in groups] == [([11, 12], 800), ([14, 15, 16, 10], 300)]


def test_rows_that_are_not_cropped_get_the_size_of_the_largest():
    config = PlanConfig(micro_size=1024, num_micro=1, min_size=2, max_size=512, crops=False)
    groups = cut_micro_batches(np.array([5, 6, 7, 8]), np.array([512, 30, 512, 1]), config)
    assert [(rows.tolist(), size) for rows, size in groups] == [([5, 7], 512), ([6], 30)]


def test_micro_batches_keep_their_limits():
    num_samples = lengths(500)
    plan = make_plan(num_samples)
    for micro in plan.window(0, 0):
        assert len(micro.rows) * num_samples[micro.rows].clip(max=800).max() <= 20 * RATE
        assert micro.size == min(num_samples[micro.rows].min(), 800)
        assert num_samples[micro.rows].min() >= RATE


def test_ties_and_order_of_micro_batches_are_random():
    plan = make_plan(np.full(40, 500))
    first, second = (content(plan.window(epoch, 0)) for epoch in (0, 1))
    groups = [{frozenset(rows) for _, rows, _ in window} for window in (first, second)]
    assert groups[0] != groups[1], "equally long clips meet others in each epoch"
    mixed = make_plan(np.arange(100, 700))
    crops = [micro.size for micro in mixed.window(0, 0)]
    assert crops != sorted(crops, reverse=True) and sorted(crops) == sorted(m.size for m in mixed.window(1, 0))


def test_one_window_is_the_published_order():
    """An epoch of a small dataset is: sort by capped length, cut greedily, shuffle the cuts."""
    num_samples = lengths(300)
    plan = make_plan(num_samples)
    ours = sorted((m.size, len(m.rows)) for m in plan.window(0, 0))
    usable = sorted((min(n, 800) for n in num_samples.tolist() if n >= RATE), reverse=True)
    published = []
    while usable:
        count = 20 * RATE // usable[0]
        group, usable = usable[:count], usable[count:]
        published.append((group[-1], len(group)))
    assert ours == sorted(published)


# ---- the limit of rows ----

ROWS = replace(CONFIG, micro_rows=4)


def test_rows_of_a_micro_batch_are_limited_whatever_their_size():
    config = PlanConfig(micro_size=2000, num_micro=1, min_size=1, max_size=900, crops=False, micro_rows=3)
    groups = cut_micro_batches(np.arange(8), np.array([900, 900, 10, 12, 11, 10, 10, 9]), config)
    assert [(rows.tolist(), size) for rows, size in groups] == [([0, 1], 900), ([3, 4, 2], 12), ([5, 6, 7], 10)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_global_batch_keeps_the_limit_of_rows_on_any_number_of_ranks(small_windows, world):
    num_samples, plan = lengths(500), make_plan(lengths(500), ROWS)
    largest = 0
    for batch in take(plan, 150):
        counted = [m for rank in range(world) for m in for_rank(batch, rank, world) if m.weight]
        assert all(len(m.rows) * num_samples[m.rows].clip(max=800).max() <= 20 * RATE for m in counted)
        assert sum(len(m.rows) for m in counted) <= 12, "three micro-batches of four rows"
        largest = max(largest, sum(len(m.rows) for m in counted))
    assert largest == 12
    unlimited = max(sum(len(m.rows) for m in batch.micro) for batch in take(make_plan(num_samples), 150))
    assert unlimited > 12, "the limit matters here"


def test_a_limit_of_rows_loses_and_repeats_nothing(small_windows):
    num_samples = lengths(180)
    seen = np.concatenate([m.rows for m in first_epoch(make_plan(num_samples, ROWS))])
    assert sorted(seen) == np.flatnonzero(num_samples >= RATE).tolist()


def test_resume_with_a_limit_of_rows_continues_the_sequence(small_windows):
    plan = make_plan(lengths(120), ROWS)
    batches = take(plan, 40)
    for i in range(39):
        stored = json.loads(json.dumps(plan.state_dict(batches[i].state_after)))
        (following,) = take(make_plan(lengths(120), ROWS), 1, plan.load_state_dict(stored))
        assert content(following.micro) == content(batches[i + 1].micro)
        assert following.state_after == batches[i + 1].state_after


def test_a_position_under_another_limit_of_rows_is_refused():
    stored = make_plan(lengths(100), ROWS).state_dict(SamplerState(0, 0, 2))
    with pytest.raises(CheckpointError, match="micro_rows was 4, is None"):
        make_plan(lengths(100)).load_state_dict(stored)
    with pytest.raises(CheckpointError, match="micro_rows was 4, is 5"):
        make_plan(lengths(100), replace(CONFIG, micro_rows=5)).load_state_dict(stored)
    without = make_plan(lengths(100)).state_dict(SamplerState(0, 0, 2))
    del without["micro_rows"]
    assert make_plan(lengths(100)).load_state_dict(without) == SamplerState(0, 0, 2), "stored before there was a limit"


# ---- the stream ----


@pytest.mark.parametrize("num_rows", [1, 7, 50, 51, 180])
def test_an_epoch_sees_every_long_enough_clip_exactly_once(small_windows, num_rows):
    num_samples = np.maximum(lengths(num_rows), RATE * (np.arange(num_rows) == 0))
    plan = make_plan(num_samples)
    seen = np.concatenate([m.rows for m in first_epoch(plan)])
    assert sorted(seen) == np.flatnonzero(num_samples >= RATE).tolist()


def test_global_batches_have_a_fixed_number_of_micro_batches_across_epochs(small_windows):
    plan = make_plan(lengths(120))
    batches = take(plan, 200)
    assert {len(b.micro) for b in batches} == {3}
    epochs = [m.epoch for b in batches for m in b.micro]
    assert epochs == sorted(epochs) and epochs[-1] > 3
    assert any(b.micro[0].epoch != b.micro[-1].epoch for b in batches), "an epoch ends inside a global batch"


def test_a_dataset_smaller_than_a_global_batch_repeats_inside_it():
    plan = make_plan(np.array([500, 500]))
    (batch,) = take(plan, 1)
    assert [m.epoch for m in batch.micro] == [0, 1, 2]
    assert all(sorted(m.rows) == [0, 1] for m in batch.micro)


def test_windows_without_a_long_enough_clip_are_passed_over(small_windows):
    plan = make_plan(np.where(np.arange(230) == 77, RATE, RATE - 1))
    assert [m.rows.tolist() for b in take(plan, 2) for m in b.micro] == [[77]] * 6


def test_order_is_a_function_of_seed_and_epoch(small_windows):
    num_samples = lengths(120)
    first = [content(b.micro) for b in take(make_plan(num_samples), 30)]
    assert first == [content(b.micro) for b in take(make_plan(num_samples), 30)]
    assert first != [content(b.micro) for b in take(make_plan(num_samples, seed=4), 30)]
    windows = [{r for m in make_plan(num_samples).window(epoch, 0) for r in m.rows} for epoch in (0, 1)]
    assert windows[0] != windows[1], "windows hold other rows in each epoch"


def test_resume_at_any_position_continues_the_sequence(small_windows):
    plan = make_plan(lengths(120))
    batches = take(plan, 60)
    for i in range(59):
        stored = plan.state_dict(batches[i].state_after)
        (following,) = take(make_plan(lengths(120)), 1, plan.load_state_dict(stored))
        assert content(following.micro) == content(batches[i + 1].micro)
        assert following.state_after == batches[i + 1].state_after


def test_stored_position_is_a_few_integers(small_windows):
    plan = make_plan(lengths(120))
    stored = plan.state_dict(take(plan, 5)[-1].state_after)
    assert len(json.dumps(stored)) < 300 and json.loads(json.dumps(stored)) == stored


@pytest.mark.parametrize("worlds", [(2, 1), (1, 4), (2, 3), (5, 2)])
def test_resume_on_another_world_size_sees_each_remaining_clip_once(small_windows, worlds):
    before, after = worlds
    num_samples = lengths(170)
    plan = make_plan(num_samples)
    seen = []
    state = SamplerState()
    for world, count in ((before, 4), (after, 200)):
        for batch in take(plan, count, state):
            for rank in range(world):
                seen += [(m.epoch, r) for m in for_rank(batch, rank, world) if m.weight for r in m.rows]
            state = batch.state_after
    usable = np.flatnonzero(num_samples >= RATE).tolist()
    for epoch in range(state.epoch):
        assert sorted(r for e, r in seen if e == epoch) == usable


# ---- ranks ----


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_a_global_batch_without_overlap(world):
    (batch,) = take(make_plan(lengths(200)), 1)
    shares = [for_rank(batch, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {CONFIG.accumulation(world)}
    counted = [m for share in shares for m in share if m.weight == 1.0]
    assert sorted(map(str, content(counted))) == sorted(map(str, content(batch.micro)))
    assert all(m.weight in (0.0, 1.0) for share in shares for m in share)


def test_rank_takes_every_world_th_micro_batch():
    (batch,) = take(make_plan(lengths(200)), 1)
    assert content(for_rank(batch, 0, 2)) == content([batch.micro[0], batch.micro[2]])
    own, filler = for_rank(batch, 1, 2)
    assert content([own]) == content([filler]) == content([batch.micro[1]])
    assert (own.weight, filler.weight) == (1.0, 0.0)


# ---- size ----


def test_a_position_among_a_hundred_million_rows_reads_one_window():
    num_rows = 10**8
    num_samples = np.broadcast_to(np.int64(5 * RATE), num_rows)  # one number, seen as many
    plan = make_plan(num_samples)
    state = SamplerState(epoch=12, window=plan.num_windows(12) - 1, micro=3)
    (batch,) = take(plan, 1, state)
    assert batch.micro[0].rows.max() < num_rows
    assert sum(len(m.rows) for m in plan.window(12, plan.num_windows(12) - 1)) <= sampler.WINDOW_ROWS


def test_estimate_is_exact_for_one_window():
    num_samples = lengths(300)
    plan = make_plan(num_samples)
    estimate = plan.estimate_epoch()
    micro = first_epoch(plan)
    assert estimate.steps == len(micro) / 3
    assert estimate.size == sum(len(m.rows) * m.size for m in micro)
    assert estimate.size_per_step <= 60.0 * RATE


# ---- refusals ----


def test_no_rows_and_no_long_enough_clip_are_errors(small_windows):
    with pytest.raises(ShardError, match="has none"):
        make_plan(np.array([], dtype=np.int64))
    with pytest.raises(ShardError, match="a row of size 100 or more"):
        take(make_plan(np.full(120, RATE - 1)), 1)


def test_a_position_of_another_dataset_is_refused():
    plan = make_plan(lengths(100))
    stored = plan.state_dict(SamplerState(2, 0, 5))
    with pytest.raises(CheckpointError, match="dataset 0 had 100 rows, has 101, and its first rows are not the same"):
        make_plan(lengths(101)).load_state_dict(stored)
    with pytest.raises(CheckpointError, match="seed was 3, is 4"):
        make_plan(lengths(100), seed=4).load_state_dict(stored)
