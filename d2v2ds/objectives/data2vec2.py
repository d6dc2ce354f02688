"""data2vec 2.0 (arXiv 2212.07525): predict the teacher's features of masked tokens.

`Data2Vec2Network.forward` is one training step up to the loss, in the paper's order: embed each sample once, make the
teacher's targets, encode the visible tokens of every mask, decode, and score the masked tokens. `Data2Vec2` is the
objective around it: masks, teacher update, metrics and health.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.masking import MaskConfig, masked_count
from d2v2ds.model.init import initialise, redraw_projection, trunk_parts
from d2v2ds.model.network import AnyDecoder, NetworkSettings
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.averaged import AveragedTeacher
from d2v2ds.objectives.data2vec2_metrics import UNITS, health_limits, prediction_losses, prediction_metrics
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.flops import step_flops
from d2v2ds.objectives.loss import LossConfig, cls_loss, regression_loss, utterance_prediction
from d2v2ds.objectives.protocol import (
    HealthBounds,
    HealthLimit,
    Losses,
    Totals,
    Vectors,
)
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.rng import kept_layers

TeacherFn = Callable[[Batch, Tensor], Tensor]
"""(batch, local (B, T, D) detached) -> targets (B, T, D) fp32."""


@dataclass(frozen=True, kw_only=True)
class ModalityConfig:
    """Settings of the objective for one modality."""

    share_local_encoder: bool
    """True: the teacher reads the student's local features (published for speech and text). False: it has its own local
    encoder (published for images), which also keeps the targets of small speech runs from encoding only positions."""
    mask: MaskConfig
    """Masks over the tokens of an input."""
    decoder: AnyDecoder
    """Decoder that predicts the masked tokens."""
    target: TargetConfig
    """Targets from the teacher's layers."""
    loss: LossConfig = LossConfig()
    """Form and scale of the loss."""


@dataclass(frozen=True, kw_only=True)
class Data2Vec2Config:
    """Settings of data2vec 2.0."""

    name: Literal["data2vec2"] = "data2vec2"
    ema: EmaConfig
    """Decay of the teacher."""
    modalities: Mapping[str, ModalityConfig]
    """Settings by modality."""

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        problems = []
        for name, own in self.modalities.items():
            if name not in trunk.modalities:
                continue  # `RunConfig.check` reports this
            network: NetworkSettings = trunk.modalities[name]
            faults = own.mask.check() + own.mask.grid_faults(network.grid_columns)
            faults += own.target.check(trunk.shared_depth) + own.loss.check(network.num_extra_tokens)
            faults += network.decoder_faults(own.decoder, trunk.block.width)
            if network.needs_all_tokens:
                faults.append("data2vec2 encodes visible tokens alone, found relative positions, which need all tokens")
            problems += [f"modalities.{name}: {fault}" for fault in faults]
        return problems

    def scaled(self, ratio: float) -> dict[str, float]:
        """Return the settings of a global batch `ratio` times as large, equivalent per sample (arXiv 2307.13813)."""
        return self.ema.scaled(ratio)

    def build(self, trunk: TrunkConfig, seed: int) -> "Data2Vec2":
        """Build the objective of a run."""
        return Data2Vec2(self, trunk, seed)


class StudentOutput(TypedDict):
    """Output of one forward; sums are over this rank's rows. A dict, because ZeRO-3 must find the tensors."""

    losses: dict[str, Tensor]
    """Scalar fp32 sums by name."""
    local: Tensor
    """(B, T, D) local features, detached."""
    context: Tensor
    """(R, K, D) output of the last shared block, detached."""
    pred: Tensor
    """(U, D) predictions at masked tokens, detached."""
    wanted: Tensor
    """(U, D) fp32 targets at the same tokens."""
    target: Tensor
    """(B, T, D) fp32 targets."""
    cls: Tensor
    """(R, D) prediction of the mean target, see `LossConfig.utterance`, detached; (R, 0) without a CLS loss."""
    cls_wanted: Tensor
    """(R, D) fp32 mean over tokens of each row's target; (R, 0) without a CLS loss."""


