"""Shipped configurations of data2vec 1.0 for images: published recipes, sizes, a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from d2v2ds.batch import Batch, SpanMasks
from d2v2ds.config.load import CONFIG_FOLDER, load_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.config.summary import batch_advice, summary
from d2v2ds.modalities.image.colour_jitter import ColourJitterConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig, parameter_groups
from d2v2ds.whole_masks import GridBlocks, draw_whole_masks

NAMES = sorted(path.stem for path in (CONFIG_FOLDER / "data2vec1").glob("image_*.yaml"))
PUBLISHED = [name for name in NAMES if name != "image_tiny"]
FINAL_PROJ = 768 * 769
"""Parameters of the official fairseq model that nothing calls, and that ours lacks."""


def sizes(config: RunConfig) -> tuple[int, int]:
    """Parameters of student and teacher."""
    objective = config.objective.build(config.model, seed=1)
    with torch.device("meta"):
        networks = objective.build_network(activation_checkpointing=False), objective.build_teacher_network()
    student, teacher = (sum(p.numel() for p in network.parameters()) for network in networks)
    return student, teacher


def test_all_are_here() -> None:
    assert NAMES == ["image_base", "image_base_fairseq", "image_large", "image_large_2", "image_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_configuration_says_its_size(name: str) -> None:
    config = load_config(f"data2vec1/{name}")
    count, _ = sizes(config)
    assert f"student {count:,}" in summary(config, world=8)[0]
    first = (CONFIG_FOLDER / "data2vec1" / f"{name}.yaml").read_text().splitlines()[0]
    assert f"{count:,} parameters" in first or f"{count / 1e6:.1f} million parameters" in first
    assert batch_advice(f"data2vec1/{name}", config) == []


@pytest.mark.parametrize(
    ("name", "student", "teacher_beside_head_and_mask"),
    [("image_base", 86_256_720, 86_256_720), ("image_large", 304_186_816, 304_186_816)],
)
def test_counts_are_the_published_ones(name: str, student: int, teacher_beside_head_and_mask: int) -> None:
    """The official teacher has head and mask vector too, which give no target."""
    config = load_config(f"data2vec1/{name}")
    width = config.model.block.width
    assert sizes(config) == (student, teacher_beside_head_and_mask - width * (width + 1) - width)


def test_counts_of_fairseqs_port() -> None:
    student, teacher = sizes(load_config("data2vec1/image_base_fairseq"))
    assert student + FINAL_PROJ == 86_256_720
    assert teacher - 768 == 85_074_000, "the class token is a copy of the student's, beside the official teacher"


def test_counts_of_the_published_huge_model() -> None:
    sizes_of_huge = ["model.block.width=1280", "model.block.num_heads=16", "model.shared_depth=32"]
    assert sizes(load_config("data2vec1/image_large", sizes_of_huge))[0] == 632_359_872


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_recipes_share(name: str) -> None:
    config = load_config(f"data2vec1/{name}")
    image, own = config.data.modalities["image"], config.objective.modalities["image"]
    assert image.colour_jitter == ColourJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4)
    assert (image.crop_scale, image.flip_probability) == ((0.08, 1.0), 0.5)
    assert (own.target.num_layers, own.target.layer, own.target.final_norms) == (6, "block", ("layer",))
    assert own.loss.beta == 2.0
    assert (own.mask.least, own.mask.most) == (16, 196)
    block = config.model.block
    assert (block.pre_norm, block.key_bias, config.model.modalities["image"].positions) == (True, False, "relative")
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)
    assert config.optim.clip_norm == 3.0


@pytest.mark.parametrize(
    ("name", "batch", "per_epoch", "peak", "warm", "dropped", "scale", "decay"),
    [
        ("image_base", 2048, 625, 2e-3, 10, (0.25, 0.05), 1e-4, 0.9998),
        ("image_large", 4096, 312, 1e-3, 80, (0.2, 0.15), 1e-5, 0.9998),
        ("image_large_2", 4096, 312, 1e-3, 40, (0.2, 0.15), 1e-5, 0.9999),
    ],
)
def test_recipe_of_the_released_weights(
    name: str, batch: int, per_epoch: int, peak: float, warm: int, dropped: tuple[float, float], scale: float,
    decay: float,
) -> None:  # fmt: skip
    config = load_config(f"data2vec1/{name}")
    own, width = config.objective.modalities["image"], config.model.block.width
    assert config.data.modalities["image"].global_batch == batch
    assert (config.total_steps, config.lr.warmup_steps) == (800 * per_epoch, warm * per_epoch)
    assert (config.lr.peak, config.lr.minimum) == (peak, 1e-5)
    assert (config.objective.drop_path, config.model.block.attention_dropout) == dropped
    assert (config.model.block.layer_scale, config.model.block.norm_eps) == (scale, 1e-6)
    ema = config.objective.ema
    assert (ema.start_decay, ema.end_decay, ema.anneal_steps) == (decay, decay, 0)
    assert (own.mask.count, own.target.layer_norms, own.head_layers) == (120, ("layer",), 1)
    assert own.loss.factor(width) == pytest.approx(1 / width)
    assert (own.share_local_encoder, own.first_weights) == (False, "beit")
    assert (config.optim.early_eps, config.optim.decay_vectors) == (False, False)


def test_recipe_of_fairseqs_port() -> None:
    config = load_config("data2vec1/image_base_fairseq")
    own = config.objective.modalities["image"]
    assert (config.data.modalities["image"].global_batch, config.total_steps) == (2048, 375_300)
    assert (config.lr.peak, config.lr.warmup_steps, config.lr.minimum) == (5e-4, 12_510, 0.0)
    assert (config.objective.drop_path, config.model.block.attention_dropout) == (0.25, 0.05)
    assert (config.model.block.layer_scale, config.model.block.norm_eps) == (1e-4, 1e-5)
    ema = config.objective.ema
    assert (ema.start_decay, ema.end_decay, ema.anneal_steps) == (0.999, 0.9998, 375_300)
    assert (own.mask.count, own.target.layer_norms, own.head_layers, own.loss.scale) == (75, (), 0, None)
    assert (own.share_local_encoder, own.copied, own.first_weights) == (True, ("extra",), "fairseq_image")
    assert config.optim == OptimConfig(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, clip_norm=3.0)


def shallow(config: RunConfig) -> Data2Vec1:
    """The same objective around two blocks, without dropped branches."""
    own = config.objective.modalities["image"]
    own = replace(own, target=replace(own.target, num_layers=2))
    objective = replace(config.objective, drop_path=0.0, modalities={"image": own})
    built: Data2Vec1 = objective.build(replace(config.model, shared_depth=2), seed=1)
    return built


def batch_of(config: RunConfig) -> Batch:
    """One image with the configuration's own mask."""
    network, mask = config.model.modalities["image"], config.objective.modalities["image"].mask
    assert isinstance(mask, GridBlocks)
    side, tokens = network.image_size, network.num_tokens(network.image_size)
    masked = draw_whole_masks(mask, np.array([tokens]), seed=0, epoch=0, sample_ids=[0])
    torch.manual_seed(0)
    return Batch(
        modality="image",
        source=torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8),
        ids=torch.zeros(1, dtype=torch.int64),
        span_masks=SpanMasks(time=torch.from_numpy(masked)),
        num_masked=int(masked.sum()),
    )


def optimizer_of(config: RunConfig, objective: Data2Vec1, network: nn.Module) -> EarlyEpsilonAdam:
    groups = parameter_groups(
        network,
        objective.lr_scale,
        objective.held_steps,
        decay_vectors=config.optim.decay_vectors,
        decays=objective.decays,
    )
    return EarlyEpsilonAdam(groups, lr=config.lr.peak, config=config.optim)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.run if "large" in n else ()) for n in NAMES])
def test_configuration_takes_a_step(name: str) -> None:
    config = load_config(f"data2vec1/{name}")
    objective = shallow(config)
    student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network().eval()
    objective.initialise(student, seed=1)
    teacher.load_state_dict({key: student.state_dict()[key] for key in teacher.state_dict()})
    optimizer = optimizer_of(config, objective, student)
    before = {key: p.detach().clone() for key, p in student.named_parameters()}
    batch = batch_of(config)
    loss = student(batch, torch.no_grad()(teacher.__call__))["losses"]["regression"] / batch.num_masked
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    assert not [key for key, p in student.named_parameters() if torch.equal(p.detach(), before[key])]
