"""MAE: published sizes, initialisation, targets, several masks, refusals and metrics."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.config.load import load_config, read_config
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.local import normalise_pixels
from d2v2ds.model.pixel_decoder import PixelDecoderConfig
from d2v2ds.model.positions import sin_cos_grid
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.mae import Mae, MaeConfig, MaeModality, MaeOutput, patch_targets
from d2v2ds.objectives.protocol import Totals
from tests.model.tiny_joint import joint_batch, joint_trunk_config

MASK = MaskConfig(masked_fraction=0.5, num_masks=2, kind="random")
DECODER = PixelDecoderConfig(width=8, depth=2, num_heads=2)


def trunk_config(**image: Any) -> TrunkConfig:
    """The tiny trunk of images alone, with pre-norm blocks."""
    joint = joint_trunk_config(prenet_depth=0)
    settings = replace(joint.modalities["image"], has_extra_positions=True, **image)
    return replace(joint, block=replace(joint.block, pre_norm=True), modalities={"image": settings})


def objective(trunk: TrunkConfig | None = None, **own: Any) -> Mae:
    modality = MaeModality(**{"mask": MASK, "decoder": DECODER} | own)
    return MaeConfig(modalities={"image": modality}).build(trunk or trunk_config(), seed=0)


def network_of(mae: Mae, *, activation_checkpointing: bool = False) -> Any:
    network = mae.build_network(activation_checkpointing=activation_checkpointing)
    mae.initialise(network, seed=0)
    return network


@pytest.mark.parametrize(
    ("name", "whole", "trained", "decoder", "entries"),
    [
        ("base", 111_907_840, 111_655_680, 26_109_184, 254),
        ("large", 329_541_888, 329_239_296, 26_240_256, 398),
        ("huge14", 657_074_508, 656_613_964, 26_309_708, 494),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, whole: int, trained: int, decoder: int, entries: int
) -> None:
    config = load_config(f"mae/{name}")
    with torch.device("meta"):
        network = config.objective.build(config.model, seed=1).build_network(activation_checkpointing=False)
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == whole
    assert sum(p.numel() for p in parameters if p.requires_grad) == trained
    assert sum(p.numel() for p in network.decoders.parameters()) == decoder
    assert len(network.state_dict()) == entries


def test_initialisation_follows_the_official_rules() -> None:
    mae = objective(replace(trunk_config(), block=replace(trunk_config().block, width=128)))
    network = mae.build_network(activation_checkpointing=False)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(7.0)
    mae.initialise(network, seed=0)
    image, block, decoder = network.trunk.encoders["image"], network.trunk.blocks[0], network.decoders["image"]
    for linear in (block.attn.qkv, block.mlp.fc1, decoder.embed, decoder.proj, decoder.blocks[0].attn.proj):
        limit = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert 0.9 * limit < linear.weight.abs().max().item() <= limit
        assert linear.bias.abs().max() == 0
    patch_limit = (6 / (128 + 3 * 16)) ** 0.5
    assert 0.9 * patch_limit < image.local.proj.weight.abs().max().item() <= patch_limit
    assert image.local.proj.bias.abs().max() > 0
    assert image.extra.tokens.std().item() == pytest.approx(0.02, rel=0.3)
    assert 0 < decoder.mask_token.vector.abs().max() < 0.1
    assert (network.trunk.norm.weight == 1).all() and (decoder.norm.bias == 0).all()
    for table, width in ((image.fixed_positions.table, 128), (decoder.fixed_positions.table, 8)):
        assert not table.requires_grad
        assert table[0, 0].abs().max() == 0
        torch.testing.assert_close(table[0, 1:].detach(), sin_cos_grid(width, 4))
    assert not any((p == 7.0).any() for p in network.parameters())


def test_a_patch_has_the_order_row_column_colour() -> None:
    network = ImageNetwork(prenet_depth=0, image_size=6, patch_size=2)
    source = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).float()
    found = network.patches(source)
    assert found.shape == (2, 9, 12) and network.patch_numbers == 12
    wanted = [source[1, k, 2 + y, 4 + x] for y in range(2) for x in range(2) for k in range(3)]
    assert torch.equal(found[1, 5], torch.stack(wanted))  # second row of patches, third column
    raw = torch.randint(0, 256, (1, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(network.patches(raw), network.patches(normalise_pixels(raw, torch.float32)))


def test_normalised_patches_have_unbiased_variance_one() -> None:
    patches = torch.randn(2, 5, 12) * 3 + 1
    assert patch_targets(patches, normalised=False) is patches
    found = patch_targets(patches, normalised=True)
    torch.testing.assert_close(found.mean(-1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.var(-1, correction=1), torch.ones(2, 5))
    assert patch_targets(torch.ones(1, 1, 12), normalised=True).abs().max() == 0


def of_mask(batch: Batch, number: int) -> Batch:
    """The same images with one of their masks."""
    masks = batch.required_masks()
    one = MaskSet(keep=masks.keep[:, number : number + 1], masked=masks.masked[:, number : number + 1])
    return replace(batch, masks=one, num_masked=int(one.masked.sum()))


def test_several_masks_sum_what_each_gives() -> None:
    network, batch = network_of(objective()), joint_batch("image", 3)
    both, single = network(batch), [network(of_mask(batch, number)) for number in (0, 1)]
    total = sum(out["losses"]["regression"] for out in single)
    torch.testing.assert_close(both["losses"]["regression"], total)
    assert both["pred"].shape == both["wanted"].shape == (batch.num_masked, 48)


def test_loss_is_the_mean_square_of_masked_patches_and_visible_ones_get_no_gradient() -> None:
    network, batch = network_of(objective(normalise_pixels=False)), of_mask(joint_batch("image", 4), 0)
    held: list[torch.Tensor] = []

    def hold(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        held.append(out)

    network.decoders["image"].register_forward_hook(hold)
    out: MaeOutput = network(batch)
    _, masked = batch.required_masks().rows()
    error = (out["decoded"] - network.settings["image"].patches(batch.source)).square().mean(-1)  # (B, T)
    torch.testing.assert_close(out["losses"]["regression"].detach(), error[masked].sum())
    out["losses"]["regression"].backward()
    grad = held[0].grad
    assert grad is not None
    assert grad[~masked].abs().max() == 0 and (grad[masked].abs().amax(-1) > 0).all()


def test_order_of_the_visible_patches_changes_nothing() -> None:
    network, batch = network_of(objective()), joint_batch("image", 5)
    masks = batch.required_masks()
    shuffled = replace(batch, masks=replace(masks, keep=masks.keep.flip(-1)))
    torch.testing.assert_close(network(batch)["decoded"], network(shuffled)["decoded"])


def test_activation_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        network = network_of(objective(), activation_checkpointing=checkpointing)
        network(joint_batch("image", 6))["losses"]["regression"].backward()
        grads.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_every_parameter_but_the_tables_learns() -> None:
    network = network_of(objective())
    network(joint_batch("image", 7))["losses"]["regression"].backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without == {"trunk.encoders.image.fixed_positions.table", "decoders.image.fixed_positions.table"}


def test_layer_drop_is_drawn_in_training_alone() -> None:
    mae = objective(replace(trunk_config(), layer_drop=0.6))
    network, batch = network_of(mae), joint_batch("image", 8)
    outs = [mae.losses(network, batch, step).sums["regression"].item() for step in (None, *range(6))]
    assert outs[0] == mae.losses(network, batch, None).sums["regression"].item()
    assert any(value != outs[0] for value in outs[1:])


def test_metrics_and_health_vectors() -> None:
    mae = objective()
    network, batch = network_of(mae), joint_batch("image", 9)
    losses = mae.losses(network, batch, 0)
    assert losses.count == mae.count(batch) == batch.num_masked
    totals = Totals({name: value.item() for name, value in losses.sums.items()}, losses.count, losses.statistics)
    found = mae.metrics("image", totals)
    out: MaeOutput = losses.output
    assert found["mask/fraction"] == 0.5
    assert found["target/std"] == pytest.approx(out["wanted"].std(0).mean().item(), rel=1e-3)
    variance = out["wanted"].var(0).mean().item()
    mean_loss = losses.sums["regression"].item() / batch.num_masked
    assert found["target/explained"] == pytest.approx(1 - mean_loss / variance, rel=1e-4)
    for vectors in (*mae.health_vectors(batch, losses), *mae.held_out_vectors(batch, losses)):
        assert len(vectors.vectors) == len(vectors.positions)
    assert mae.build_teacher_network() is None and mae.schedules(3) == {} and mae.run_metrics() == {}
    assert mae.describe("image", 16) == "2 masks of 8 masked and 8 visible tokens"


def test_operations_are_those_of_every_matrix_product() -> None:
    """Count the products of one forward by hand; backward takes twice as many."""
    width, tokens, visible, dec = 16, 16, 8, 8
    block = lambda d, n: n * (2 * d * (4 * d + 8 * d) + 4 * n * d)  # noqa: E731
    rows = 3 * 2  # three images, two masks
    forward = 3 * tokens * 2 * 48 * width + rows * (
        2 * block(width, visible + 1)
        + 2 * (visible + 1) * width * dec
        + 2 * block(dec, tokens + 1)
        + 2 * (tokens + 1) * dec * 48
    )
    assert objective().flops("image", 3, 16) == pytest.approx(3 * forward)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("decoder.num_heads=5", "decoder: width 128 is not divisible by num_heads 5"),
        ("decoder={width: 6, depth: 1, num_heads: 2}", "decoder: width 6 is not divisible by 4"),
        ("mask.kind=spans", "objective.modalities.image.mask.kind: "),
        ("mask={kind: spans, fraction: 0.5, length: 2}", "objective.modalities.image.mask"),
        ("mask={kind: blocks, masked: 10}", "objective.modalities.image.mask"),
        ("mask.masked_fraction=1.5", "objective.modalities.image.mask.masked_fraction"),
        ("loss={beta: 1}", "loss"),
        ("mask={masked_fraction: 0.5, num_masks: 1, kind: block_2d, columns: 2}", "mask.columns is 2, the network has"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override: str, said: str) -> None:
    _, problems = read_config("mae/tiny", [f"objective.modalities.image.{override}"])
    assert any(said in problem for problem in problems), problems


def test_relative_positions_are_refused() -> None:
    _, problems = read_config("mae/tiny", ["model.modalities.image.positions=relative"])
    assert any("relative positions, which need all patches" in problem for problem in problems)


def test_a_modality_without_patches_is_refused_by_name() -> None:
    joint = joint_trunk_config()
    own = MaeModality(mask=MASK, decoder=DECODER)
    config = MaeConfig(modalities={"text": own})
    (problem,) = config.check(replace(joint, modalities={"text": joint.modalities["text"]}))
    assert problem.startswith("modalities.text: ") and "without patches" in problem


@pytest.mark.parametrize("override", ["mask.num_masks=8", "mask={masked_fraction: 0.8, num_masks: 4, kind: block_2d}"])
def test_several_masks_and_blocks_are_allowed(override: str) -> None:
    config = load_config("mae/tiny", ["data.shards=x", f"objective.modalities.image.{override}"])
    assert config.objective.modalities["image"].mask.num_masks in (4, 8)
