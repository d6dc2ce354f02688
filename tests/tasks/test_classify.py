"""Mixing inside a training step, and what the three kinds of labels count."""

import math
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score

from d2v2ds.batch import Batch, Labels
from d2v2ds.distributed import comm
from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.model.local import normalise_pixels
from d2v2ds.objectives.protocol import Totals
from d2v2ds.tasks.classify import Classify, ClassifyConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.tasks.mixing import ImageMixingConfig, WaveformMixingConfig
from d2v2ds.train.sums import Sums
from d2v2ds.train.validate import MOST_KEPT, _check_kept
from tests.interop.folders import tiny_config
from tests.model.tiny_joint import joint_batch
from tests.ranks import run_distributed


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


# --- scores that need all rows ---------------------------------------------------------------------------------------


def rows_with(built: Classify, labels: torch.Tensor) -> Batch:
    """A batch of empty inputs with these labels."""
    rows = len(labels)
    source, ids = torch.zeros(rows, 8), torch.arange(rows)
    return Batch(modality=built.config.modality, source=source, ids=ids, labels=Labels(values=labels))


def totals_of(built: Classify, batches: list[tuple[torch.Tensor, torch.Tensor]], world: int = 1, rank: int = 0) -> Any:
    """Totals of a validation whose micro-batches have these outputs and labels; a filler stands before them."""
    sums = Sums()
    for number, (logits, labels) in enumerate([batches[0], *batches]):
        batch = rows_with(built, labels)
        losses = built.losses(lambda *_, logits=logits: {"logits": logits}, batch, None)
        if number == 0 or number % world == rank:
            sums.add(losses, float(number > 0))
    return sums.reduce()


