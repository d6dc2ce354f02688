"""Trunk and head in fine-tuning: masks, padding, stochastic depth, learning rates by layer, frozen steps."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch, Labels, SpanMasks
from d2v2ds.model.block import DropPath, drop_path_rates
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.encoding import MaskedFeatures, draw_kept_blocks
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig, parameter_groups
from tests.tasks.tiny import audio_batch, built, letters, trunk_of

VOCABULARY = ("|", "A", "B", "C")
ADAM = OptimConfig(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01)


def ctc(**changes: Any) -> CtcConfig:
    return CtcConfig(modality="audio", vocabulary=VOCABULARY, **changes)


def training_batch(*, masks: bool = True, lengths: tuple[int, ...] = (500, 320)) -> Batch:
    return audio_batch(lengths=lengths, labels=letters((5, 4, 6), (7, 4)), masks=masks)


# ---- masks ----


def test_masks_replace_tokens_then_zero_channels_of_all_tokens() -> None:
    local = torch.randn(2, 5, 4)
    time, channels = torch.rand(2, 5) < 0.5, torch.rand(2, 4) < 0.5
    masked = MaskedFeatures(0.3)
    noise = torch.randn(2, 5, 4)
    masked.noise = lambda like: noise  # type: ignore[method-assign]
    found = masked(local, SpanMasks(time=time, channels=channels))
    for b, t, d in [(b, t, d) for b in range(2) for t in range(5) for d in range(4)]:
        expected = noise if time[b, t] else local
        assert found[b, t, d] == (0 if channels[b, d] else expected[b, t, d])
    assert masked.eval()(local, SpanMasks(time=time)) is local
    assert masked.train()(local, None) is local


def test_noise_has_its_standard_deviation() -> None:
    local = torch.zeros(20, 50, 40)
    found = MaskedFeatures(0.25)(local, SpanMasks(time=torch.ones(20, 50, dtype=torch.bool)))
    assert float(found.std()) == pytest.approx(0.25, rel=0.02)


# ---- padding ----


def features(hide_padding: bool, lengths: tuple[int, ...]) -> Tensor:
    """Features of the first row at the tokens that it has when it is alone."""
    _, network = built(ctc(hide_padding=hide_padding))
    alone = audio_batch(lengths=lengths[:1])
    tokens = network.eval().encode(alone, None, False)[0].shape[1]
    return network.encode(audio_batch(lengths=lengths), None, False)[0][0, :tokens].detach()


def test_hidden_padding_changes_nothing_and_open_padding_does() -> None:
    for hide_padding, is_equal in ((True, True), (False, False)):
        alone, padded = features(hide_padding, (320,)), features(hide_padding, (320, 500))
        assert torch.allclose(alone, padded, atol=2e-6) is is_equal
    assert torch.equal(features(True, (320,)), features(False, (320,))), "a batch without padding is the same"


def test_length_of_padding_changes_nothing_where_it_is_hidden() -> None:
    torch.testing.assert_close(features(True, (320, 400)), features(True, (320, 900)), rtol=0, atol=2e-6)
    torch.testing.assert_close(features(True, (320, 400, 900)), features(True, (320, 900)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["mean", "linear_softmax", "max"])
def test_logits_of_a_recording_do_not_depend_on_its_batch(pooling: Any) -> None:
    config = ClassifyConfig(modality="audio", kind="several", num_outputs=3, head=FrameHeadConfig(pooling=pooling))
    _, network = built(config)
    network.eval()
    alone = network(audio_batch(lengths=(320,)))["logits"]
    together = network(audio_batch(lengths=(320, 900)))["logits"]
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=2e-6)


# ---- stochastic depth, layer drop ----


def official_rates(prenet: int, shared: int, rate: float) -> list[float]:
    """Second formula: a line over the shared depth, whose first values belong to the prenet."""

    def line(first: float, last: float, number: int) -> list[float]:
        return [first + (last - first) * i / max(number - 1, 1) for i in range(number)]

    spread = line(0.0, rate, shared)
    first = line(spread[0], spread[prenet - 1] if prenet else 0.0, prenet)
    return first + line(spread[prenet], spread[-1], shared)


@pytest.mark.parametrize(("prenet", "shared", "rate"), [(2, 10, 0.1), (0, 24, 0.2), (0, 3, 0.5), (1, 5, 0.3)])
def test_rates_of_stochastic_depth(prenet: int, shared: int, rate: float) -> None:
    assert drop_path_rates(prenet, shared, rate) == pytest.approx(official_rates(prenet, shared, rate))


def test_rates_of_the_published_base_image_model() -> None:
    rates = drop_path_rates(2, 10, 0.1)
    assert [round(rate, 4) for rate in rates] == [
        0, 0.0111, 0.0222, 0.0309, 0.0395, 0.0481, 0.0568, 0.0654, 0.0741, 0.0827, 0.0914, 0.1,
    ]  # fmt: skip


def test_drop_path_drops_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    path = DropPath()
    path.rate = 0.3
    branch = torch.randn(20_000, 2, 3)
    found = path(branch)
    factors = found / branch
    kept = factors[:, 0, 0] != 0
    torch.testing.assert_close(factors, (kept / 0.7)[:, None, None].expand_as(factors))
    assert abs(float(kept.float().mean()) - 0.7) < 4 * 0.46 / 20_000**0.5
    assert path.eval()(branch) is branch
    path.train().rate = 0.0
    assert path(branch) is branch


def test_network_has_the_rates_on_both_branches_of_its_blocks() -> None:
    _, network = built(ClassifyConfig(modality="image", drop_path=0.4))
    blocks = network.blocks("image")
    assert [block.mlp_drop_path.rate for block in blocks] == pytest.approx(official_rates(1, 2, 0.4))
    assert all(block.attention_drop_path.rate == block.mlp_drop_path.rate for block in blocks)


def test_layer_drop_is_the_same_for_the_same_step_and_seed() -> None:
    trunk = replace(trunk_of("audio"), layer_drop=0.4)
    config = ctc(prenet_layer_drop=0.2)
    drawn = [draw_kept_blocks(trunk, config, 1, step) for step in range(2000)]
    assert drawn == [draw_kept_blocks(trunk, config, 1, step) for step in range(2000)]
    assert drawn != [draw_kept_blocks(trunk, config, 2, step) for step in range(2000)]
    shares = torch.tensor(drawn).float().mean(0)
    for share, rate in zip(shares.tolist(), (0.2, 0.4, 0.4), strict=True):
        assert abs(share - (1 - rate)) < 4 * 0.5 / 2000**0.5
    assert draw_kept_blocks(trunk, config, 1, None) is None
    assert draw_kept_blocks(trunk_of("audio"), ctc(), 1, 5) is None


# ---- learning rates ----


@pytest.mark.parametrize("prenet_depth", [0, 1])
def test_learning_rates_fall_from_layer_to_layer(prenet_depth: int) -> None:
    task, network = built(
        ClassifyConfig(modality="image", layer_decay=0.65), trunk_of("image", prenet_depth=prenet_depth)
    )
    order = [*network.trunk.encoder("image").prenet.blocks, *network.trunk.blocks]
    scales = []
    for block in order:
        own = {id(parameter) for parameter in block.parameters()}
        found = {task.lr_scale(name) for name, parameter in network.named_parameters() if id(parameter) in own}
        assert len(found) == 1
        scales += found
    assert scales[-1] == pytest.approx(0.65)
    assert all(low / high == pytest.approx(0.65) for low, high in pairwise(scales))
    in_blocks = {id(parameter) for block in order for parameter in block.parameters()}
    assert {task.lr_scale(name) for name, p in network.named_parameters() if id(p) not in in_blocks} == {1.0}


@pytest.mark.parametrize("modality", ["audio", "image", "text"])
@pytest.mark.parametrize("freeze_steps", [0, 5])
def test_every_trained_parameter_is_in_one_group(modality: str, freeze_steps: int) -> None:
    config = ClassifyConfig(
        modality=modality, layer_decay=0.5, freeze_steps=freeze_steps, freeze=(r"trunk\.encoders\.\w+\.local\..*",)
    )
    task, network = built(config)
    groups = parameter_groups(network, task.lr_scale, task.held_steps)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in network.named_parameters() if p.requires_grad)
    assert len(set(grouped)) == len(grouped)
    assert not any(".local." in name for name in grouped) and any(".local." in name for name in names.values())
    assert len({group["name"] for group in groups}) == len(groups)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == task.lr_scale(name)
            assert group["held_steps"] == (0 if name.startswith("head.") else freeze_steps)


def test_what_is_below_the_blocks_has_the_smallest_rate_if_it_counts_as_one() -> None:
    trunk = trunk_of("image", prenet_depth=0)
    task, network = built(ClassifyConfig(modality="image", layer_decay=0.65, layer_decay_embeddings=True), trunk)
    below = {task.lr_scale(name) for name, _ in network.named_parameters() if name.startswith("trunk.encoders.")}
    assert sorted(below) == [pytest.approx(0.65 ** (trunk.depth("image") + 1))]
    assert task.lr_scale("trunk.blocks.0.norm1.weight") == pytest.approx(0.65 ** trunk.depth("image"))
    assert task.lr_scale("head.proj.weight") == 1.0


# ---- frozen steps ----


def trained(config: CtcConfig, steps: range, *, masks: bool = True) -> tuple[Any, Any]:
    """Network and optimizer after some steps."""
    task, network = built(config)
    groups = parameter_groups(network, task.lr_scale, task.held_steps)
    optimizer = EarlyEpsilonAdam(groups, lr=0.0, config=ADAM)
    run(task, network, optimizer, steps, masks=masks)
    return network, optimizer


def run(task: Any, network: nn.Module, optimizer: EarlyEpsilonAdam, steps: range, *, masks: bool = True) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["is_held"] = group["held_steps"] > step
            group["lr"] = 0.0 if group["is_held"] else 0.003 * group["lr_scale"]
        losses = task.losses(network.train(), training_batch(masks=masks), step)
        optimizer.zero_grad()
        (losses.sums["ctc"] / losses.count).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["is_held"] else ():
                assert parameter.grad is None, "the encoder runs without gradient"
                parameter.grad = torch.zeros_like(parameter)  # as the engine fills them
        optimizer.step()


@pytest.mark.parametrize("hide_padding", [True, False])
def test_the_encoder_stays_as_it_is_and_the_head_learns_while_frozen(hide_padding: bool) -> None:
    config = ctc(freeze_steps=3, hide_padding=hide_padding)
    before = built(config)[1].state_dict()
    network, _ = trained(config, range(3))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("trunk."), name


@pytest.mark.parametrize("hide_padding", [True, False])
def test_held_parameters_continue_as_if_the_optimizer_began_at_their_release(hide_padding: bool) -> None:
    config = ctc(freeze_steps=3, hide_padding=hide_padding)
    network, _ = trained(config, range(3))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network, optimizer = trained(config, range(5))
    task, fresh = built(config)
    fresh.load_state_dict(state)
    groups = parameter_groups(fresh, task.lr_scale, task.held_steps)
    other = EarlyEpsilonAdam(groups, lr=0.0, config=ADAM)
    head, _ = trained(config, range(4))  # the head is older; only the first step after release starts alike
    run(task, fresh, other, range(3, 4))
    for name, value in fresh.state_dict().items():
        if name.startswith("trunk."):
            assert torch.equal(value, head.state_dict()[name]), name
    counts = {group["name"]: int(optimizer.state[group["params"][0]]["step"]) for group in optimizer.param_groups}
    assert sorted(counts.values()) == [2, 5]


def test_filled_frozen_steps_count_as_steps() -> None:
    task, network = built(ctc(freeze_steps=3, fill_frozen=True))
    assert {task.held_steps(name) for name, _ in network.named_parameters()} == {0}
    assert [task.is_frozen(step) for step in (0, 2, 3, None)] == [True, True, False, False]


# ---- front end, recomputation ----


def gradients(config: Any, batch: Batch, trunk: Any = None, *, checkpointing: bool = False) -> dict[str, Tensor | None]:
    task, network = built(config, trunk, checkpointing=checkpointing)
    torch.manual_seed(4)
    losses = task.losses(network.train(), batch, 0)
    torch.stack(list(losses.sums.values())).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("factor", [0.0, 0.4])
def test_gradient_of_the_convolutions_alone_is_scaled(factor: float) -> None:
    whole = gradients(ctc(), training_batch())
    found = gradients(ctc(), training_batch(), trunk_of("audio", conv_gradient=factor))
    convolutions = [name for name in whole if ".local.convs." in name]
    assert len(convolutions) == 9
    for name, wanted in whole.items():
        assert wanted is not None
        if name not in convolutions:
            torch.testing.assert_close(found[name], wanted)
        elif factor:
            torch.testing.assert_close(found[name], factor * wanted)
        else:
            assert found[name] is None


CONFIGS = {
    "audio": ctc(mask_noise_std=0.0),
    "image": ClassifyConfig(modality="image", num_outputs=3, head=PatchHeadConfig(), drop_path=0.5),
    "text": ClassifyConfig(modality="text", num_outputs=3, head=SentenceHeadConfig()),
}


@pytest.mark.parametrize("modality", CONFIGS)
def test_recomputed_activations_give_the_same_gradients(modality: str) -> None:
    batch = training_batch()
    if modality != "audio":
        sources = {"image": torch.rand(2, 3, 16, 16), "text": torch.randint(4, 40, (2, 9))}
        labels = Labels(values=torch.tensor([2, 0]))
        batch = Batch(modality=modality, source=sources[modality], ids=torch.arange(2), labels=labels)
    plain = gradients(CONFIGS[modality], batch)
    again = gradients(CONFIGS[modality], batch, checkpointing=True)
    assert plain.keys() == again.keys()
    for name, wanted in plain.items():
        torch.testing.assert_close(again[name], wanted, rtol=0, atol=0, msg=name)
