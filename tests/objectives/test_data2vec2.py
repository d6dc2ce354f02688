"""data2vec 2.0 as a whole: published sizes, initialisation, and one forward of student and teacher."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.config.load import load_config, read_config
from d2v2ds.objectives.data2vec2 import Data2Vec2, Data2Vec2Network, StudentOutput
from d2v2ds.objectives.flops import step_flops
from tests.model.tiny import tiny_batch, tiny_trunk_config
from tests.objectives.tiny import tiny_objective_config


def _objective(name: str) -> Data2Vec2:
    config = load_config(name)
    return config.objective.build(config.model, seed=1)


@pytest.mark.parametrize(
    "name, student, decoder, teacher",
    [
        ("audio_base", 93_783_308, 619_776, 88_561_932),
        ("audio_large", 315_184_144, 1_908_736, 308_542_480),
        ("image_base", 88_383_744, 2_585_856, 85_797_888),
        ("image_large", 309_268_480, 5_967_872, 303_300_608),
        ("image_huge14", 637_403_392, 6_639_872, 630_763_520),
        ("image_huge16", 637_556_992, 6_639_872, 630_917_120),
        ("text_base", 152_961_792, 28_907_520, 85_054_464),
        ("text_large", 385_379_584, 31_070_464, 302_309_376),
        ("text_large_1m", 385_379_584, 31_070_464, 302_309_376),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, student: int, decoder: int, teacher: int) -> None:
    objective = _objective(name)
    with torch.device("meta"):
        network = objective.build_network(activation_checkpointing=False)
        teacher_network = objective.build_teacher_network()
    assert sum(p.numel() for p in network.parameters()) == student
    assert sum(p.numel() for p in network.decoders.parameters()) == decoder
    assert sum(p.numel() for p in teacher_network.parameters()) == teacher
    assert set(dict(teacher_network.named_parameters())) < set(dict(network.named_parameters()))


@pytest.mark.parametrize(
    "name, size, num_masks, visible, total",
    [("audio_base", 160_000, 8, 250, 1.42e12), ("audio_large", 80_000, 12, 113, 2.88e12)],
)
def test_flops_are_those_of_the_measured_cases(
    name: str, size: int, num_masks: int, visible: int, total: float
) -> None:
    objective = _objective(name)
    own = objective.config.modalities["audio"]
    found = step_flops(
        objective.trunk,
        "audio",
        decoder=own.decoder,
        share_local_encoder=own.share_local_encoder,
        num_samples=1,
        size=size,
        num_masks=num_masks,
        visible=visible,
    )
    assert found.total == pytest.approx(total, rel=2e-3)


def _built(*, share_local_encoder: bool = True, width: int = 16, dropout: float = 0.0) -> Data2Vec2:
    """The objective of the tiny speech model."""
    trunk = tiny_trunk_config(width)
    trunk = replace(trunk, block=replace(trunk.block, attention_dropout=dropout, mlp_dropout=dropout))
    return tiny_objective_config(share_local_encoder=share_local_encoder).build(trunk, seed=0)


def test_initialisation_follows_the_table() -> None:
    torch.manual_seed(0)
    objective = _built(width=128)
    network = objective.build_network(activation_checkpointing=False)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(7.0)
    audio, decoder = network.trunk.encoders["audio"], network.decoders["audio"]
    audio.alibi.scale.data.fill_(1.0)
    objective.initialise(network, seed=0)
    fan_in = 128
    qkv, project = network.trunk.blocks[0].attn.qkv, audio.local.project
    assert qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert qkv.bias.abs().max() == 0
    assert project.weight.abs().max().item() <= 1 / project.in_features**0.5
    assert project.bias.abs().max() > 0
    conv = audio.local.convs.layers[1].conv
    wanted = (2 / (conv.in_channels * conv.kernel_size[0])) ** 0.5
    assert conv.weight.std().item() == pytest.approx(wanted, rel=0.1)
    assert (network.trunk.blocks[0].norm1.weight == 1).all()
    assert decoder.proj.weight.abs().max().item() <= 1 / decoder.proj.in_features**0.5
    assert not any((p == 7.0).any() for p in network.parameters()), f"a parameter of fan-in {fan_in} was not drawn"


def _forward(
    objective: Data2Vec2, batch: Batch, *, kept_blocks: list[bool] | None = None, activation_checkpointing: bool = False
) -> tuple[Data2Vec2Network, StudentOutput]:
    torch.manual_seed(0)
    network = objective.build_network(activation_checkpointing=activation_checkpointing)
    teacher = objective.build_teacher_network().eval()
    torch.manual_seed(1)
    return network, network(batch, torch.no_grad()(teacher.__call__), kept_blocks)


def _backward(out: StudentOutput) -> None:
    torch.stack(list(out["losses"].values())).sum().backward()


def test_activation_checkpointing_changes_nothing() -> None:
    objective = _built(dropout=0.2)
    grads = []
    for checkpointing in (False, True):
        network, out = _forward(objective, tiny_batch(), activation_checkpointing=checkpointing)
        _backward(out)
        grads.append({name: p.grad for name, p in network.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_layer_drop_skips_the_block() -> None:
    network, out = _forward(_built(), tiny_batch(), kept_blocks=[True, False])
    _backward(out)
    assert all(p.grad is None for p in network.trunk.blocks[1].parameters())
    assert all(p.grad is not None for p in network.trunk.blocks[0].parameters())


def test_wrong_mask_length_is_refused_by_name() -> None:
    batch = tiny_batch()
    longer = replace(batch, source=torch.cat((batch.source, batch.source), 1))
    with pytest.raises(ValueError, match="masks are drawn for"):
        _forward(_built(), longer)


def test_relative_positions_are_refused() -> None:
    _, problems = read_config("image_tiny", ["model.modalities.image.positions=relative"])
    assert any("modalities.image: data2vec2 encodes visible tokens alone" in problem for problem in problems), problems


def test_teacher_with_its_own_front_end_ignores_the_students_features() -> None:
    objective = _built(share_local_encoder=False)
    teacher = objective.build_teacher_network().eval()
    batch = tiny_batch()
    shape = (batch.source.shape[0], batch.required_masks().num_tokens, objective.trunk.block.width)
    with torch.no_grad():
        targets: list[Tensor] = [teacher(batch, torch.full(shape, value)) for value in (0.0, 9.0)]
    assert torch.equal(*targets)
    assert any("local" in name for name, _ in teacher.named_parameters())
