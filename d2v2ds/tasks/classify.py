"""Classes, several labels at once, or a number for each input: images, sentences, recordings.

Sources: the official examples/data2vec, models mae_image_classification, data2vec_text_classification and
audio_classification; the YAML files have the settings of each.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.batch import Batch, Labels
from d2v2ds.bounds import Count, Positive, Share
from d2v2ds.errors import ConfigError
from d2v2ds.labels import ClassNumbers, ClassSets, LabelEncoder, Numbers
from d2v2ds.model.local import normalise_pixels
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.protocol import Course, Losses, Symptom, Totals
from d2v2ds.tasks.diagnosis import (
    INPUT_UNITS,
    LEAST_WANTED,
    class_symptoms,
    input_metrics,
    input_sums,
    input_symptoms,
    loss_symptoms,
)
from d2v2ds.tasks.encoding import TaskConfig, TaskNetwork
from d2v2ds.tasks.erasing import ErasingConfig, erase
from d2v2ds.tasks.heads import HeadConfig, PatchHeadConfig
from d2v2ds.tasks.mixing import (
    ImageMixingConfig,
    WaveformMixingConfig,
    draw_image_mix,
    draw_waveform_mix,
    mix_classes,
    mix_images,
    mix_labels,
    mix_waveforms,
)
from d2v2ds.tasks.scores import confusion_scores, correlation, mean_average_precision, sklearn_metrics, spearman
from d2v2ds.tasks.selection import LOSS, score_of, select_faults, selected_mean
from d2v2ds.tasks.task import Task

LossKind = Literal["one", "several", "number"]
_LOSS_NAMES: Mapping[LossKind, str] = {"one": "cross_entropy", "several": "binary", "number": "square"}
_SCORES: dict[LossKind, tuple[str, ...]] = {
    "one": ("accuracy", "balanced_accuracy", "f1", "mcc"),
    "several": ("map",),
    "number": ("pearson", "spearman"),
}
"""Scores of a validation, by kind of loss; the loss besides."""
_CONFUSION_CLASSES = 200
"""Most classes whose confusion is counted in validation."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TaskConfig):
    """Settings of classification and regression."""

    name: Literal["classify"] = "classify"
    kind: LossKind = "one"
    """One class for each input (cross entropy), several labels (binary cross entropy), or a number (squared error)."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of the outputs; empty: those of the training shards."""
    class_order: Literal["name", "frequency"] = "name"
    """Order of classes that are counted: by name, or most frequent first, as in the official code for sentences."""
    divider: str = ","
    """Character between the labels of one row, where it has several."""
    num_outputs: Count = 1
    """C where classes have no names."""
    head: HeadConfig = PatchHeadConfig()
    """Head by its `kind`."""
    scale: Positive = 1.0
    """Largest wanted number: the network learns the numbers over it (5 for STS-B)."""
    label_smoothing: Share = 0.0
    """Share of a label that is spread evenly over all classes in training."""
    erasing: ErasingConfig | None = None
    """Random erasing of images, before they are mixed; None for none."""
    image_mixing: ImageMixingConfig | None = None
    """Mixup and cutmix of images; None for none."""
    waveform_mixing: WaveformMixingConfig | None = None
    """Mixing of recordings; None for none."""
    per_positive: bool = False
    """With several labels, True: the loss is a mean over all labels that hold, as in the official code. False: over
    inputs."""

    label_column = "label"

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        problems = super().check(trunk)
        network = trunk.modalities.get(self.modality)
        if network is None:
            return problems  # `RunConfig.check` reports this
        is_grid = network.grid_columns is not None
        if isinstance(self.head, PatchHeadConfig) != is_grid:
            fitting = "patches" if is_grid else "sentence or frames"
            problems.append(f"head.kind is {self.head.kind!r}, {self.modality} needs {fitting}")
        if isinstance(self.head, PatchHeadConfig) and self.head.pooling == "cls" and not network.num_extra_tokens:
            problems.append("head.pooling is 'cls', and the network has no extra token")
        if self.erasing is not None:
            problems += self.erasing.check() if is_grid else ["erasing is for images"]
        if self.image_mixing is not None and not (is_grid and self.kind == "one"):
            problems.append("image_mixing is for images with one class each")
        if self.waveform_mixing is not None and not (not is_grid and self.kind == "several"):
            problems.append("waveform_mixing is for recordings with several labels (kind: several)")
        if self.label_smoothing and self.kind != "one":
            problems.append(f"label_smoothing is {self.label_smoothing}, it is for one class (kind: one)")
        if self.per_positive and self.kind != "several":
            problems.append("per_positive is for several labels (kind: several)")
        return problems + select_faults(self.select, _SCORES[self.kind], f"kind: {self.kind}")

    @property
    def counts_outputs(self) -> bool:
        """True without classes."""
        return self.kind != "number" and not self.classes

    def names_of(self, annotations: Counter[str]) -> tuple[str, ...]:
        """Return the classes of labels."""
        found: Counter[str] = Counter()
        for label, count in annotations.items():
            for name in ClassSets((), self.divider).split(label) if self.kind == "several" else [label]:
                found[name] += count
        by_count = self.class_order == "frequency"
        return tuple(sorted(found, key=lambda name: (-found[name] if by_count else 0, name)))

    @property
    def names(self) -> tuple[str, ...]:
        """Classes."""
        return self.classes

    def with_names(self, names: tuple[str, ...]) -> "ClassifyConfig":
        """Return these settings with classes."""
        return replace(self, classes=names)

    def build(self, trunk: TrunkConfig, seed: int) -> "Classify":
        """Build the objective of a run."""
        return Classify(self, trunk, seed)


