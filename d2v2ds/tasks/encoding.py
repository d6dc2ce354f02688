"""Whole inputs through the trunk, as every fine-tuning task reads them: masked in training, nothing removed.

Source: the official examples/data2vec/models/modalities/base.py in fine-tuning, which masks the features themselves and
then adds the output of the position convolutions.
"""

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch, SpanMasks
from d2v2ds.bounds import Bounds, CountOrZero, PositiveOrZero, Rate, UserPath
from d2v2ds.masking import SpanMaskConfig
from d2v2ds.model.block import Block, set_drop_path
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.rng import kept_layers


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Settings that all tasks share."""

    label_column: ClassVar[str]
    """Annotation of packed rows that holds the label."""

    modality: str
    """Modality of the inputs."""
    outputs: UserPath | None = None
    """File with the names of the outputs: of `d2v2ds.outputs`, of a run (outputs.json), or an official dict.ltr.txt;
    None: those of the training shards."""
    mask: SpanMaskConfig = SpanMaskConfig()
    """Masks of the inputs in training; none by default."""
    mask_noise_std: PositiveOrZero = 0.01
    """Standard deviation of the noise that replaces masked features; 0 writes zeros."""
    prenet_layer_drop: Rate = 0.0
    """Probability of skipping a prenet block in training; that of shared blocks is `model.layer_drop`."""
    drop_path: Rate = 0.0
    """Stochastic depth of the last block; the rate grows linearly from 0 with the number of the block."""
    hide_padding: bool = True
    """Keep padding from changing the features of real tokens. False as in the official code, where the result of a row
    depends on the rows beside it."""
    freeze_steps: CountOrZero = 0
    """First optimizer steps in which the head alone learns; the encoder runs without gradient, with masks and
    dropout."""
    fill_frozen: bool = False
    """True: the optimizer counts the frozen steps of the encoder as steps with gradient zero, as published runs with
    several workers do; its first step after them is then 0.7 of the learning rate. False: it leaves them out."""
    freeze: tuple[str, ...] = ()
    """Parameters that are never trained: regular expressions that a whole name must match, such as
    `trunk\\.encoders\\..*`."""
    select: tuple[str, ...] | None = None
    """Scores of the validation whose mean decides which checkpoint is the best, such as [accuracy, f1], or [loss];
    those of a further set have its name in front, as in [mismatched/accuracy]. None: the accuracy of one class, the
    word error rate of CTC, else the loss, each of the first set."""
    layer_decay: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the block above it; everything that is no block has the full rate."""
    layer_decay_embeddings: bool = False
    """Count what is below the first block, such as the patch embedding and CLS tokens, as one more block: it gets the
    smallest rate, as in MAE (arXiv 2111.06377) and BEiT. False: the full rate, as in data2vec 2.0."""

    @property
    def counts_outputs(self) -> bool:
        """True if names of outputs are still to be counted in the training data."""
        return False

    def names_of(self, annotations: Counter[str]) -> tuple[str, ...]:
        """Return the names of the outputs for counted annotations."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs; empty where they are counted or have none."""
        return ()

    def with_names(self, names: tuple[str, ...]) -> Self:
        """Return these settings with names of outputs."""
        raise NotImplementedError

    @property
    def modalities(self) -> dict[str, "TaskConfig"]:
        """Settings by modality: there is one."""
        return {self.modality: self}

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        problems = []
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"freeze: {pattern!r} is no regular expression: {error}")
        if self.freeze and not problems and not trunk.check() and self.modality in trunk.modalities:
            with torch.device("meta"):
                names = [name for name, _ in self.build(trunk, 0).new_network(False).named_parameters()]
            problems += [
                f"freeze: no parameter has a name that matches {pattern!r}; there is for example {names[0]}"
                for pattern in self.freeze
                if not any(re.fullmatch(pattern, name) for name in names)
            ]
        for name, spans, limit in (("channels", self.mask.channels, trunk.block.width),):
            if spans is not None and spans.length >= limit:
                problems.append(f"mask.{name}.length {spans.length} must be below the {limit} {name}")
        return problems

    def build(self, trunk: TrunkConfig, seed: int) -> Any:
        """Build the objective of a run."""
        raise NotImplementedError

    def scaled(self, ratio: float) -> dict[str, float]:
        """Return nothing: no setting depends on the batch."""
        return {}


class MaskedFeatures(nn.Module):
    """Writes noise into masked tokens and zeros into masked channels."""

    def __init__(self, noise_std: float) -> None:
        super().__init__()
        self.noise_std = noise_std

    def forward(self, local: Tensor, masks: SpanMasks | None) -> Tensor:
        """(B, T, D) -> (B, T, D); unchanged in eval mode. Channels are zeroed in padded tokens too."""
        if masks is None or not self.training:
            return local
        if masks.time is not None:
            local = torch.where(masks.time[..., None], self.noise(local), local)
        if masks.channels is not None:
            local = local.masked_fill(masks.channels[:, None], 0)
        return local

    def noise(self, like: Tensor) -> Tensor:
        """Draw (B, T, D), or () zero."""
        return torch.randn_like(like) * self.noise_std if self.noise_std else like.new_zeros(())


class TaskNetwork(nn.Module):
    """Trunk and head; each task derives its own."""

    head: nn.Module

    def __init__(self, trunk: TrunkConfig, config: TaskConfig, *, activation_checkpointing: bool = False) -> None:
        """
        Args:
            trunk: settings of the trunk.
            config: settings of the task.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        self.trunk = Trunk(trunk, activation_checkpointing=activation_checkpointing)
        self.masked = MaskedFeatures(config.mask_noise_std)
        self.hide_padding = config.hide_padding
        set_drop_path(self.blocks(config.modality), config.drop_path, trunk.shared_depth)

    def blocks(self, modality: str) -> list[Block]:
        """Blocks of a modality: prenet, then shared."""
        return [*self.trunk.encoder(modality).prenet.blocks, *self.trunk.blocks]

    def encode(self, batch: Batch, kept_blocks: list[bool] | None, frozen: bool) -> tuple[Tensor, Tensor | None]:
        """Run trunk and masks.

        Args:
            batch: with span masks in training.
            kept_blocks: layer drop of prenet and shared blocks, the same on all ranks; None keeps all.
            frozen: run without gradient.

        Returns:
            (B, E + T, D) features of the last block, extra tokens first; (B, T) bool padding of tokens, or None.
        """
        with torch.no_grad() if frozen else nullcontext():
            local = self.masked(self.trunk.embed(batch), batch.span_masks)  # (B, T, D)
            features = self.trunk.encode_all(local, batch, kept_blocks, hide_padding=self.hide_padding)
        return features, self.trunk.encoder(batch.modality).token_padding(batch.padding, local.shape[1])


def draw_kept_blocks(trunk: TrunkConfig, config: TaskConfig, seed: int, step: int | None) -> list[bool] | None:
    """Draw the layer drop of one step for prenet and shared blocks; None, which keeps all, in validation."""
    prenet_depth = trunk.depth(config.modality) - trunk.shared_depth
    if step is None or not (trunk.layer_drop or config.prenet_layer_drop):
        return None
    prenet = kept_layers(seed, 2 * step + 1, prenet_depth, config.prenet_layer_drop) or [True] * prenet_depth
    return prenet + (kept_layers(seed, 2 * step, trunk.shared_depth, trunk.layer_drop) or [True] * trunk.shared_depth)
