"""The trunk as a whole: what a visible token may depend on, padding, and features of unmasked input."""

from dataclasses import replace

import pytest
import torch

from d2v2ds.batch import MaskSet
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.shapes import AUDIO_CONV_LAYERS, PAD_ID, conv_output_length
from tests.model.tiny import CONV_LAYERS, tiny_batch, tiny_trunk_config
from tests.model.tiny_joint import joint_batch, joint_trunk_config


def built(config: TrunkConfig, seed: int = 3) -> Trunk:
    """A trunk in eval mode with the weights that a run starts from."""
    trunk = Trunk(config)
    initialise(trunk_parts(trunk), seed)
    return trunk.eval()


@pytest.mark.parametrize("samples, frames", [(399, 0), (400, 1), (719, 1), (720, 2), (16000, 49), (320000, 999)])
def test_frame_counts_use_the_floor_of_every_layer(samples: int, frames: int) -> None:
    assert conv_output_length(samples, AUDIO_CONV_LAYERS) == frames


def test_masked_audio_does_not_reach_the_visible_tokens() -> None:
    """Changing the local features at places masked in every row changes no context feature."""
    batch = tiny_batch(num_masks=1)
    trunk = built(tiny_trunk_config())
    _, masked = batch.required_masks().rows()
    with torch.no_grad():
        local = trunk.embed(batch)
        changed = torch.where(masked[..., None], torch.full_like(local, 50.0), local)
        before, after = trunk.encode_visible(local, batch), trunk.encode_visible(changed, batch)
        torch.testing.assert_close(before, after)
        visible = torch.where(masked[..., None], local, local + 1.0)
        assert not torch.allclose(before, trunk.encode_visible(visible, batch)), "the check itself must be able to fail"


def test_padded_tokens_are_not_attended_to() -> None:
    config = tiny_trunk_config()
    torch.manual_seed(0)
    trunk = Trunk(config, with_local={"audio": False}).eval()
    batch = tiny_batch(seconds_of_padding=True)
    encoder = trunk.encoder("audio")
    length = batch.required_masks().num_tokens
    padding = encoder.token_padding(batch.padding, length)
    assert padding is not None
    assert padding.sum(1).tolist() == [length - conv_output_length(400, CONV_LAYERS)] * 2
    order = torch.arange(length)[None]
    x = torch.randn(2, length, config.block.width)
    noisy = torch.where(padding[..., None], x + 30.0, x)
    outputs = []
    for found in (padding, None):
        bias = encoder.biases(order, found, 1)[0]
        with torch.no_grad():
            outputs.append([trunk.blocks[0](tokens, bias)[0][~padding] for tokens in (x, noisy)])
    torch.testing.assert_close(*outputs[0])
    assert not torch.allclose(*outputs[1]), "without the padding mask the noise must show"


def test_rows_are_sample_major() -> None:
    batch = tiny_batch(samples=2, num_masks=3)
    trunk = built(tiny_trunk_config())
    masks = batch.required_masks()
    one = replace(
        batch,
        source=batch.source[1:],
        ids=batch.ids[1:],
        masks=MaskSet(keep=masks.keep[1:], masked=masks.masked[1:]),
        num_masked=batch.num_masked // 2,
    )
    with torch.no_grad():
        both = trunk.encode_visible(trunk.embed(batch), batch)
        alone = trunk.encode_visible(trunk.embed(one), one)
    torch.testing.assert_close(both[3:], alone)


@pytest.mark.parametrize("filled", [0.0, 7.0])
def test_features_of_a_padded_batch_are_those_of_each_recording_alone(filled: float) -> None:
    trunk = built(tiny_trunk_config())
    source, short = tiny_batch(length=800).source, 503
    padding = torch.zeros(2, 800, dtype=torch.bool)
    padding[1, short:] = True
    with torch.no_grad():
        alone = trunk.layers("audio", source[1:, :short])
        both = trunk.layers("audio", source.masked_fill(padding, filled), padding)
    tokens = alone[0].shape[1]
    assert tokens < both[0].shape[1]
    for padded, single in zip(both, alone, strict=True):
        torch.testing.assert_close(padded[1:, :tokens], single, rtol=0, atol=1e-5)


def test_features_of_a_padded_text_are_those_of_the_text_alone() -> None:
    trunk = built(joint_trunk_config())
    ids = joint_batch("text", seed=0).source
    ids[1, 12:] = PAD_ID
    with torch.no_grad():
        both, alone = trunk.layers("text", ids, ids == PAD_ID), trunk.layers("text", ids[1:, :12])
    for padded, single in zip(both, alone, strict=True):
        torch.testing.assert_close(padded[1:, :12], single, rtol=0, atol=1e-5)
