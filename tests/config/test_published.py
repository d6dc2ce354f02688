"""Every shipped configuration builds at its full size, counts, and takes a step with its depth reduced."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.config.load import CONFIG_FOLDER, RunConfig, load_config
from d2v2ds.config.summary import batch_advice, summary
from d2v2ds.masking import draw_masks, visible_positions
from d2v2ds.objectives.data2vec2 import Data2Vec2
from d2v2ds.train.optim import EarlyEpsilonAdam

NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
DEPTH, NUM_MASKS = 2, 2
SHORT = {"audio": 16_000, "text": 48}
"""Size of an input; images and spectrograms have one of their own."""


def test_the_whole_zoo_is_here() -> None:
    published = {"audio_base", "audio_large", "image_base", "image_large", "image_huge14", "image_huge16"}
    published |= {"text_base", "text_large", "text_large_1m", "multimodal_large"}
    published |= {"spectrogram_base", "spectrogram_large", "spectrogram_bat"}
    assert set(NAMES) == published | {
        f"{name}_tiny" for name in ("audio", "image", "text", "multimodal", "spectrogram")
    }


@pytest.mark.parametrize("name", NAMES)
def test_configuration_builds_at_full_size_and_says_what_it_amounts_to(name: str) -> None:
    config = load_config(name)
    objective = config.objective.build(config.model, seed=1)
    with torch.device("meta"):
        student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network()
    assert set(dict(teacher.named_parameters())) <= set(dict(student.named_parameters()))
    lines = summary(config, world=8)
    assert len(lines) == 4 + len(config.data.modalities)
    assert f"student {sum(p.numel() for p in student.parameters()):,}" in lines[0]


@pytest.mark.parametrize(
    ("name", "all_of_them", "trained", "decoder"),
    [
        ("spectrogram_base", 92_558_592, 87_840_000, 2_585_856),
        ("spectrogram_large", 314_834_944, 308_543_488, 5_967_872),
        ("spectrogram_bat", 139_789_056, 139_789_056 - 393_216, 47_054_592),
    ],
)
def test_spectrogram_models_have_the_published_numbers_of_parameters(
    name: str, all_of_them: int, trained: int, decoder: int
) -> None:
    config = load_config(name)
    with torch.device("meta"):
        student = config.objective.build(config.model, seed=1).build_network(activation_checkpointing=False)
    assert sum(p.numel() for p in student.parameters()) == all_of_them
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in student.decoders.parameters()) == decoder


@pytest.mark.parametrize(
    ("world", "said"),
    [
        (1, "8 micro-batches, accumulation 8 on 1 rank(s)"),
        (8, "8 micro-batches, accumulation 1 on 8 rank(s)"),
        (16, "8 micro-batches, accumulation 1 on 16 rank(s), 8 of 16 turns without data"),
        (3, "8 micro-batches, accumulation 3 on 3 rank(s), 1 of 9 turns without data"),
    ],
)
def test_ranks_without_work_are_said(world: int, said: str) -> None:
    assert summary(load_config("audio_base"), world)[3].endswith(said)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_as_shipped_needs_no_advice(name: str) -> None:
    assert batch_advice(name, load_config(name)) == []


def test_another_batch_comes_with_the_settings_that_go_with_it() -> None:
    quarter = ["data.audio.global_batch_seconds=125"]
    size, settings = batch_advice("audio_base", load_config("audio_base", quarter))
    assert size == "audio: a global batch of 125 seconds of audio, 0.25 times the 500 of audio_base"
    found = settings.split(": ")[1].split()
    config = load_config("audio_base", quarter + found)
    assert config.lr.peak == pytest.approx(7.5e-4 / 2)
    assert config.lr.warmup_steps == 4 * 8000
    assert config.objective.ema.anneal_steps == 4 * 75_000
    assert config.objective.ema.start_decay**4 == pytest.approx(0.999)
    assert config.objective.ema.end_decay**4 == pytest.approx(0.99999)
    assert batch_advice("audio_base", config) == [], "all of it was followed"
    assert "lr.peak" not in batch_advice("audio_base", load_config("audio_base", [*quarter, "lr.peak=1e-4"]))[1]


def test_advice_has_no_numbers_where_there_are_none(tmp_path: Path) -> None:
    uneven = load_config("multimodal_tiny", ["data.image.global_batch_images=8"])
    assert "were tuned for the shipped batches" in batch_advice("multimodal_tiny", uneven)[-1]
    half = [
        "data.audio.global_batch_seconds=4",
        "data.image.global_batch_images=8",
        "data.text.global_batch_tokens=2048",
    ]
    said = batch_advice("multimodal_tiny", load_config("multimodal_tiny", half))
    assert len(said) == 4
    assert "lr.warmup_steps=100" in said[-1]
    own = tmp_path / "own.yaml"
    own.write_text((CONFIG_FOLDER / "audio_base.yaml").read_text().replace("seconds: 500", "seconds: 125"))
    assert batch_advice(str(own), load_config(str(own))) == []
    frozen = batch_advice("audio_large", load_config("audio_large", ["data.audio.global_batch_seconds=480"]))
    assert "objective.ema.end_decay" not in frozen[-1], "1 stays 1"


def shallow(config: RunConfig) -> Data2Vec2:
    """The same objective around few blocks."""
    encoders = {
        name: replace(encoder, prenet_depth=min(encoder.prenet_depth, 1))
        for name, encoder in config.model.modalities.items()
    }
    targets = {
        name: replace(own, target=replace(own.target, num_layers=min(own.target.num_layers, DEPTH)))
        for name, own in config.objective.modalities.items()
    }
    trunk = replace(config.model, shared_depth=DEPTH, modalities=encoders)
    return replace(config.objective, modalities=targets).build(trunk, seed=1)


def batch_of(config: RunConfig, modality: str) -> Batch:
    """One short input with the configuration's own masks, fewer of them."""
    model = config.model.modalities[modality]
    size = SHORT.get(modality) or getattr(model, "image_size", None) or model.target_length
    mask = replace(config.objective.modalities[modality].mask, num_masks=NUM_MASKS)
    masked = draw_masks(mask, model.num_tokens(size), seed=0, epoch=0, sample_ids=[0])
    torch.manual_seed(0)
    source = {
        "audio": lambda: torch.randn(1, size),
        "image": lambda: torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8),
        "text": lambda: torch.randint(4, 1000, (1, size)),
        "spectrogram": lambda: torch.randn(1, 128, size),
    }[modality]()
    return Batch(
        modality=modality,
        source=source,
        ids=torch.zeros(1, dtype=torch.int64),
        masks=MaskSet(keep=torch.from_numpy(visible_positions(masked)), masked=torch.from_numpy(masked)),
        num_masked=int(masked.sum()),
    )


LARGE = {
    "multimodal_large",
    "audio_large",
    "image_huge14",
    "image_huge16",
    "text_large",
    "text_large_1m",
    "spectrogram_large",
    "spectrogram_bat",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.run if name in LARGE else ()) for name in NAMES])
def test_configuration_takes_a_step(name: str) -> None:
    config = load_config(name)
    objective = shallow(config)
    student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network().eval()
    objective.initialise(student, seed=1)
    teacher.load_state_dict({key: student.state_dict()[key] for key in teacher.state_dict()})
    trained = {key: p for key, p in student.named_parameters() if p.requires_grad}
    optimizer = EarlyEpsilonAdam(list(trained.values()), lr=config.lr.peak, config=config.optim)
    before = {key: p.detach().clone() for key, p in trained.items()}
    for modality in config.data.modalities:
        batch = batch_of(config, modality)
        out = student(batch, torch.no_grad()(teacher.__call__))
        loss = torch.stack(list(out["losses"].values())).sum() / batch.num_masked
        assert torch.isfinite(loss)
        loss.backward()
    optimizer.step()
    still = [key for key, p in trained.items() if torch.equal(p.detach(), before[key])]
    assert not still, f"not trained: {still}"