class ClassifyOutput(TypedDict):
    """Output of one forward."""

    logits: Tensor
    """(B, C)."""


class ClassifyNetwork(TaskNetwork):
    """Trunk and a head that makes one vector of an input."""

    def __init__(
        self, trunk: TrunkConfig, config: ClassifyConfig, num_outputs: int, *, activation_checkpointing: bool = False
    ) -> None:
        """
        Args:
            trunk: settings of the trunk.
            config: settings of the task.
            num_outputs: C.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__(trunk, config, activation_checkpointing=activation_checkpointing)
        self.head = config.head.build(trunk.block.width, num_outputs)

    def forward(self, batch: Batch, kept_blocks: list[bool] | None = None, frozen: bool = False) -> ClassifyOutput:
        """See `TaskNetwork.encode`."""
        features, padding = self.encode(batch, kept_blocks, frozen)  # (B, E + T, D), (B, T)
        num_extra = self.trunk.encoder(batch.modality).num_extra_tokens
        return ClassifyOutput(logits=self.head(features, num_extra, padding))


def one_class_losses(logits: Tensor, classes: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of every row, (B,) fp32, with (B,) classes or (B, C) shares."""
    return F.cross_entropy(
        logits.float(), classes, reduction="none", label_smoothing=0.0 if classes.is_floating_point() else smoothing
    )


def several_label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of every row, summed over classes: (B, C), (B, C) -> (B,) fp32."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").sum(1)


