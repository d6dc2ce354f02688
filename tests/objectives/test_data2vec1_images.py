"""data2vec 1.0 for images: stochastic depth, weight decay by parameter, first weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from d2v2ds.batch import Batch, SpanMasks
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.block import BlockConfig, DropPath, drop_path_rates
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1Config, Data2Vec1Network, WholeModalityConfig
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.train.optim import parameter_groups
from d2v2ds.whole_masks import GridBlocks

DEPTH, WIDTH = 3, 64
BLOCK = BlockConfig(
    width=WIDTH, num_heads=2, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0,
    pre_norm=True, key_bias=False, layer_scale=1.0,
)  # fmt: skip
NETWORK = ImageNetwork(prenet_depth=0, image_size=16, patch_size=4, positions="relative")
TRUNK = TrunkConfig(block=BLOCK, shared_depth=DEPTH, modalities={"image": NETWORK})
OWN = WholeModalityConfig(
    share_local_encoder=False,
    mask=GridBlocks(count=8, least=2),
    target=TargetConfig(num_layers=2, layer="block", layer_norms=("layer",), final_norms=("layer",)),
    loss=LossConfig(scale=1 / WIDTH, beta=2.0),
    first_weights="beit",
)
CONFIG = Data2Vec1Config(ema=EmaConfig(start_decay=0.9, end_decay=0.9, anneal_steps=0), modalities={"image": OWN})


def network_of(config: Data2Vec1Config = CONFIG) -> Data2Vec1Network:
    objective = config.build(TRUNK, seed=1)
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, seed=1)
    return network


def batch_of(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    masked = torch.zeros(rows, 16, dtype=torch.bool)
    masked[:, 3:11] = True
    return Batch(
        modality="image",
        source=torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator),
        ids=torch.arange(rows),
        span_masks=SpanMasks(time=masked),
        num_masked=int(masked.sum()),
    )


# --- stochastic depth -------------------------------------------------------------------------------------------------


def rates_of(module: nn.Module) -> list[float]:
    return [one.rate for one in module.modules() if isinstance(one, DropPath)]


def test_the_student_has_linearly_growing_rates_and_the_teacher_none() -> None:
    config = replace(CONFIG, drop_path=0.5)
    assert rates_of(network_of(config)) == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert drop_path_rates(0, 12, 0.25) == pytest.approx([0.25 * i / 11 for i in range(12)])
    assert rates_of(config.build(TRUNK, seed=1).build_teacher_network()) == [0.0] * 6
    assert rates_of(network_of()) == [0.0] * 6


def test_dropped_samples_pass_the_last_block_unchanged_in_training_alone() -> None:
    torch.manual_seed(0)
    network, batch = network_of(replace(CONFIG, drop_path=0.9)), batch_of(40)
    found: dict[str, torch.Tensor] = {}
    network.trunk.blocks[-1].register_forward_hook(
        lambda module, inputs, outputs: found.update(start=inputs[0], end=outputs[0])
    )

    def target(batch: Batch, local: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(local)

    def kept() -> int:
        network(batch, target)
        return sum(not torch.equal(a, b) for a, b in zip(found["start"], found["end"], strict=True))

    assert 1 <= kept() <= 20, "both branches of a sample are dropped with probability 0.81"
    network.eval()
    assert kept() == 40


def test_one_rate_for_prenets_of_different_depth_is_refused() -> None:
    other = replace(NETWORK, prenet_depth=1)
    trunk = replace(TRUNK, modalities={"image": NETWORK, "other": other})
    config = replace(CONFIG, drop_path=0.1, modalities={"image": OWN, "other": OWN})
    assert "different prenet_depth" in config.check(trunk)[0]
    assert config.check(TRUNK) == []


# --- weight decay -----------------------------------------------------------------------------------------------------


def test_decay_follows_beit() -> None:
    """Not on parameters of one dimension, biases and CLS token; yes on mask token and table of offsets."""
    network, objective = network_of(), CONFIG.build(TRUNK, seed=1)
    groups = parameter_groups(
        network, objective.lr_scale, objective.held_steps, decay_vectors=False, decays=objective.decays
    )
    names = {id(p): name for name, p in network.named_parameters()}
    decays = {names[id(p)]: "weight_decay" not in group for group in groups for p in group["params"]}
    assert decays["mask_vectors.image.vector"] and decays["trunk.encoders.image.relative.table"]
    assert not decays["trunk.encoders.image.extra.tokens"]
    for name, has_decay in decays.items():
        parts = name.split(".")
        is_exempt = parts[-1] in ("bias", "queries", "values", "factors", "tokens") or "norm" in parts[-2]
        assert has_decay != is_exempt, name
    (whole,) = parameter_groups(network, objective.lr_scale, objective.held_steps)
    assert len(whole["params"]) == len(decays)


# --- first weights ----------------------------------------------------------------------------------------------------


def stds(network: Data2Vec1Network) -> dict[str, float]:
    return {name: float(p.detach().std()) for name, p in network.named_parameters()}


def test_first_weights_of_beit() -> None:
    found = stds(network_of())
    effective = 0.02 * 0.54  # of a normal distribution cut at one standard deviation
    for name in ("encoders.image.local.proj.weight", "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        assert found[f"trunk.{name}"] == pytest.approx(effective, rel=0.05), name
    assert found["heads.image.0.weight"] == pytest.approx(effective, rel=0.05)
    for i in range(DEPTH):
        for name in ("attn.proj", "mlp.fc2"):
            expected = effective / math.sqrt(2 * (i + 1))
            assert found[f"trunk.blocks.{i}.{name}.weight"] == pytest.approx(expected, rel=0.05)
    network = network_of()
    assert abs(network.mask_vectors["image"].vector).max() <= 0.02
    assert network.trunk.encoders["image"].extra.tokens.abs().max() <= 0.02
    assert not network.trunk.encoders["image"].local.proj.bias.any()


def test_first_weights_of_fairseqs_port() -> None:
    own = replace(OWN, first_weights="fairseq_image")
    network = network_of(replace(CONFIG, modalities={"image": own}))
    found = stds(network)
    assert found["trunk.blocks.1.attn.qkv.weight"] == pytest.approx(0.02, rel=0.05)
    assert found["trunk.blocks.2.mlp.fc2.weight"] == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    bound = 1 / math.sqrt(3 * 4 * 4)  # torch's default: uniform
    patches = network.trunk.encoders["image"].local.proj
    assert found["trunk.encoders.image.local.proj.weight"] == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert 0.8 * bound < patches.bias.abs().max() <= bound
    drawn = torch.cat([network.mask_vectors["image"].vector, network.trunk.encoders["image"].extra.tokens.flatten()])
    assert float(drawn.detach().std()) == pytest.approx(0.88, rel=0.2)
    assert drawn.abs().max() <= 2.0
    assert found["heads.image.0.weight"] == pytest.approx(1 / math.sqrt(3 * WIDTH), rel=0.05)
