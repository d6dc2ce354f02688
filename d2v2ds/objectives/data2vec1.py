"""data2vec 1.0 (arXiv 2202.03555): predict the teacher's features of masked tokens that stay in the sequence.

`Data2Vec1Network.forward` is one training step up to the loss: embed, make the teacher's targets from the unmasked
sequence, replace masked tokens, run the whole sequence, and score a head's output at the masked tokens. `Data2Vec1` is
the objective around it. Source: the official examples/data2vec/models/data2vec_audio.py, data2vec_text.py and
data2vec_vision.py, and the fork of BEiT that made the published image models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.bounds import Amount, CountOrZero, Rate
from d2v2ds.model.block import set_drop_path
from d2v2ds.model.flops import linear_flops
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.averaged import AveragedTeacher
from d2v2ds.objectives.data2vec1_init import FirstWeights, draw_images
from d2v2ds.objectives.data2vec1_modules import MaskVector, head
from d2v2ds.objectives.data2vec2 import TeacherFn, select_masked
from d2v2ds.objectives.data2vec2_metrics import UNITS, health_limits, prediction_losses, prediction_metrics
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.objectives.flops import whole_step_flops
from d2v2ds.objectives.loss import LossConfig, regression_loss
from d2v2ds.objectives.protocol import HealthBounds, HealthLimit, Losses, Totals, Vectors
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.rng import kept_layers
from d2v2ds.shapes import PAD_ID
from d2v2ds.whole_masks import WholeMask

TeacherInput = Literal["whole", "masked_tokens"]
"""Tokens that the teacher of text reads: all of them, or the masked ones alone with padding in between, as the released
training data of text does (https://github.com/facebookresearch/fairseq/issues/4881)."""


@dataclass(frozen=True, kw_only=True)
class WholeModalityConfig:
    """Settings of the objective for one modality."""

    share_local_encoder: bool
    """True: the teacher reads the student's unmasked local features (speech, images). False: it has its own local
    encoder (text, and the published image models)."""
    mask: WholeMask
    """Masks over the tokens of an input."""
    target: TargetConfig
    """Targets from the teacher's layers."""
    loss: LossConfig = LossConfig()
    """Form and scale of the loss. The published image models take a mean over channels: a scale of 1 / D."""
    head_layers: CountOrZero = 1
    """Linear layers of the head, with GELU between them and twice the model's width; 0: the trunk's output itself."""
    mask_token: Amount | Literal["last"] | None = None
    """Token id that replaces masked tokens (text); `last`: that of the vocabulary, where `pack_text` has ``<mask>``.
    None: a learned vector replaces their local features."""
    teacher_input: TeacherInput = "whole"
    """Tokens that the teacher reads; `masked_tokens` needs `mask_token`."""
    copied: tuple[str, ...] = ()
    """Parts of the teacher that are copied from the student and not averaged: names or beginnings of names below
    `trunk.encoders.NAME`, such as `positions` (speech) and `local` (text)."""
    first_weights: FirstWeights = "fairseq"
    """Distribution of the first weights: that of the official data2vec code for speech and text, or for images, or of
    BEiT (published image models)."""


@dataclass(frozen=True, kw_only=True)
class Data2Vec1Config:
    """Settings of data2vec 1.0."""

    name: Literal["data2vec1"] = "data2vec1"
    ema: EmaConfig
    """Decay of the teacher."""
    ema_per_micro_batch: bool = False
    """True: update the teacher before every micro-batch, as the official code does, also behind a skipped step, which
    makes its pace depend on the gradient accumulation. False: once after every optimizer step that is applied."""
    drop_path: Rate = 0.0
    """Stochastic depth of the student's last block; the rate grows linearly from 0 with the number of the block. The
    teacher has none."""
    modalities: Mapping[str, WholeModalityConfig]
    """Settings by modality."""

    def check(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each contradiction between fields, or with the trunk."""
        problems = []
        for name, own in self.modalities.items():
            if name not in trunk.modalities:
                continue  # `RunConfig.check` reports this
            faults = own.mask.check() + own.target.check(trunk.shared_depth)
            if own.loss.cls_weight:
                faults.append(f"loss.cls_weight is {own.loss.cls_weight}, data2vec 1.0 has no CLS loss")
            if own.teacher_input == "masked_tokens" and (own.mask_token is None or own.share_local_encoder):
                faults.append(
                    "teacher_input 'masked_tokens' needs mask_token and share_local_encoder=false: the teacher reads "
                    "other token ids than the student"
                )
            if own.mask_token is not None:
                faults += _mask_token_faults(own, getattr(trunk.modalities[name], "vocab_size", None))
            problems += [f"modalities.{name}: {fault}" for fault in faults]
        if self.drop_path and len({trunk.depth(name) for name in trunk.modalities}) > 1:
            problems.append(
                f"drop_path is {self.drop_path} and the modalities have different prenet_depth: the shared blocks "
                "would need several rates"
            )
        return problems + self._copied_faults(trunk)

    def _copied_faults(self, trunk: TrunkConfig) -> list[str]:
        """Return one message for each entry of `copied` that names no part of an encoder."""
        given = {name: self.modalities[name].copied for name in trunk.modalities if name in self.modalities}
        if not any(given.values()) or trunk.check():
            return []
        with torch.device("meta"):
            encoders = Trunk(trunk).encoders
        names = {name: [one for one, _ in encoders[name].named_parameters()] for name in given}
        return [
            f"modalities.{name}: copied: {part!r} begins the name of no parameter of the encoder, which has parts "
            + ", ".join(dict.fromkeys(one.split(".")[0] for one in names[name]))
            for name, parts in given.items()
            for part in parts
            if not any(one.startswith(part) for one in names[name])
        ]

    def scaled(self, ratio: float) -> dict[str, float]:
        """Return the settings of a global batch `ratio` times as large, equivalent per sample (arXiv 2307.13813)."""
        return self.ema.scaled(ratio)

    def build(self, trunk: TrunkConfig, seed: int) -> "Data2Vec1":
        """Build the objective of a run."""
        return Data2Vec1(self, trunk, seed)


def _mask_token_faults(own: WholeModalityConfig, vocab_size: int | None) -> list[str]:
    """Return one message for each reason why masked tokens cannot be replaced by another token."""
    faults = []
    if own.share_local_encoder:
        faults.append("mask_token needs share_local_encoder=false: the student's local features are masked")
    if vocab_size is None:
        faults.append(f"mask_token is {own.mask_token!r}, but inputs are no token ids; use null, a learned vector")
    elif own.mask_token != "last" and own.mask_token is not None and own.mask_token >= vocab_size:
        faults.append(f"mask_token is {own.mask_token}, expected an id below vocab_size {vocab_size}, or 'last'")
    return faults


def _with_token_id(own: WholeModalityConfig, network: Any) -> WholeModalityConfig:
    """Return the settings with the id of `mask_token` last."""
    return replace(own, mask_token=network.vocab_size - 1) if own.mask_token == "last" else own


class WholeOutput(TypedDict):
    """Output of one forward; sums are over this rank's rows. A dict, because ZeRO-3 must find the tensors."""

    losses: dict[str, Tensor]
    """Scalar fp32 sums by name."""
    local: Tensor
    """(B, T, D) local features before masking, detached; of text with masked ids."""
    context: Tensor
    """(B, T, D) output of the trunk, detached."""
    pred: Tensor
    """(U, D) predictions at masked tokens, detached."""
    wanted: Tensor
    """(U, D) fp32 targets at the same tokens."""
    target: Tensor
    """(B, T, D) fp32 targets."""


class Data2Vec1Network(nn.Module):
    """Student: a trunk, and a mask vector and a head for each modality."""

    def __init__(
        self,
        trunk: TrunkConfig,
        modalities: Mapping[str, WholeModalityConfig],
        *,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            trunk: settings of the trunk.
            modalities: settings of the objective by modality.
            drop_path: stochastic depth of the last block.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        self.modalities = {name: _with_token_id(modalities[name], own) for name, own in trunk.modalities.items()}
        self.trunk = Trunk(trunk, activation_checkpointing=activation_checkpointing)
        for name in trunk.modalities:
            set_drop_path([*self.trunk.encoder(name).prenet.blocks, *self.trunk.blocks], drop_path, trunk.shared_depth)
        width = trunk.block.width
        self.mask_vectors = nn.ModuleDict(
            {name: MaskVector(width) for name, own in self.modalities.items() if own.mask_token is None}
        )
        self.heads = nn.ModuleDict({name: head(width, own.head_layers) for name, own in self.modalities.items()})

    def forward(self, batch: Batch, teacher: TeacherFn, kept_blocks: list[bool] | None = None) -> WholeOutput:
        """
        Args:
            batch: one micro-batch with masks of whole inputs.
            teacher: makes targets from the batch and the local features; its weights are not part of this module.
            kept_blocks: layer drop of the shared blocks, the same on all ranks; None keeps all.

        Returns:
            Summed losses, and the tensors that metrics and health statistics read.
        """
        own, encoder, masked = self.modalities[batch.modality], self.trunk.encoder(batch.modality), masked_tokens(batch)
        local = self.trunk.embed(student_batch(batch, masked, own))  # (B, T, D)
        if local.shape[:2] != masked.shape:
            raise ValueError(
                f"masks are drawn for {tuple(masked.shape)} (B, T), the local encoder returns {tuple(local.shape)} "
                f"for source {tuple(batch.source.shape)}; data and model disagree on the number of tokens"
            )
        target = teacher(teacher_batch(batch, masked, own.teacher_input), local.detach())  # (B, T, D)
        x = self.mask_vectors[batch.modality](local, masked) if own.mask_token is None else local
        x = encoder.clear_padding(x, batch.padding)
        kept = None if kept_blocks is None else [True] * len(encoder.prenet.blocks) + kept_blocks
        context = self.trunk.encode_all(x, batch, kept, hide_padding=False)[:, encoder.num_extra_tokens :]  # (B, T, D)
        pred = self.heads[batch.modality](select_masked(context, masked, batch.num_masked))  # (U, D)
        wanted = select_masked(target, masked, batch.num_masked)  # (U, D)
        return WholeOutput(
            losses={"regression": regression_loss(pred, wanted, own.loss)},
            local=local.detach(),
            context=context.detach(),
            pred=pred.detach(),
            wanted=wanted,
            target=target,
        )


def masked_tokens(batch: Batch) -> Tensor:
    """Return (B, T) bool, True = masked.

    Raises:
        ValueError: the batch has no such masks.
    """
    if batch.span_masks is None or batch.span_masks.time is None:
        raise ValueError(f"Batch of {batch.modality}: expected masks of whole inputs, found none")
    return batch.span_masks.time


def student_batch(batch: Batch, masked: Tensor, own: WholeModalityConfig) -> Batch:
    """Return what the student embeds: masked token ids replaced, or the input as it is without `mask_token`."""
    if own.mask_token is None:
        return batch
    return replace(batch, source=batch.source.masked_fill(masked, int(own.mask_token)))


def teacher_batch(batch: Batch, masked: Tensor, teacher_input: TeacherInput) -> Batch:
    """Return what the teacher reads: the unmasked input, or its masked tokens with padding in place of the others."""
    if teacher_input == "whole":
        return batch
    return replace(batch, source=batch.source.masked_fill(~masked, PAD_ID), padding=~masked)


class Data2Vec1(AveragedTeacher):
    """`Objective` of data2vec 1.0: masks, networks, losses, metrics and health statistics."""

    units: Mapping[str, str] = {name: unit for name, unit in UNITS.items() if name != "loss/cls"} | {
        "optim/grad_norm/head": "norm of the head's gradient before clipping; every log_every_steps-th step; global"
    }

    def __init__(self, config: Data2Vec1Config, trunk: TrunkConfig, seed: int) -> None:
        """
        Args:
            config: settings.
            trunk: settings of the trunk.
            seed: of the run; layer drop draws from it.
        """
        self.config, self.trunk, self._seed = config, trunk, seed
        super().__init__(config.ema)
        self._last_step: int | None = None
        self._last_update: int | None = None

    def mask(self, modality: str) -> WholeMask:
        """Masks of a modality."""
        return self.config.modalities[modality].mask

    def build_network(self, *, activation_checkpointing: bool) -> Data2Vec1Network:
        """Build the student."""
        return Data2Vec1Network(
            self.trunk,
            self.config.modalities,
            drop_path=self.config.drop_path,
            activation_checkpointing=activation_checkpointing,
        )

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw the trunk, then mask vector and head of each modality from their own random streams."""
        assert isinstance(network, Data2Vec1Network)
        initialise(trunk_parts(network.trunk), seed)
        for name in network.modalities:
            own = self.config.modalities[name]
            parts = {f"heads.{name}": network.heads[name]}
            if own.mask_token is None:
                parts[f"mask_vectors.{name}"] = network.mask_vectors[name]
            initialise(parts, seed)
            if own.first_weights != "fairseq":
                draw_images(own.first_weights, network.trunk, name, parts.values(), seed)
            if own.first_weights != "beit" and not self.trunk.modalities[name].has_small_decoder_projection:
                for module in network.heads[name].modules():
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()

    def build_teacher_network(self) -> TeacherNetwork:
        """Build the teacher's network."""
        own = {name: self.config.modalities[name] for name in self.trunk.modalities}
        return TeacherNetwork(
            self.trunk,
            {name: settings.target for name, settings in own.items()},
            {name: settings.share_local_encoder for name, settings in own.items()},
            clear_padding=True,
        )

    def is_copied(self, name: str) -> bool:
        """Return True for the parts that settings name."""
        return any(
            name.startswith(f"trunk.encoders.{modality}.{part}")
            for modality, own in self.config.modalities.items()
            for part in own.copied
        )

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return the rule of BEiT: no decay of CLS tokens and parameters of one dimension, but of mask vectors."""
        return name.startswith("mask_vectors.") or (parameter.ndim > 1 and not name.endswith(".extra.tokens"))

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run the student on one micro-batch; each step draws layer drop, validation has none."""
        if self.config.ema_per_micro_batch and step is not None:
            self._update_again(step)
        drop_rate = 0.0 if step is None else self.trunk.layer_drop
        kept_blocks = kept_layers(self._seed, step or 0, self.trunk.shared_depth, drop_rate)
        out: WholeOutput = network(batch, self.teacher, kept_blocks)
        return prediction_losses(out, batch.num_masked, masked_tokens(batch).numel())

    def _update_again(self, step: int) -> None:
        """Update the teacher before a micro-batch; that of a step's first one followed the last step, unless skipped.

        Micro-batches of all modalities count.
        """
        was_skipped = self._last_step == step - 1 and self._last_update != step
        if step and (self._last_step == step or was_skipped):
            self.teacher.update(ema_decay(step, self.config.ema), again=True)
        self._last_step = step

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Count operations of student and teacher, which read all tokens; the head reads the masked ones."""
        own, width = self.config.modalities[modality], self.trunk.block.width
        masked = round(own.mask.expected(self.trunk.modalities[modality].num_tokens(size)))
        widths = [width] + [2 * width] * (own.head_layers - 1) + [width]
        of_head = linear_flops(widths, num_samples, masked) if own.head_layers else 0.0
        return whole_step_flops(
            self.trunk,
            modality,
            share_local_encoder=own.share_local_encoder,
            head=of_head,
            num_samples=num_samples,
            size=size,
        ).total

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe how many tokens are masked.

        Raises:
            ValueError: the masks cannot be drawn for so many tokens.
        """
        mask = self.config.modalities[modality].mask
        if fault := mask.fault(num_tokens):
            raise ValueError(fault)
        return f"about {mask.expected(num_tokens):.0f} of them masked, all in the sequence"

    def count(self, batch: Batch) -> int:
        """Number of masked tokens."""
        return batch.num_masked

    def after_step(self, step_number: int) -> None:
        """Update the teacher, once per applied optimizer step."""
        super().after_step(step_number)
        self._last_update = step_number

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Return masked fraction, spread of predictions and targets, and the explained variance of the targets."""
        loss = self.config.modalities[modality].loss
        return prediction_metrics(totals, None if loss.beta else loss.factor(self.trunk.block.width))

    def health_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield local features, contextualised tokens, targets and predictions."""
        out: WholeOutput = losses.output
        masked = masked_tokens(batch)
        samples, length = masked.shape
        every = torch.arange(length).repeat(samples)  # (B*T,)
        yield Vectors("local", out["local"].flatten(0, 1), every, length, reports_std=True)
        yield Vectors("context", out["context"].flatten(0, 1), every, length, reports_std=True)
        yield Vectors("target", out["target"].flatten(0, 1), every, length)
        yield Vectors("pred", out["pred"], masked.nonzero()[:, 1], length)

    def held_out_vectors(self, batch: Batch, losses: Losses) -> Iterator[Vectors]:
        """Yield predictions and targets at masked tokens."""
        out: WholeOutput = losses.output
        masked = masked_tokens(batch)
        positions, length = masked.nonzero()[:, 1], masked.shape[1]
        yield Vectors("pred", out["pred"], positions, length)
        yield Vectors("target", out["wanted"], positions, length)

    def health_limits(self, bounds: HealthBounds) -> list[HealthLimit]:
        """Return the bounds that a collapsed run crosses."""
        return health_limits(bounds)