def number_task() -> tuple[Classify, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    config = ClassifyConfig(modality="text", kind="number", scale=5.0, head=SentenceHeadConfig())
    wanted = [(torch.randint(0, 11, (rows,), generator=generator) / 10).float() for rows in (5, 1, 8)]  # with ties
    found = [(one[:, None] + torch.randn(len(one), 1, generator=generator)).half().float() for one in wanted]
    return task(config), list(zip(found, wanted, strict=True))


def label_task() -> tuple[Classify, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    config = ClassifyConfig(modality="audio", kind="several", num_outputs=6, head=FrameHeadConfig())
    wanted = [(torch.rand(rows, 6, generator=generator) < 0.3).float() for rows in (9, 2, 4)]
    for one in wanted:
        one[:, 4] = 0.0  # a class that does not occur is left out
    found = [(one + torch.randn(one.shape, generator=generator)).round(decimals=1) for one in wanted]  # with ties
    return task(config), list(zip(found, wanted, strict=True))


def expected_scores(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    found, wanted = (torch.cat(parts).double().numpy() for parts in zip(*batches, strict=True))
    if found.shape[1] == 1:
        return {
            "score/pearson": 100 * float(pearsonr(wanted, found[:, 0])[0]),
            "score/spearman": 100 * float(spearmanr(wanted, found[:, 0])[0]),
        }
    occurs = wanted.any(0)
    return {"score/map": 100 * float(average_precision_score(wanted[:, occurs], found[:, occurs]))}


@pytest.mark.parametrize("make", [number_task, label_task])
def test_scores_of_a_validation_are_those_of_the_libraries(make: Any) -> None:
    built, batches = make()
    found = built.metrics(built.config.modality, totals_of(built, batches))
    assert scores_of(found) == pytest.approx(expected_scores(batches), abs=1e-9)
    assert built.units.keys() >= found.keys() and set(built.headline) >= scores_of(found).keys()


def scores_of(values: dict[str, float]) -> dict[str, float]:
    """Without what a diagnosis reads."""
    return {name: value for name, value in values.items() if name.startswith("score/")}


def test_training_keeps_no_outputs() -> None:
    built, batches = label_task()
    batch = rows_with(built, batches[0][1])
    losses = built.losses(lambda *_: {"logits": batches[0][0]}, batch, 3)
    assert losses.kept == {} and built.kept_numbers == 6
    totals = Totals({"binary": 1.0}, 1.0, {})
    assert scores_of(built.metrics("audio", totals)) == {}, "a record of training has no such scores"


def on_ranks() -> list[dict[str, float]]:
    parts = [make() for make in (number_task, label_task)]
    totals = [totals_of(built, batches, comm.world(), comm.rank()) for built, batches in parts]
    return [scores_of(built.metrics("", one)) for (built, _), one in zip(parts, totals, strict=True)]


@pytest.mark.distributed
def test_scores_are_the_same_on_two_ranks() -> None:
    expected = [expected_scores(make()[1]) for make in (number_task, label_task)]
    for found in run_distributed(on_ranks, 2):
        assert found == [pytest.approx(one, abs=1e-9) for one in expected]


@pytest.mark.parametrize(
    ("kind", "select", "value"),
    [
        ("one", None, 30.0),
        ("one", ("accuracy", "f1"), 100 - (70 + 40) / 2),
        ("one", ("mcc",), 120.0),
        ("one", ("loss",), 0.5),
        ("one", ("accuracy", "other/accuracy"), 100 - (70 + 20) / 2),
        ("one", ("other/loss",), 0.9),
        ("one", ("third/accuracy",), None),
        ("several", None, 0.5),
        ("several", ("map",), 90.0),
        ("number", None, 0.5),
        ("number", ("pearson", "spearman"), 15.0),
    ],
)
def test_the_best_checkpoint_is_that_of_the_selected_scores(
    kind: Any, select: tuple[Any, ...] | None, value: float | None
) -> None:
    scores = {"accuracy": 70.0, "f1": 40.0, "mcc": -20.0, "map": 10.0, "pearson": 80.0, "spearman": 90.0}
    values = {f"valid/score/{name}": score for name, score in scores.items()} | {"valid/loss/total": 0.5}
    values |= {"valid/other/score/accuracy": 20.0, "valid/other/loss/total": 0.9}
    built = task(ClassifyConfig(modality="text", kind=kind, head=SentenceHeadConfig(), select=select))
    assert built.selection(values) == pytest.approx(value)
    assert built.selection({"loss/total": 1.0}) is None, "without a validation nothing is chosen"


def test_scores_that_so_many_classes_do_not_have_cannot_be_selected() -> None:
    names = tuple(map(str, range(201)))
    config = ClassifyConfig(modality="text", classes=names, head=SentenceHeadConfig(), select=("accuracy", "f1"))
    with pytest.raises(ConfigError, match="objective.select: f1 needs at most 200 classes, found 201"):
        task(config).check_validation()
    task(replace(config, select=("accuracy",))).check_validation()
    task(replace(config, classes=names[:200])).check_validation()


def test_a_missing_library_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="scores need scikit-learn"):
        number_task()[0].check_validation()
    task(ClassifyConfig(modality="text", num_outputs=2, head=SentenceHeadConfig())).check_validation()


def test_outputs_that_are_not_finite_have_no_precision() -> None:
    built, batches = label_task()
    batches[1][0][0, 0] = float("nan")
    assert math.isnan(built.metrics("audio", totals_of(built, batches))["score/map"])


def test_scores_copy_one_class_at_a_time() -> None:
    built, _ = label_task()
    rows, classes = 20_000, 6
    kept = {"found": torch.randn(rows, classes), "wanted": torch.rand(rows, classes) < 0.1}
    totals = Totals({"binary": 1.0}, 1.0, {}, kept)
    few = Totals({"binary": 1.0}, 1.0, {}, {name: numbers.repeat(1, 20) for name, numbers in kept.items()})
    peaks = []
    for one in (totals, few):
        tracemalloc.start()
        built.metrics("audio", one)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2 * 19 * rows * classes, "bytes: no copy of all numbers, which have 4 bytes each"


def test_more_outputs_than_fit_are_refused() -> None:
    _check_kept("audio", MOST_KEPT // 527, 527)
    _check_kept("text", 10**12, 0)
    with pytest.raises(ConfigError, match="valid.audio: 527 numbers of 200,000 rows.*at most 127,341 rows; lower"):
        _check_kept("audio", 200_000, 527)
