"""Shipped configurations of MAE: published recipe, size in their first line, a step."""

from dataclasses import replace

import pytest
import torch

from d2v2ds.config.load import CONFIG_FOLDER, load_config
from d2v2ds.config.summary import batch_advice, summary
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig, parameter_groups
from tests.config.test_published import batch_of

NAMES = sorted(path.stem for path in (CONFIG_FOLDER / "mae").glob("*.yaml"))


def test_all_are_here() -> None:
    assert NAMES == ["base", "huge14", "large", "tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_configuration_says_its_size(name: str) -> None:
    config = load_config(f"mae/{name}")
    lines = summary(config, world=8)
    with torch.device("meta"):
        network = config.objective.build(config.model, seed=1).build_network(activation_checkpointing=False)
    count = sum(p.numel() for p in network.parameters())
    assert f"student {count:,}" in lines[0]
    first = (CONFIG_FOLDER / "mae" / f"{name}.yaml").read_text().splitlines()[0]
    assert (f"{count:,} parameters" in first) or f"{count / 1e6:.1f} million parameters" in first
    assert batch_advice(f"mae/{name}", config) == []


@pytest.mark.parametrize("name", ["base", "large", "huge14"])
def test_recipe_is_the_published_one(name: str) -> None:
    config = load_config(f"mae/{name}")
    image, steps = config.data.modalities["image"], 1_277_952 // 4096
    assert config.optim == OptimConfig(
        betas=(0.9, 0.95), eps=1e-8, early_eps=False, weight_decay=0.05, decay_vectors=False, clip_norm=0.0
    )
    assert image.global_batch == 4096 and config.lr.peak == pytest.approx(1.5e-4 * 4096 / 256)
    assert (config.total_steps, config.lr.warmup_steps) == (1600 * steps, 40 * steps)
    own = config.objective.modalities["image"]
    assert (own.mask.kind, own.mask.num_masks, own.mask.masked_fraction) == ("random", 1, 0.75)
    assert (own.decoder.width, own.decoder.depth, own.decoder.num_heads) == (512, 8, 16)
    assert own.normalise_pixels and config.model.block.pre_norm and config.model.block.norm_eps == 1e-6


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.run if n in ("large", "huge14") else ()) for n in NAMES]
)
def test_configuration_takes_a_step(name: str) -> None:
    config = load_config(f"mae/{name}")
    own = config.objective.modalities["image"]
    own = replace(own, decoder=replace(own.decoder, depth=1))
    objective = replace(config.objective, modalities={"image": own}).build(
        replace(config.model, shared_depth=2), seed=1
    )
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, seed=1)
    groups = parameter_groups(
        network, objective.lr_scale, objective.held_steps, decay_vectors=config.optim.decay_vectors
    )
    optimizer = EarlyEpsilonAdam(groups, lr=config.lr.peak, config=config.optim)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    batch = batch_of(config, "image")
    loss = network(batch)["losses"]["regression"] / batch.num_masked
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    still = {key for key, p in network.named_parameters() if torch.equal(p.detach(), before[key])}
    assert still == {key for key, p in network.named_parameters() if not p.requires_grad}


def test_biases_and_norms_alone_do_not_decay() -> None:
    config = load_config("mae/tiny")
    objective = config.objective.build(config.model, seed=1)
    network = objective.build_network(activation_checkpointing=False)
    groups = parameter_groups(network, objective.lr_scale, objective.held_steps, decay_vectors=False)
    names = {id(p): name for name, p in network.named_parameters()}
    optimizer = EarlyEpsilonAdam(groups, lr=1.0, config=config.optim)
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.05)
        for p in group["params"]:
            name = names[id(p)]
            is_exempt = name.endswith(".bias") or "norm" in name
            assert (group["weight_decay"] == 0.0) == is_exempt, name