def number_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of every row: (B, 1), (B,) -> (B,) fp32."""
    return (logits.float()[:, 0] - wanted).square()


def _normalised(images: Tensor) -> Tensor:
    """Normalise raw pixels; floats are normalised already, as the local encoder takes them."""
    return normalise_pixels(images, torch.float32) if images.dtype == torch.uint8 else images


def _counts(numbers: Tensor, size: int) -> Tensor:
    """Count each number, (B,) -> (size,) fp64; without the device sync of `torch.bincount`, for every step counts."""
    ones = torch.ones(len(numbers), dtype=torch.float64, device=numbers.device)
    return ones.new_zeros(size).index_add_(0, numbers, ones)


class Classify(Task[ClassifyConfig]):
    """`Objective` of classification and regression."""

    units: Mapping[str, str] = {
        **INPUT_UNITS,
        "loss/cross_entropy": "-ln p(class | input); mean over inputs",
        "loss/binary": "binary cross entropy, summed over classes; mean over inputs, or over labels that hold",
        "loss/square": "squared error; mean over inputs",
        "score/accuracy": "inputs whose most likely class is the right one; percent",
        "score/missed_classes": f"classes of {LEAST_WANTED} inputs or more in the interval that none was taken for",
        "score/balanced_accuracy": "the same by class, mean over classes that occur; percent, validation only",
        "score/f1": "harmonic mean of precision and recall, of class 1 of two, else mean over classes; percent",
        "score/mcc": "Matthews correlation; times 100, validation only",
        "score/pearson": "correlation of predicted and wanted numbers; times 100",
        "score/spearman": "correlation of their ranks; times 100, validation only",
        "score/map": "average precision; mean over classes that occur; percent, validation only",
    }

    headline: tuple[str, ...] = tuple(f"score/{name}" for names in _SCORES.values() for name in names)

    @property
    def num_outputs(self) -> int:
        """C."""
        return len(self.config.classes) or self.config.num_outputs

    @property
    def positive(self) -> int:
        """Class of two whose F1 is meant: that named 1, else the second."""
        return self.config.classes.index("1") if "1" in self.config.classes else 1

    @property
    def kept_numbers(self) -> int:
        """Outputs of a row that have to be compared with those of all others; labels besides."""
        return 0 if self.config.kind == "one" else self.num_outputs

    def new_network(self, activation_checkpointing: bool) -> ClassifyNetwork:
        """Build encoder and head."""
        return ClassifyNetwork(
            self.trunk, self.config, self.num_outputs, activation_checkpointing=activation_checkpointing
        )

    def encoder(self) -> LabelEncoder:
        """Number classes, mark several, or read numbers."""
        if self.config.kind == "number":
            return Numbers(self.config.scale)
        if self.config.kind == "several":
            return ClassSets(self.config.classes, self.config.divider)
        return ClassNumbers(self.config.classes)

    def count(self, batch: Batch) -> float:
        """Return the number of inputs, or of labels that hold."""
        return float(batch.required_labels().values.sum()) if self.config.per_positive else len(batch.ids)

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Erase and mix a training batch, run it, and score it."""
        hard, count = batch.required_labels().values, self.count(batch)
        if step is not None:
            batch = self.mixed(self.erased(batch))
        out: ClassifyOutput = network(batch, self.kept_blocks(step), self.is_frozen(step))
        logits, wanted = out["logits"], batch.required_labels().values
        smoothing = 0.0 if step is None else self.config.label_smoothing
        if self.config.kind == "one":
            each = one_class_losses(logits, wanted, smoothing)
        elif self.config.kind == "several":
            each = several_label_losses(logits, wanted)
        else:
            each = number_losses(logits, wanted)
        statistics, kept = self._statistics(logits.detach(), hard, step) | input_sums(batch), {}
        if step is None and self.kept_numbers:
            is_several = self.config.kind == "several"
            kept = {"found": logits.detach().float(), "wanted": wanted.bool() if is_several else wanted}
        sums = {_LOSS_NAMES[self.config.kind]: each.sum()}
        return Losses(sums=sums, count=count, statistics=statistics, kept=kept, output=out)

    def symptoms(self, course: Course) -> list[Symptom]:
        """Say why an accuracy may stay at chance."""
        loss, frozen = f"loss/{_LOSS_NAMES[self.config.kind]}", self.config.freeze_steps
        found = input_symptoms(course) + loss_symptoms(course, loss, frozen_steps=frozen)
        return found + class_symptoms(course, self.num_outputs)

    def erased(self, batch: Batch) -> Batch:
        """Erase boxes of a training batch as the settings say."""
        if self.config.erasing is None:
            return batch
        return replace(batch, source=erase(_normalised(batch.source), self.config.erasing))

    def mixed(self, batch: Batch) -> Batch:
        """Mix a training batch as the settings say."""
        config, labels = self.config, batch.required_labels().values
        if config.image_mixing is not None and config.kind == "one":
            mix = draw_image_mix(config.image_mixing, *batch.source.shape[-2:])
            soft = mix_classes(labels, self.num_outputs, config.label_smoothing, mix)
            return replace(batch, source=mix_images(_normalised(batch.source), mix), labels=Labels(values=soft))
        if config.waveform_mixing is not None:
            waves = draw_waveform_mix(config.waveform_mixing, len(labels))
            soft = mix_labels(labels, waves) if config.waveform_mixing.labels else labels
            # the official code leaves the end of a longer partner in the padding
            source = mix_waveforms(batch.source, batch.padding if self.config.hide_padding else None, waves)
            return replace(batch, source=source, labels=Labels(values=soft))
        return batch

    def check_validation(self) -> None:
        """Check that the scores of a validation can be computed.

        Raises:
            ConfigError: `select` names one that is not computed for so many classes.
            MissingExtraError: scikit-learn is not installed, and scores need it.
        """
        if self.kept_numbers:
            sklearn_metrics()
        names = [name for name in self.config.select or () if score_of(name) not in ("accuracy", LOSS)]
        if self.config.kind == "one" and names and self.num_outputs > _CONFUSION_CLASSES:
            raise ConfigError(
                f"objective.select: {', '.join(names)} needs at most {_CONFUSION_CLASSES} classes, found "
                f"{self.num_outputs}; select accuracy or loss"
            )

    def selection(self, values: Mapping[str, float]) -> float | None:
        """Return 100 less the mean of the selected scores, or the loss."""
        names = self.config.select or (("accuracy",) if self.config.kind == "one" else (LOSS,))
        found = selected_mean(names, "score", values)
        return found if found is None or score_of(names[0]) == LOSS else 100.0 - found

    def _statistics(self, logits: Tensor, labels: Tensor, step: int | None) -> dict[str, Tensor]:
        """Sums from which `metrics` computes scores."""
        if self.config.kind == "number":
            pair = torch.stack((logits[:, 0].double(), labels.double()))  # (2, B)
            return {"moments": torch.cat((pair.sum(1), pair @ pair[0], (pair[1] ** 2).sum()[None]))}
        if self.config.kind == "several":
            return {}
        if labels.is_floating_point():
            labels = labels.argmax(1)
        found = logits.argmax(-1)
        size = self.num_outputs
        by_class = [_counts(which, size) for which in (labels, found)]
        statistics = {"correct": (found == labels).sum().double(), "by_class": torch.stack(by_class)}
        if step is None and size <= _CONFUSION_CLASSES:
            statistics["confusion"] = _counts(labels * size + found, size * size).view(size, size)
        return statistics

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Compute scores."""
        values = input_metrics(totals.statistics)
        kept = totals.kept
        if self.config.kind == "number":
            values["score/pearson"] = 100 * correlation(totals.statistics["moments"], totals.count)
            if kept:
                values["score/spearman"] = 100 * spearman(
                    kept["wanted"].double().numpy(), kept["found"][:, 0].double().numpy()
                )
            return values
        if self.config.kind == "several":
            if kept:
                values["score/map"] = 100 * mean_average_precision(kept["wanted"].numpy(), kept["found"].numpy())
            return values
        values["score/accuracy"] = 100 * float(totals.statistics["correct"]) / totals.count
        wanted, predicted = totals.statistics["by_class"]
        values["score/missed_classes"] = float(((wanted >= LEAST_WANTED) & (predicted == 0)).sum())
        if "confusion" in totals.statistics:
            scores = confusion_scores(totals.statistics["confusion"], self.positive)
            values |= {f"score/{name}": 100 * value for name, value in scores.items()}
        return values
