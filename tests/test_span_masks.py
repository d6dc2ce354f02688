"""Span masks of fine-tuning: own numbers of each row, counts, short rows."""

import numpy as np
import pytest

from d2v2ds.masking import SpanMaskConfig, Spans, draw_span_masks

BOTH = SpanMaskConfig(time=Spans(fraction=0.65, length=10), channels=Spans(fraction=0.5, length=4))


def draw(config: SpanMaskConfig, lengths: list[int], ids: list[int] | None = None, width: int = 24, **place: int):
    place = {"seed": 1, "epoch": 2} | place
    ids = list(range(len(lengths))) if ids is None else ids
    return draw_span_masks(config, np.array(lengths), width, sample_ids=ids, **place)


def test_a_row_has_the_same_masks_in_every_batch_of_its_length() -> None:
    time, channels = draw(BOTH, [90, 90, 90], [5, 70_000_000_000, 3])
    for row, sample in enumerate((5, 70_000_000_000, 3)):
        alone, own = draw(BOTH, [90], [sample])
        np.testing.assert_array_equal(time[row], alone[0])
        np.testing.assert_array_equal(channels[row], own[0])


@pytest.mark.parametrize("longest", [91, 120, 300])
def test_a_row_has_the_same_masks_beside_longer_rows(longest: int) -> None:
    time, channels = draw(BOTH, [longest, 90], [7, 5])
    alone, own = draw(BOTH, [90], [5])
    np.testing.assert_array_equal(time[1, :90], alone[0])
    np.testing.assert_array_equal(channels[1], own[0])
    assert not time[1, 90:].any(), "padding is never masked"


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"ids": [9]}])
def test_seed_epoch_and_row_change_time_and_channels(change: dict) -> None:
    first, other = draw(BOTH, [200], [8], 512), draw(BOTH, [200], **({"ids": [8], "width": 512} | change))
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


def test_spans_have_their_length_and_number() -> None:
    config = SpanMaskConfig(time=Spans(fraction=0.2, length=7))
    time, channels = draw(config, [300] * 200)
    assert channels is None
    edges = np.diff(np.pad(time.astype(int), ((0, 0), (1, 1))), axis=1)
    runs = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    assert runs.min() == 7
    low, high = int(0.2 * 300 / 7), int(0.2 * 300 / 7) + 1
    assert time.sum(1).max() <= high * 7 and time.sum(1).min() >= 7
    counts = np.array([(row == 1).sum() for row in edges])
    assert counts.max() <= high and counts.mean() > 0.8 * low - 1


def test_equal_counts_are_those_of_the_row_with_the_fewest_and_a_subset_of_its_own() -> None:
    lengths = [400, 350, 120, 260]
    time, _ = draw(SpanMaskConfig(time=BOTH.time, equal_counts=True), lengths)
    own, _ = draw(SpanMaskConfig(time=BOTH.time), lengths)
    assert (time.sum(1) == own.sum(1).min()).all()
    assert not (time & ~own).any()
    assert len(set(own.sum(1).tolist())) > 1


@pytest.mark.parametrize("equal_counts", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.65, 0.99])
@pytest.mark.parametrize("length", [1, 3, 10])
def test_no_row_is_masked_as_a_whole_and_short_rows_are_no_error(
    fraction: float, length: int, equal_counts: bool
) -> None:
    config = SpanMaskConfig(time=Spans(fraction=fraction, length=length), equal_counts=equal_counts)
    sizes = [1, 2, 3, 4, 9, 10, 11, 12, 30]
    for epoch in range(40):
        time, _ = draw(config, sizes, epoch=epoch)
        for row, size in zip(time, sizes, strict=True):
            assert row.sum() < size
            assert not row[size:].any()
            if size > 1 and not equal_counts:
                assert row.any(), "every row has a span"


def test_a_single_token_is_never_masked_and_one_of_two_is() -> None:
    time, _ = draw(BOTH, [1] * 5 + [2] * 200)
    assert not time[:5].any()
    assert (time[5:].sum(1) == 1).all()


def test_fraction_zero_masks_one_span_of_time_and_no_channel() -> None:
    config = SpanMaskConfig(time=Spans(fraction=0.0, length=4), channels=Spans(fraction=0.0, length=4))
    time, channels = draw(config, [50] * 30)
    assert (time.sum(1) == 4).all()
    assert channels is not None and not channels.any()


def test_nothing_is_drawn_without_settings() -> None:
    assert draw(SpanMaskConfig(), [50]) == (None, None)


def test_every_token_of_a_short_row_is_masked_at_times() -> None:
    config = SpanMaskConfig(time=Spans(fraction=0.99, length=1))
    time, _ = draw(config, [4] * 400)
    assert (time.sum(1) == 3).all()
    assert np.abs(time.mean(0) - 0.75).max() < 4 * 0.433 / 400**0.5