class Data2Vec2Network(nn.Module):
    """Student: a trunk and one decoder for each modality."""

    def __init__(
        self,
        trunk: TrunkConfig,
        modalities: Mapping[str, ModalityConfig],
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            trunk: settings of the trunk.
            modalities: settings of the objective by modality.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        self.modalities = {name: modalities[name] for name in trunk.modalities}
        self.trunk = Trunk(trunk, activation_checkpointing=activation_checkpointing)
        self.decoders = nn.ModuleDict(
            {
                name: settings.build_decoder(self.modalities[name].decoder, trunk.block.width)
                for name, settings in trunk.modalities.items()
            }
        )

    def forward(self, batch: Batch, teacher: TeacherFn, kept_blocks: list[bool] | None = None) -> StudentOutput:
        """
        Args:
            batch: one micro-batch with masks.
            teacher: makes targets from the batch and the local features; its weights are not part of this module.
            kept_blocks: layer drop of the shared blocks, the same on all ranks; None keeps all.

        Returns:
            Summed losses, and the tensors that metrics and health statistics read.
        """
        masks = batch.required_masks()
        keep, masked = masks.rows()  # (R, K), (R, T)
        local = self.trunk.embed(batch)  # (B, T, D)
        require_token_count(local, masked, batch)
        target = teacher(batch, local.detach())  # (B, T, D)
        encoded = self.trunk.encode_visible(local, batch, kept_blocks)  # (R, E + K, D)
        num_extra = encoded.shape[1] - keep.shape[1]
        context = encoded[:, num_extra:]  # (R, K, D)
        decoded = self.decoders[batch.modality](context, keep, masked.shape[1])  # (R, T, D)
        pred = select_masked(decoded, masked, batch.num_masked)  # (U, D)
        wanted = select_masked(target.repeat_interleave(masks.num_masks, 0), masked, batch.num_masked)
        loss = self.modalities[batch.modality].loss
        losses = {"regression": regression_loss(pred, wanted, loss)}
        cls, cls_wanted = encoded.new_empty(len(encoded), 0), target.new_empty(len(encoded), 0)
        if loss.cls_weight:
            cls = utterance_prediction(encoded, num_extra, loss)  # (R, D)
            cls_wanted = target.mean(1).repeat_interleave(masks.num_masks, 0)  # (R, D)
            losses["cls"] = cls_loss(cls, cls_wanted, batch.num_masked, loss)
        return StudentOutput(
            losses=losses,
            local=local.detach(),
            context=context.detach(),
            pred=pred.detach(),
            wanted=wanted,
            target=target,
            cls=cls.detach(),
            cls_wanted=cls_wanted,
        )


def require_token_count(local: Tensor, masked: Tensor, batch: Batch) -> None:
    """Check that masks (R, T) are drawn for the tokens of the local features (B, T, D).

    Raises:
        ValueError: they are not.
    """
    if local.shape[1] != masked.shape[1]:
        raise ValueError(
            f"masks are drawn for {masked.shape[1]} tokens, the local encoder returns {local.shape[1]} "
            f"for source {tuple(batch.source.shape)}; data and model disagree on the number of tokens"
        )


def select_masked(x: Tensor, masked: Tensor, num_masked: int) -> Tensor:
    """Select the masked tokens (U, D) of (R, T, D), row-major; U is known in advance, which avoids a device sync."""
    index = masked.flatten().nonzero_static(size=num_masked).squeeze(1)  # (U,)
    return x.flatten(0, 1).index_select(0, index)


class Data2Vec2(AveragedTeacher):
    """`Objective` of data2vec 2.0: masks, networks, losses, metrics and health statistics."""

    units: Mapping[str, str] = UNITS

    def __init__(self, config: Data2Vec2Config, trunk: TrunkConfig, seed: int) -> None:
        """
        Args:
            config: settings.
            trunk: settings of the trunk.
            seed: of the run; layer drop draws from it.
        """
        self.config, self.trunk, self._seed = config, trunk, seed
        super().__init__(config.ema)

    def mask(self, modality: str) -> MaskConfig:
        """Masks of a modality."""
        return self.config.modalities[modality].mask

    def build_network(self, *, activation_checkpointing: bool) -> Data2Vec2Network:
        """Build the student."""
        return Data2Vec2Network(self.trunk, self.config.modalities, activation_checkpointing=activation_checkpointing)

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw the trunk, then each decoder from its own random stream."""
        assert isinstance(network, Data2Vec2Network)
        initialise(trunk_parts(network.trunk), seed)
        for name, decoder in network.decoders.items():
            initialise({f"decoders.{name}": decoder}, seed)
            if not self.trunk.modalities[name].has_small_decoder_projection:
                redraw_projection(decoder)

    def build_teacher_network(self) -> TeacherNetwork:
        """Build the teacher's network."""
        own = {name: self.config.modalities[name] for name in self.trunk.modalities}
        return TeacherNetwork(
            self.trunk,
            {name: settings.target for name, settings in own.items()},
            {name: settings.share_local_encoder for name, settings in own.items()},
        )

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run the student on one micro-batch; each step draws layer drop, validation has none."""
        drop_rate = 0.0 if step is None else self.trunk.layer_drop
        kept_blocks = kept_layers(self._seed, step or 0, self.trunk.shared_depth, drop_rate)
        out: StudentOutput = network(batch, self.teacher, kept_blocks)
        return prediction_losses(out, batch.num_masked, batch.required_masks().masked.numel())

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Count operations of student and teacher; the student's encoder reads visible tokens only."""
        own, tokens = self.config.modalities[modality], self.trunk.modalities[modality].num_tokens(size)
        visible = tokens - masked_count(own.mask, tokens)
        return step_flops(
            self.trunk,
            modality,
            decoder=own.decoder,
            share_local_encoder=own.share_local_encoder,
            num_samples=num_samples,
            size=size,
            num_masks=own.mask.num_masks,
            visible=visible,
        ).total

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe masks, masked and visible tokens."""
        mask = self.config.modalities[modality].mask
        masked = masked_count(mask, num_tokens)
        return f"{mask.num_masks} masks of {masked} masked and {num_tokens - masked} visible tokens"

    def count(self, batch: Batch) -> int:
        """Number of masked tokens."""
        return batch.num_masked

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Return masked fraction, spread of predictions and targets, and the explained variance of the targets."""
        loss = self.config.modalities[modality].loss
        factor = None if loss.beta else loss.factor(self.trunk.block.width)
        return prediction_metrics(totals, factor)

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield local features, contextualised tokens, targets and predictions."""
        out: StudentOutput = losses.output
        keep, masked = batch.required_masks().rows()  # (R, K), (R, T)
        length = masked.shape[1]
        every = torch.arange(length).repeat(len(out["local"]))  # (B*T,)
        yield Vectors("local", out["local"].flatten(0, 1), every, length, reports_std=True)
        yield Vectors("context", out["context"].flatten(0, 1), keep.flatten(), length, reports_std=True)
        yield Vectors("target", out["target"].flatten(0, 1), every, length)
        yield Vectors("pred", out["pred"], masked.nonzero()[:, 1], length)

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield predictions and targets at masked tokens."""
        out: StudentOutput = losses.output
        _, masked = batch.required_masks().rows()
        positions, length = masked.nonzero()[:, 1], masked.shape[1]
        yield Vectors("pred", out["pred"], positions, length)
        yield Vectors("target", out["wanted"], positions, length)

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Return the bounds that a collapsed run crosses."""
        return health_limits(bounds)
