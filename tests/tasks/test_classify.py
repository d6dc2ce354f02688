"""Mixing inside a training step, and what the three kinds of labels count."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from d2v2ds.batch import Batch, Labels
from d2v2ds.model.local import normalise_pixels
from d2v2ds.tasks.classify import Classify, ClassifyConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.tasks.mixing import ImageMixingConfig, WaveformMixingConfig
from tests.interop.folders import tiny_config
from tests.model.tiny_joint import joint_batch


def task(config: ClassifyConfig) -> Classify:
    return Classify(config, tiny_config(config.modality), seed=0)


def labelled(modality: str, labels: torch.Tensor) -> Batch:
    batch = joint_batch(modality, seed=0)
    return replace(batch, masks=None, num_masked=0, labels=Labels(values=labels[: len(batch.source)]))


@pytest.mark.parametrize("mixing", [ImageMixingConfig(cutmix=0.0), ImageMixingConfig(mixup=0.0)])
def test_raw_pixels_are_normalised_before_they_are_mixed(mixing: ImageMixingConfig) -> None:
    config = ClassifyConfig(modality="image", num_outputs=3, head=PatchHeadConfig(), image_mixing=mixing)
    batch = labelled("image", torch.tensor([0, 2, 1, 0]))
    raw = torch.randint(0, 256, batch.source.shape, dtype=torch.uint8)
    floats = normalise_pixels(raw, torch.float32)
    torch.manual_seed(3)
    of_raw = task(config).mixed(replace(batch, source=raw))
    torch.manual_seed(3)
    of_floats = task(config).mixed(replace(batch, source=floats))
    assert torch.equal(of_raw.source, of_floats.source)
    assert of_raw.source.abs().max() < 4, "normalised pixels lie within about 2.7"
    assert of_raw.labels is not None and of_floats.labels is not None
    assert torch.equal(of_raw.labels.values, of_floats.labels.values)


def test_a_linear_classifier_trains_the_head_alone_behind_an_encoder_in_training_mode() -> None:
    """`linear_classifier` of the official mae_image_classification: no gradient in the encoder, drop path active."""
    config = ClassifyConfig(modality="image", num_outputs=3, head=PatchHeadConfig(), drop_path=0.5,
                            freeze=(r"trunk\..*",))  # fmt: skip
    assert config.check(tiny_config("image")) == []
    built = task(config)
    network = built.build_network(activation_checkpointing=False)
    built.initialise(network, seed=1)
    batch = labelled("image", torch.tensor([0, 2, 1, 0]))
    first, again = (built.losses(network, batch, step) for step in (0, 1))
    assert not torch.equal(first.sums["cross_entropy"], again.sums["cross_entropy"]), "drop path is active"
    first.sums["cross_entropy"].backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {"head.norm.weight", "head.norm.bias", "head.proj.weight", "head.proj.bias"}


def test_validation_mixes_nothing() -> None:
    mixing = WaveformMixingConfig(least=0.5)
    head = FrameHeadConfig(pooling="mean")
    config = ClassifyConfig(modality="audio", kind="several", num_outputs=2, head=head, waveform_mixing=mixing)
    built = task(config)
    network = built.build_network(activation_checkpointing=False).eval()
    batch = labelled("audio", torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    first, again = (built.losses(network, batch, None) for _ in range(2))
    assert torch.equal(first.sums["binary"], again.sums["binary"])
    assert first.count == len(batch.source)


@pytest.mark.parametrize(("per_positive", "count"), [(False, 2.0), (True, 3.0)])
def test_the_mean_is_over_inputs_or_over_labels_that_hold(per_positive: bool, count: float) -> None:
    config = ClassifyConfig(modality="audio", kind="several", num_outputs=2, head=FrameHeadConfig(),
                            per_positive=per_positive)  # fmt: skip
    assert task(config).count(labelled("audio", torch.tensor([[1.0, 0.0], [1.0, 1.0]]))) == count


def test_a_number_is_learned_over_its_scale() -> None:
    config = ClassifyConfig(modality="text", kind="number", scale=5.0, head=SentenceHeadConfig())
    assert task(config).encoder().encode(["2.5", "5"]).values.tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="expected a finite number, found 'nan'"):
        task(config).encoder().encode(["nan"])


def test_classes_are_ordered_by_name_or_by_frequency() -> None:
    counts = Counter({"b": 3, "a": 1, "c": 3})
    config = ClassifyConfig(modality="image")
    assert config.names_of(counts) == ("a", "b", "c")
    assert replace(config, class_order="frequency").names_of(counts) == ("b", "c", "a")
    several = replace(config, kind="several", divider=";")
    assert several.names_of(Counter({"x;y": 2, "y": 1})) == ("x", "y")
    assert several.with_names(("x", "y")).build(tiny_config("image"), 0).encoder().encode(
        ["y; x", ""]
    ).values.tolist() == [
        [1.0, 1.0],
        [0.0, 0.0],
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modality": "audio"}, "head.kind is 'patches', audio needs sentence or frames"),
        ({"head": SentenceHeadConfig()}, "head.kind is 'sentence', image needs patches"),
        ({"head": PatchHeadConfig(pooling="cls")}, "the network has no extra token"),
        ({"image_mixing": ImageMixingConfig(), "kind": "several"}, "image_mixing is for images with one class each"),
        ({"waveform_mixing": WaveformMixingConfig(least=0.5)}, "waveform_mixing is for recordings with several labels"),
        ({"kind": "number", "label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ({"per_positive": True}, "per_positive is for several labels"),
        ({"freeze": ("encoders.*",)}, "freeze: no parameter has a name that matches 'encoders.*'"),
        ({"freeze": ("(",)}, "freeze: '(' is no regular expression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    config = replace(ClassifyConfig(modality="image", num_outputs=2, head=PatchHeadConfig()), **changes)
    trunk = tiny_config(config.modality)
    if "image" in trunk.modalities:
        own = replace(trunk.modalities["image"], num_extra_tokens=0)
        trunk = replace(trunk, modalities={"image": own})
    problems = config.check(trunk)
    assert any(said in problem for problem in problems), problems


def test_the_class_named_1_is_the_positive_one() -> None:
    config = ClassifyConfig(modality="text", classes=("1", "0"), head=SentenceHeadConfig())
    assert task(config).positive == 0
    assert task(replace(config, classes=("bad", "good"))).positive == 1
