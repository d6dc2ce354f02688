"""Shipped fine-tuning configurations have the values of the published files, transcribed here once."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import yaml

from d2v2ds.batch import Batch, Labels
from d2v2ds.config.__main__ import main
from d2v2ds.config.load import CONFIG_FOLDER, RunConfig, load_config
from d2v2ds.masking import SpanMaskConfig, Spans
from d2v2ds.modalities.image.rand_augment import RandAugmentConfig
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.erasing import ErasingConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.tasks.mixing import ImageMixingConfig, WaveformMixingConfig
from d2v2ds.tasks.vocabulary import LIBRISPEECH
from d2v2ds.train.optim import OptimConfig
from d2v2ds.train.schedule import learning_rate

Stages = tuple[int, int, int]
"""Steps of warm-up, plateau and decay."""


class Ctc(NamedTuple):
    """One published file of speech recognition."""

    workers: int
    """Workers x accumulated batches."""
    max_tokens: int
    """Samples of a batch."""
    updates: int
    peak: float
    schedule: Stages | int | None
    """Stages; warm-up of a cosine; None: stages of 10, 40 and 50 % of the run."""
    time: tuple[float, int]
    channels: float
    layer_drop: float
    freeze: int
    second_moment: float = 0.98
    zeros: bool = False
    """Masked frames become zeros, and the scale of ALiBi is not trained."""


PERCENT = None
CTC = {
    "base_10m": Ctc(2 * 4, 3_200_000, 13_000, 5e-5, PERCENT, (0.65, 10), 0.25, 0.1, 10_000),
    "base_1h": Ctc(2 * 4, 3_200_000, 13_000, 5e-5, PERCENT, (0.65, 10), 0.25, 0.1, 10_000),
    "base_10h": Ctc(2 * 4, 3_200_000, 20_000, 5e-5, PERCENT, (0.65, 10), 0.5, 0.05, 10_000),
    "base_100h": Ctc(2 * 4, 3_200_000, 80_000, 3e-5, PERCENT, (0.65, 10), 0.5, 0.1, 0),
    "base_960h": Ctc(8, 3_200_000, 320_000, 1e-4, PERCENT, (0.5, 10), 0.1, 0.1, 0),
    "large_10m": Ctc(4 * 5, 1_280_000, 13_000, 1e-4, PERCENT, (0.65, 10), 0.25, 0.1, 10_000),
    "large_1h": Ctc(4 * 5, 1_280_000, 13_000, 3e-4, PERCENT, (0.75, 10), 0.25, 0.1, 10_000),
    "large_10h": Ctc(4 * 5, 1_280_000, 20_000, 1e-4, PERCENT, (0.75, 10), 0.25, 0.1, 10_000),
    "large_100h": Ctc(4 * 5, 1_280_000, 80_000, 3e-5, PERCENT, (0.5, 10), 0.5, 0.1, 10_000),
    "large_960h": Ctc(24, 1_280_000, 320_000, 3e-5, PERCENT, (0.5, 10), 0.25, 0.1, 10_000),
    "large_10m_2": Ctc(4 * 4, 1_000_000, 10_000, 2e-6, 1_000, (0.4, 3), 0.25, 0.1, 100, 0.95, True),
    "large_10m_3": Ctc(4 * 5, 1_280_000, 13_000, 2e-5, PERCENT, (0.65, 10), 0.25, 0.1, 10_000),
    "large_1h_2": Ctc(8, 1_000_000, 60_000, 1e-5, 4_000, (0.65, 5), 0.25, 0.1, 100),
    "large_1h_2_aws": Ctc(4 * 4, 1_000_000, 10_000, 2e-6, 1_000, (0.4, 3), 0.25, 0.1, 100, 0.95, True),
    "large_1h_3": Ctc(8 * 5, 640_000, 13_000, 6e-5, 4_000, (0.3, 3), 0.25, 0.1, 10_000),
    "large_1h_4": Ctc(8 * 5, 640_000, 13_000, 6e-5, PERCENT, (0.65, 10), 0.25, 0.1, 10_000),
    "large_10h_2": Ctc(4, 1_280_000, 60_000, 2e-5, 8_000, (0.5, 5), 0.1, 0.1, 100),
    "large_10h_2_aws": Ctc(4, 1_280_000, 60_000, 1e-5, (8_000, 0, 72_000), (0.75, 5), 0.1, 0.0, 100),
    "large_10h_aws": Ctc(4, 1_280_000, 60_000, 2e-5, (8_000, 0, 72_000), (0.4, 5), 0.1, 0.1, 100),
    "large_100h_2": Ctc(8, 1_280_000, 100_000, 1e-5, (8_000, 0, 72_000), (0.4, 5), 0.1, 0.1, 100),
    "large_100h_2_aws": Ctc(8, 1_280_000, 100_000, 1e-5, (8_000, 0, 82_000), (0.4, 7), 0.1, 0.0, 100),
    "large_100h_3": Ctc(8, 1_000_000, 100_000, 1e-5, 8_000, (0.4, 5), 0.1, 0.1, 100),
    "large_960h_2": Ctc(16, 1_000_000, 200_000, 1e-5, (8_000, 0, 200_000), (0.4, 5), 0.1, 0.1, 100),
    "large_960h_2_aws": Ctc(16, 1_280_000, 200_000, 2e-5, (8_000, 0, 192_000), (0.3, 5), 0.1, 0.0, 100),
    "large_960h_3": Ctc(16, 1_000_000, 200_000, 1e-5, 8_000, (0.4, 5), 0.1, 0.1, 100),
}


class Images(NamedTuple):
    """One published file of ImageNet-1K."""

    updates: int
    peak: float
    minimum: float
    layer_decay: float
    drop_path: float
    clip: float
    parameters: int


IMAGES = {
    "base": Images(250_200, 1e-3, 1e-6, 0.65, 0.1, 0.0, 86_568_424),
    "large": Images(125_200, 5e-4, 1e-7, 0.75, 0.2, 4.0, 304_327_656),
    "huge14": Images(125_200, 5e-4, 1e-20, 0.75, 0.2, 4.0, 632_047_080),
}


class Mae(NamedTuple):
    """One row of the official fine-tuning of MAE."""

    epochs: int
    peak: float
    layer_decay: float
    drop_path: float
    parameters: int


MAE = {
    "base": Mae(100, 5e-4 * 4, 0.65, 0.1, 86_567_656),
    "large": Mae(50, 1e-3 * 4, 0.75, 0.2, 304_326_632),
    "huge14": Mae(50, 1e-3 * 4, 0.75, 0.3, 632_045_800),
}


class Glue(NamedTuple):
    """One published file of GLUE."""

    outputs: int
    batch: int
    """Most rows of an update."""
    updates: int
    warmup: int
    peak: float
    select: tuple[str, ...] = ("accuracy",)
    """Scores by whose mean the best checkpoint is chosen."""


GLUE = {
    "cola": Glue(2, 16, 5_336, 320, 2e-5, ("mcc",)),
    "mnli": Glue(3, 32, 123_873, 7_432, 2e-5),
    "mrpc": Glue(2, 16, 2_296, 137, 2e-5, ("accuracy", "f1")),
    "qnli": Glue(2, 32, 33_112, 1_986, 2e-5),
    "qqp": Glue(2, 32, 113_272, 28_318, 2e-5, ("accuracy", "f1")),
    "rte": Glue(2, 16, 2_036, 122, 2e-5),
    "sst2": Glue(2, 32, 20_935, 1_256, 2e-5),
    "stsb": Glue(1, 16, 3_598, 214, 4e-5, ("pearson", "spearman")),
}
PARAMETERS = (
    {f"ctc_{name}": 93_188_140 if name.startswith("base") else 313_308_208 for name in CTC}
    | {f"image_classify_{name}": row.parameters for name, row in IMAGES.items()}
    | {f"mae_{name}": row.parameters for name, row in MAE.items()}
    | {f"glue_{name}": 124_646_402 + (row.outputs - 2) * 769 for name, row in GLUE.items()}
)
TINY = {
    "ctc_tiny": "audio_tiny",
    "audio_classify_tiny": "audio_tiny",
    "image_classify_tiny": "image_tiny",
    "text_classify_tiny": "text_tiny",
}
NAMES = sorted(path.stem for path in (CONFIG_FOLDER / "finetune").glob("*.yaml"))


def load(name: str) -> RunConfig:
    """Load a configuration with a folder of data."""
    return load_config(f"finetune/{name}", ["data.shards=folder"])


def spans(fraction: float, length: int) -> Spans:
    """Make settings of spans."""
    return Spans(fraction=fraction, length=length)


def test_the_folder_has_every_published_configuration_and_a_tiny_one_for_each_task() -> None:
    assert set(NAMES) == PARAMETERS.keys() | TINY.keys() | {"audioset"}


@pytest.mark.parametrize("name", NAMES)
def test_configuration_builds_at_full_size_and_is_summed_up(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(name)
    assert config.data.missing() == []
    assert config.run.dir.name == name
    assert main([f"finetune/{name}", "data.shards=folder"]) == 0
    printed = capsys.readouterr().out
    objective = config.objective.build(config.model, seed=1)
    with torch.device("meta"):
        network = objective.build_network(activation_checkpointing=False)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"# parameters: student {count:,} " in printed
    assert yaml.safe_load(printed)["objective"]["name"] == config.objective.name
    if name in PARAMETERS:
        assert count == PARAMETERS[name]
    if name not in TINY:
        assert f": {count:,} parameters." in (CONFIG_FOLDER / "finetune" / f"{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize("name", CTC)
def test_recognition_has_the_published_values(name: str) -> None:
    row, config = CTC[name], load(f"ctc_{name}")
    data, objective = config.data.modalities["audio"], config.objective
    assert isinstance(objective, CtcConfig)
    assert config.total_steps == row.updates
    assert data.micro_batch_seconds * 16_000 == row.max_tokens
    assert data.global_batch_seconds * 16_000 == row.workers * row.max_tokens
    assert data.num_micro == row.workers
    assert objective.mask == SpanMaskConfig(time=spans(*row.time), channels=spans(row.channels, 64))
    assert objective.mask_noise_std == (0.0 if row.zeros else 0.01)
    assert (objective.prenet_layer_drop, objective.freeze_steps) == (row.layer_drop, row.freeze)
    assert (objective.final_dropout, objective.layer_decay, objective.vocabulary) == (0.0, 1.0, LIBRISPEECH)
    assert config.optim == OptimConfig(betas=(0.9, row.second_moment), eps=1e-8, weight_decay=0.0, clip_norm=0.0)

    trunk = load_config(f"audio_{name.split('_')[0]}").model
    audio = replace(trunk.modalities["audio"], prenet_dropout=0.0, conv_gradient=0.0, alibi_learned=not row.zeros)
    block = replace(
        trunk.block, attention_dropout=0.0, attention_output_dropout=0.0, activation_dropout=0.1, mlp_dropout=0.0
    )
    assert config.model == replace(trunk, block=block, layer_drop=row.layer_drop, modalities={"audio": audio})


@pytest.mark.parametrize("name", CTC)
def test_recognition_has_the_published_learning_rates(name: str) -> None:
    config = load(f"ctc_{name}")
    for step, share in shares(CTC[name]):
        found = learning_rate(step, config.lr, config.total_steps)
        assert found == pytest.approx(share * CTC[name].peak, rel=1e-9, abs=1e-18), step


def shares(row: Ctc) -> Iterator[tuple[int, float]]:
    """Yield finished steps and the learning rate over its peak."""
    if isinstance(row.schedule, int):
        warmup = row.schedule
        middle = (warmup + row.updates) // 2
        yield from ((0, 0.0), (warmup // 2, 0.5), (warmup, 1.0), (middle, 0.5), (row.updates, 0.0))
        return
    warmup, hold, decay = row.schedule or (row.updates // 10, row.updates * 4 // 10, row.updates // 2)
    begin = warmup + hold
    yield from ((0, 0.01), (warmup // 2, 0.505), (warmup, 1.0), (begin, 1.0), (begin + decay // 2, math.sqrt(0.05)))
    yield row.updates, 0.05 ** min((row.updates - begin) / decay, 1.0)


@pytest.mark.parametrize(
    ("name", "step", "share"),
    [
        ("large_10h", 20_000, 0.05),
        ("large_10h_aws", 60_000, 0.115),
        ("large_10h_2_aws", 60_000, 0.115),
        ("large_100h_2", 80_000, 0.05),
        ("large_100h_2", 100_000, 0.05),
        ("large_960h_2", 200_000, 0.056),
    ],
)
def test_stages_that_do_not_add_up_end_as_published_runs_do(name: str, step: int, share: float) -> None:
    config = load(f"ctc_{name}")
    assert learning_rate(step, config.lr, config.total_steps) / config.lr.peak == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("name", IMAGES)
def test_image_classification_has_the_published_values(name: str) -> None:
    row, config = IMAGES[name], load(f"image_classify_{name}")
    data, objective = config.data.modalities["image"], config.objective
    assert isinstance(objective, ClassifyConfig)
    assert config.total_steps == row.updates
    assert (data.global_batch_images, data.micro_batch_images, data.num_micro) == (16 * 32, 32, 16)
    assert (data.crop_scale, data.crop_ratio, data.flip_probability) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert data.rand_augment == RandAugmentConfig(operations=2, probability=0.5, magnitude=9.0, magnitude_std=0.5)
    assert objective.erasing == ErasingConfig(probability=0.25, area=(0.02, 1 / 3), ratio=0.3)
    assert (objective.kind, objective.head, objective.label_smoothing) == ("one", PatchHeadConfig(), 0.1)
    assert objective.image_mixing == ImageMixingConfig(mixup=0.7, cutmix=1.0, share=0.9, cutmix_share=0.5)
    assert (objective.layer_decay, objective.drop_path) == (row.layer_decay, row.drop_path)
    assert objective.mask == SpanMaskConfig()
    assert config.optim == OptimConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, clip_norm=row.clip)
    assert config.model == load_config(f"image_{name}").model, "pretraining has no dropouts either"

    middle = (row.minimum + row.peak) / 2
    wanted = {0: row.minimum, 8_000: middle, 16_000: row.peak, (16_000 + row.updates) // 2: middle}
    wanted[row.updates] = row.minimum
    for step, rate in wanted.items():
        assert learning_rate(step, config.lr, config.total_steps) == pytest.approx(rate, rel=1e-9, abs=1e-24), step
    task, depth = objective.build(config.model, seed=1), config.model.depth("image")
    first = "trunk.encoders.image.prenet.blocks.0.norm1.weight" if name == "base" else "trunk.blocks.0.norm1.weight"
    assert task.lr_scale(first) == pytest.approx(row.layer_decay**depth)
    assert task.lr_scale("head.proj.weight") == 1.0


@pytest.mark.parametrize("name", MAE)
def test_fine_tuning_of_mae_has_the_official_values(name: str) -> None:
    row, config = MAE[name], load(f"mae_{name}")
    data, objective = config.data.modalities["image"], config.objective
    assert isinstance(objective, ClassifyConfig)
    assert (config.total_steps, config.lr.warmup_steps) == (row.epochs * 1251, 5 * 1251)
    assert (data.global_batch_images, config.lr.peak, config.lr.minimum) == (1024, pytest.approx(row.peak), 1e-6)
    assert data.rand_augment == RandAugmentConfig(operations=2, probability=0.5, magnitude=9.0, magnitude_std=0.5)
    assert objective.head == PatchHeadConfig(init_std=2e-5)
    assert objective.image_mixing == ImageMixingConfig(mixup=0.8, cutmix=1.0, share=1.0, cutmix_share=0.5)
    assert (objective.layer_decay, objective.drop_path) == (row.layer_decay, row.drop_path)
    assert config.optim == OptimConfig(
        betas=(0.9, 0.999), eps=1e-8, early_eps=False, weight_decay=0.05, decay_vectors=False, clip_norm=0.0
    )
    assert replace(config.model, final_norm=True) == load_config(f"mae/{name}").model
    task, depth = objective.build(config.model, seed=1), config.model.depth("image")
    assert task.lr_scale("trunk.encoders.image.local.proj.weight") == pytest.approx(row.layer_decay ** (depth + 1))
    assert task.lr_scale("trunk.blocks.0.norm1.weight") == pytest.approx(row.layer_decay**depth)


@pytest.mark.parametrize("name", ["image_base", "image_large", "image_huge14", "image_tiny"])
def test_pretraining_has_no_augmentation_of_fine_tuning(name: str) -> None:
    assert load_config(name, ["data.shards=folder"]).data.modalities["image"].rand_augment is None


def test_stochastic_depth_grows_over_the_blocks_also_on_the_meta_device() -> None:
    config = load("image_classify_base")
    with torch.device("meta"):
        network = config.objective.build(config.model, seed=1).build_network(activation_checkpointing=False)
    rates = [block.mlp_drop_path.rate for block in network.blocks("image")]  # type: ignore[operator]
    shared = [0.2 / 9 + number * (0.1 - 0.2 / 9) / 9 for number in range(10)]
    assert rates == pytest.approx([0.0, 0.1 / 9, *shared])


@pytest.mark.parametrize("name", GLUE)
def test_sentence_tasks_have_the_published_values(name: str) -> None:
    row, config = GLUE[name], load(f"glue_{name}")
    data, objective = config.data.modalities["text"], config.objective
    assert isinstance(objective, ClassifyConfig)
    assert config.total_steps == row.updates
    assert (data.global_batch_tokens, data.micro_batch_tokens, data.global_batch_rows) == (4400, 4400, row.batch)
    assert (objective.head, objective.num_outputs) == (SentenceHeadConfig(dropout=0.0), row.outputs)
    kind = ("number", 5.0, "name") if name == "stsb" else ("one", 1.0, "frequency")
    assert (objective.kind, objective.scale, objective.class_order) == kind
    assert objective.select == row.select
    assert (objective.mask, objective.freeze_steps, objective.layer_decay) == (SpanMaskConfig(), 0, 1.0)
    assert config.optim == OptimConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, clip_norm=0.0)
    assert config.model == load_config("text_base").model, "the dropouts of pretraining stay"

    middle = (row.warmup + row.updates) / 2
    wanted = {0: 0.0, row.warmup // 2: row.warmup // 2 / row.warmup, row.warmup: 1.0, row.updates: 0.0}
    wanted[int(middle)] = 0.5 + (middle - int(middle)) / (row.updates - row.warmup)
    for step, share in wanted.items():
        assert learning_rate(step, config.lr, row.updates) == pytest.approx(share * row.peak, rel=1e-9, abs=1e-18), step


def test_audio_tagging_has_the_published_values() -> None:
    config = load("audioset")
    data, objective = config.data.modalities["audio"], config.objective
    assert isinstance(objective, ClassifyConfig)
    assert config.total_steps == 30_000
    assert (data.global_batch_seconds, data.micro_batch_seconds) == (8 * 160, 160)
    assert (objective.kind, objective.num_outputs, objective.per_positive) == ("several", 527, False)
    assert objective.select == ("map",)
    assert objective.head == FrameHeadConfig(pooling="linear_softmax", pool_padding=False)
    assert objective.mask == SpanMaskConfig(time=spans(0.6, 5))
    assert objective.waveform_mixing == WaveformMixingConfig(least=0.5, rows=1.0, labels=True)
    assert config.optim == OptimConfig(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, clip_norm=0.0)
    rates = [learning_rate(step, config.lr, 30_000) for step in (0, 2_500, 5_000, 17_500, 30_000)]
    assert rates == pytest.approx([0.0, 3e-5, 6e-5, 3e-5, 0.0], abs=1e-18)

    trunk = load_config("audio_base").model
    audio = replace(trunk.modalities["audio"], conv_gradient=0.0)
    block = replace(trunk.block, attention_dropout=0.2, activation_dropout=0.1)
    assert config.model == replace(trunk, block=block, layer_drop=0.1, modalities={"audio": audio})


@pytest.mark.parametrize(("name", "pretraining"), TINY.items())
def test_tiny_configuration_has_the_network_of_pretraining_and_takes_a_step(name: str, pretraining: str) -> None:
    config, objective = load(name), load(name).objective
    assert replace(config.model, modalities={}) == replace(load_config(pretraining).model, modalities={})
    assert config.model.modalities == load_config(pretraining).model.modalities
    names = ("a", "b", "c")
    task = objective.with_names(names).build(config.model, seed=1)
    torch.manual_seed(0)
    network = task.build_network(activation_checkpointing=False)
    task.initialise(network, seed=1)
    sources = {
        "audio": torch.randn(2, 8000),
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "text": torch.randint(4, 1000, (2, 12)),
    }
    labels = Labels(values=torch.tensor([1, 2]))
    if name == "ctc_tiny":
        labels = Labels(values=torch.tensor([[4, 5], [6, 1]]), lengths=torch.tensor([2, 1]))
    source = sources[objective.modality]
    batch = Batch(modality=objective.modality, source=source, ids=torch.arange(2), labels=labels)
    losses = task.losses(network, batch, step=0)
    sum(losses.sums.values()).backward()
    still = [key for key, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still, f"not trained: {still}"
