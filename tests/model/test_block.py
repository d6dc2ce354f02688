"""Kinds of blocks against the same arithmetic written out, and the learned attention bias of pairs of patches."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.attention import AttentionPath, attend
from d2v2ds.model.block import Block, BlockConfig, TargetLayer
from d2v2ds.model.flops import block_flops
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.positions import RelativePositions
from d2v2ds.model.trunk import Trunk, TrunkConfig
from tests.model.tiny import tiny_batch, tiny_trunk_config

WIDTH, HEADS = 16, 4
PLAIN = BlockConfig(width=WIDTH, num_heads=HEADS, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0)
TARGETS: tuple[TargetLayer, ...] = ("attention", "feed_forward", "feed_forward_residual", "block")


def random_block(config: BlockConfig) -> Block:
    torch.manual_seed(3)
    block = Block(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


def attention_by_hand(block: Block, x: Tensor) -> Tensor:
    weight = block.attn.qkv.weight
    if block.attn.qkv.bias is not None:
        bias = block.attn.qkv.bias
    else:
        bias = torch.cat((block.attn.bias.queries, torch.zeros(WIDTH), block.attn.bias.values))
    q, k, v = (x @ weight.T + bias).chunk(3, dim=-1)
    size, heads = WIDTH // HEADS, []
    for h in range(HEADS):
        own = slice(h * size, (h + 1) * size)
        heads.append((q[..., own] @ k[..., own].transpose(1, 2) / size**0.5).softmax(-1) @ v[..., own])
    mixed = torch.cat(heads, dim=-1)
    if hasattr(block.attn, "gate"):
        mixed = mixed / (1 + torch.exp(-(x @ block.attn.gate.weight.T + block.attn.gate.bias)))
    return mixed @ block.attn.proj.weight.T + block.attn.proj.bias


def block_by_hand(block: Block, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and targets by name."""

    def mlp(value: Tensor) -> Tensor:
        hidden = value @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

    def norm(layer: nn.LayerNorm, value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        return centred / deviation * layer.weight + layer.bias

    scales = [block.attention_scale.factors, block.mlp_scale.factors] if hasattr(block, "attention_scale") else [1, 1]
    if block.pre_norm:
        a = scales[0] * attention_by_hand(block, norm(block.norm1, x))
        x = x + a
        t = scales[1] * mlp(norm(block.norm2, x))
        out = u = x + t
    else:
        a = scales[0] * attention_by_hand(block, x)
        x = norm(block.norm1, x + a)
        t = scales[1] * mlp(x)
        u = x + t
        out = norm(block.norm2, u)
    return out, {"attention": a, "feed_forward": t, "feed_forward_residual": u, "block": out}


@pytest.mark.parametrize(
    ("pre_norm", "layer_scale", "key_bias", "gate"),
    list(itertools.product((False, True), (None, 0.1), (True, False), (False, True))),
)
def test_block_equals_its_arithmetic(pre_norm: bool, layer_scale: float | None, key_bias: bool, gate: bool) -> None:
    config = dataclasses.replace(
        PLAIN, pre_norm=pre_norm, layer_scale=layer_scale, key_bias=key_bias, attention_gate=gate
    )
    block = random_block(config)
    x = torch.randn(2, 5, WIDTH)
    expected, targets = block_by_hand(block, x)
    for target in TARGETS:
        out, found = block(x, None, target)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, targets[target], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x, None)[1], targets["feed_forward"], rtol=1e-4, atol=1e-5)


def test_bias_of_the_keys_changes_nothing() -> None:
    with_key = random_block(PLAIN)
    without = random_block(dataclasses.replace(PLAIN, key_bias=False))
    state = with_key.state_dict()
    queries, _, values = state.pop("attn.qkv.bias").chunk(3)
    without.load_state_dict(state | {"attn.bias.queries": queries, "attn.bias.values": values})
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(without(x, None)[0], with_key(x, None)[0], rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in with_key.parameters()) - sum(p.numel() for p in without.parameters()) == WIDTH


