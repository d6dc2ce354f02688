"""Features of packed inputs in batches."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from d2v2ds.config.load import load_config
from d2v2ds.data.reader import Reader
from d2v2ds.errors import ConfigError
from d2v2ds.evals import features
from d2v2ds.evals.features import Features, check_memory, compute_features, frame_bytes
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk
from tests.runs.launching import SMALL

SIZES = [4000, 3000, 5200, 3000, 4100, 3999, 3333]
ROWS = [6, 0, 1, 2, 3, 4]


def reader(can_be_whole: bool = True) -> Reader:
    """Noise of several lengths in place of recordings."""
    sounds = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(SIZES)]
    made_up: Any = SimpleNamespace(
        modality="audio",
        network=trunk().config.modalities["audio"],
        sizes=np.array(SIZES),
        read_whole=sounds.__getitem__,
        can_be_whole=can_be_whole,
    )
    return cast(Reader, made_up)


def trunk() -> Trunk:
    model = Trunk(load_config("audio_tiny", ["data.shards=x", *SMALL]).model)
    initialise(trunk_parts(model), 1)
    return model.eval()


def batch_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of inputs in each batch from now on."""
    found, inner = list[int](), Trunk.layers

    def counted(self: Trunk, modality: str, source: torch.Tensor, *rest: Any, **more: Any) -> list[torch.Tensor]:
        found.append(len(source))
        return inner(self, modality, source, *rest, **more)

    monkeypatch.setattr(Trunk, "layers", counted)
    return found


def test_batches_of_other_lengths_change_no_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = trunk(), batch_rows(monkeypatch)
    together = compute_features(model, reader(), ROWS, progress="", frames_of=2)
    assert counted == [len(ROWS)], "recordings of different lengths share a batch"
    monkeypatch.setattr(features, "BATCH_ROWS", 1)
    alone = compute_features(model, reader(), ROWS, progress="", frames_of=2)
    assert len(alone.layers) == 5
    for one, other in zip(together.layers, alone.layers, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for row, frames, mean in zip(ROWS, together.frames, together.layers[2], strict=True):
        assert len(frames) == model.config.modalities["audio"].num_tokens(SIZES[row])
        np.testing.assert_allclose(frames.mean(0), mean, rtol=1e-4, atol=1e-5)
    assert frame_bytes(reader(), ROWS, 32) == sum(4 * one.numel() for one in together.frames)


def test_modality_without_padding_has_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = batch_rows(monkeypatch)
    compute_features(trunk(), reader(can_be_whole=False), ROWS, progress="")
    assert counted == [2, 1, 1, 1, 1]


def test_batches_keep_below_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = batch_rows(monkeypatch)
    monkeypatch.setattr(features, "BATCH_TOKENS", 2 * reader().network.num_tokens(5200))
    compute_features(trunk(), reader(), ROWS, progress="")
    assert counted == [3, 2, 1]


def test_folders_are_joined_in_order() -> None:
    parts = [compute_features(trunk(), reader(), rows, progress="", frames_of=0) for rows in (ROWS[:2], ROWS[2:])]
    whole, joined = compute_features(trunk(), reader(), ROWS, progress="", frames_of=0), Features.join(parts)
    np.testing.assert_allclose(joined.layers[1], whole.layers[1], rtol=1e-4, atol=1e-5)
    assert [len(one) for one in joined.frames] == [len(one) for one in whole.frames]


def test_frames_that_do_not_fit_are_refused() -> None:
    check_memory(2**30, 1.0)
    with pytest.raises(ConfigError, match=r"take 2.00 GiB, expected at most 1; raise --memory-gib"):
        check_memory(2**31, 1.0)