@pytest.mark.parametrize("target", TARGETS)
def test_teacher_reads_the_layer_that_targets_name(target: TargetLayer) -> None:
    config = tiny_trunk_config()
    trunk = Trunk(config).eval()
    initialise(trunk_parts(trunk), seed=1)
    batch = tiny_batch()
    local = trunk.embed(batch)
    x, biases = trunk.encoder("audio").all_tokens(local, None, 3)
    x, _ = trunk.encoder("audio").prenet.blocks[0](x, biases[0])
    for i, block in enumerate(trunk.blocks):
        x, expected = block(x, biases[i + 1], target)
        assert torch.equal(trunk.target_layers(batch, local, target)[i], expected)


def test_pre_norm_trunk_ends_with_its_norm_and_begins_without_one() -> None:
    config = tiny_trunk_config()
    config = dataclasses.replace(config, block=dataclasses.replace(config.block, pre_norm=True))
    trunk = Trunk(config).eval()
    initialise(trunk_parts(trunk), seed=1)
    nn.init.normal_(trunk.norm.weight)
    batch = tiny_batch()
    local = trunk.embed(batch)
    encoder = trunk.encoder("audio")
    assert not list(encoder.prenet.norm.parameters())
    x, biases = encoder.all_tokens(local, None, 3)
    for block, bias in zip([*encoder.prenet.blocks, *trunk.blocks], biases, strict=True):
        x, _ = block(x, bias)
    expected = F.layer_norm(x, (x.shape[-1],), trunk.norm.weight, trunk.norm.bias, config.block.norm_eps)
    torch.testing.assert_close(trunk.encode_all(local, batch), expected)
    torch.testing.assert_close(trunk.layers("audio", batch.source)[-1], expected)
    torch.testing.assert_close(trunk.layers("audio", batch.source, depth=2)[-1], trunk.layers("audio", batch.source)[2])
    assert not torch.allclose(trunk.target_layers(batch, local, "block")[-1], expected)
    # the visible tokens of a mask that hides nothing are all tokens
    keep = torch.arange(local.shape[1]).expand(2, 1, -1)
    masks = dataclasses.replace(
        batch.required_masks(), keep=keep.contiguous(), masked=torch.zeros_like(keep, dtype=torch.bool)
    )
    whole = dataclasses.replace(batch, masks=masks)
    torch.testing.assert_close(trunk.encode_visible(local, whole), expected, rtol=1e-4, atol=1e-5)


def test_pre_norm_trunk_may_end_without_its_norm() -> None:
    config = tiny_trunk_config()
    config = dataclasses.replace(config, block=dataclasses.replace(config.block, pre_norm=True))
    trunk, bare = Trunk(config).eval(), Trunk(dataclasses.replace(config, final_norm=False)).eval()
    initialise(trunk_parts(trunk), seed=1)
    assert trunk.state_dict().keys() - bare.state_dict().keys() == {"norm.weight", "norm.bias"}
    bare.load_state_dict({name: value for name, value in trunk.state_dict().items() if name in bare.state_dict()})
    batch = tiny_batch()
    without = bare.encode_all(bare.embed(batch), batch)
    torch.testing.assert_close(trunk.norm(without), trunk.encode_all(trunk.embed(batch), batch))
    (problem,) = dataclasses.replace(tiny_trunk_config(), final_norm=False).check()
    assert problem.startswith("final_norm is false")


# ------------------------------------------------------------------ relative positions


def random_table(rows: int, columns: int, layers: int | None = None) -> RelativePositions:
    positions = RelativePositions(rows, columns, HEADS, layers)
    nn.init.normal_(positions.table)
    return positions


def test_relative_positions_are_the_table_at_the_offset_of_two_patches() -> None:
    rows, columns = 3, 2
    positions = random_table(rows, columns, layers=2)
    bias = positions()
    count = 1 + rows * columns
    assert bias.shape == (2, HEADS, count, count)
    table = positions.table
    assert table.shape == (2, 5 * 3 + 3, HEADS)
    for query, key in itertools.product(range(count), repeat=2):
        if query and key:
            (r, c), (r2, c2) = divmod(query - 1, columns), divmod(key - 1, columns)
            row = (r - r2 + rows - 1) * (2 * columns - 1) + (c - c2 + columns - 1)
        elif key:
            row = 15  # CLS as query
        elif query:
            row = 16  # CLS as key
        else:
            row = 17
        assert torch.equal(bias[:, :, query, key], table[:, row])


@pytest.mark.parametrize("path", ["auto", "explicit", "rowwise", "sdpa", "flex"])
def test_every_path_adds_the_table_and_gives_it_a_gradient(path: AttentionPath) -> None:
    side = 3
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, HEADS, 1 + side * side, 16)  # flex needs a head width of 16
    trunk = image_trunk(path=path)
    encoder = trunk.encoder("image")
    nn.init.normal_(encoder.relative.table)
    table = encoder.relative()[0]
    expected = (q @ k.transpose(2, 3) / 4 + table).softmax(-1) @ v
    wanted = torch.autograd.grad(expected.square().sum(), encoder.relative.table)[0]
    with torch.set_grad_enabled(path != "flex"):  # without a compiler its backward takes no bias with gradient
        bias = encoder.biases(torch.arange(side * side)[None], None, 2)[0]
        found = attend(q, k, v, bias, path=path)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if path != "flex":
        gradient = torch.autograd.grad(found.square().sum(), encoder.relative.table)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def image_trunk(*, path: AttentionPath = "auto", per_block: bool = False) -> Trunk:
    network = ImageNetwork(
        prenet_depth=0, image_size=12, patch_size=4, positions="relative", relative_per_block=per_block
    )
    block = dataclasses.replace(PLAIN, pre_norm=True, layer_scale=0.1, key_bias=False, attention_path=path)
    trunk = Trunk(TrunkConfig(block=block, shared_depth=2, modalities={"image": network})).eval()
    initialise(trunk_parts(trunk), seed=1)
    return trunk


def test_every_block_has_its_own_table_if_asked() -> None:
    shared, own = image_trunk(), image_trunk(per_block=True)
    nn.init.normal_(shared.encoder("image").relative.table)
    state = shared.state_dict()
    name = "encoders.image.relative.table"
    own.load_state_dict(state | {name: state[name].repeat(2, 1, 1)})
    source = torch.randn(2, 3, 12, 12)
    expected = shared.layers("image", source)[-1]
    torch.testing.assert_close(own.layers("image", source)[-1], expected)
    with torch.no_grad():
        own.encoder("image").relative.table[1] += torch.randn(28, HEADS)
    torch.testing.assert_close(own.layers("image", source)[1], shared.layers("image", source)[1])
    assert not torch.allclose(own.layers("image", source)[-1], expected)


def test_relative_positions_refuse_removed_tokens() -> None:
    trunk = image_trunk()
    masks = tiny_batch(length=230).required_masks()
    batch = Batch(modality="image", source=torch.randn(2, 3, 12, 12), ids=torch.arange(2), masks=masks)
    with pytest.raises(ValueError, match="relative positions need all tokens"):
        trunk.encode_visible(trunk.embed(batch), batch)


def test_relative_positions_need_one_extra_token() -> None:
    network = ImageNetwork(prenet_depth=0, positions="relative", num_extra_tokens=0)
    assert network.check(PLAIN, 2) == ["positions 'relative' need num_extra_tokens 1 (CLS), found 0"]


def test_operations_of_the_gate_are_counted() -> None:
    gated = dataclasses.replace(PLAIN, attention_gate=True)
    found = block_flops(gated, depth=3, rows=2, tokens=7) - block_flops(PLAIN, depth=3, rows=2, tokens=7)
    assert found == 3 * 2 * 7 * 2 * WIDTH**2


@pytest.mark.parametrize(
    "settings", [{"relative_per_block": True}, {"positions": "relative", "has_extra_positions": True}]
)
def test_settings_of_other_positions_are_refused(settings: dict[str, Any]) -> None:
    (problem,) = ImageNetwork(prenet_depth=0, **settings).check(PLAIN, 2)
    assert "have no such setting; set it to false" in problem


def test_images_of_another_size_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected 9 tokens, a grid of 3 x 3 patches, found 16"):
        image_trunk().layers("image", torch.randn(1, 3, 16, 16))


def test_drawn_factors_and_biases_have_their_first_values() -> None:
    trunk = image_trunk()
    block = trunk.blocks[0]
    assert torch.equal(block.attention_scale.factors, torch.full((WIDTH,), 0.1))  # type: ignore[union-attr]
    assert not trunk.encoder("image").relative.table.any()
    assert not block.attn.bias.queries.any()  # type: ignore[union-attr]
    assert torch.equal(trunk.norm.weight, torch.ones(WIDTH))
