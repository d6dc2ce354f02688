"""The student of data2vec 2.0 (arXiv 2212.07525; spec section 1).

`Data2Vec2.forward` is one training step up to the loss: embed once per sample, make the teacher's targets,
encode the visible tokens of every mask, decode, and score the masked places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.errors import below
from d2v2ds.modalities.audio.network import AudioConfig, build_audio_decoder, build_audio_encoder
from d2v2ds.modalities.image.network import ImageConfig, build_image_decoder, build_image_encoder
from d2v2ds.modalities.network import ModalityConfig
from d2v2ds.modalities.text.network import TextConfig, build_text_decoder, build_text_encoder
from d2v2ds.model.block import Block, BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, run_blocks
from d2v2ds.objectives.loss import cls_loss, regression_loss

TeacherFn = Callable[[Batch, Tensor], Tensor]
"""(batch, local (B, T, D) detached) -> targets (B, T, D) fp32."""


@dataclass(frozen=True, kw_only=True)
class ModalitiesConfig:
    """One field per modality; None leaves it out."""

    audio: AudioConfig | None = None
    image: ImageConfig | None = None
    text: TextConfig | None = None

    def active(self) -> dict[str, ModalityConfig]:
        """Settings of the modalities in use, by name."""
        return {name: config for name, config in vars(self).items() if config is not None}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network."""

    block: BlockConfig
    shared_depth: int
    """Blocks after the prenet, shared by all modalities."""
    modalities: ModalitiesConfig
    layer_drop: float = 0.0
    """Probability of skipping a shared block in training, drawn once for all ranks."""

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        problems = self.block.check() + below(self, "", shared_depth=1)
        for name, config in self.modalities.active().items():
            problems += [f"modalities.{name}: {fault}" for fault in config.check(self.block, self.shared_depth)]
        if not self.modalities.active():
            problems.append("modalities: none is configured")
        if not 0.0 <= self.layer_drop < 1.0:
            problems.append(f"layer_drop is {self.layer_drop}, expected 0 <= probability < 1")
        return problems


class StudentOutput(TypedDict):
    """What one forward returns; sums are over this rank's rows. A dict, for ZeRO-3 must find the tensors."""

    losses: dict[str, Tensor]
    """Scalar fp32 sums by name."""
    local: Tensor
    """(B, T, D) local features, detached."""
    context: Tensor
    """(R, K, D) output of the last shared block, detached."""
    pred: Tensor
    """(U, D) predictions at masked places, detached."""
    wanted: Tensor
    """(U, D) fp32 targets at the same places."""
    target: Tensor
    """(B, T, D) fp32 targets."""
    cls: Tensor
    """(R, D) encoder output at the last extra token, detached; (R, 0) without a CLS loss."""
    cls_wanted: Tensor
    """(R, D) fp32 mean over tokens of each row's target; (R, 0) likewise."""


def total_loss(out: StudentOutput) -> Tensor:
    """Scalar: sum of all losses."""
    return torch.stack(list(out["losses"].values())).sum()


Builder = Callable[..., nn.Module]
ENCODERS: dict[str, Builder] = {
    "audio": build_audio_encoder,
    "image": build_image_encoder,
    "text": build_text_encoder,
}
DECODERS: dict[str, Builder] = {
    "audio": build_audio_decoder,
    "image": build_image_decoder,
    "text": build_text_decoder,
}


class Data2Vec2(nn.Module):
    """Encoders, shared blocks and decoders of the trained network."""

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        """
        Args:
            config: the network.
            activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        """
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        active = config.modalities.active()
        self.encoders = nn.ModuleDict(
            {
                name: ENCODERS[name](modality, config.block, config.shared_depth, with_local=True)
                for name, modality in active.items()
            }
        )
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.shared_depth))
        self.decoders = nn.ModuleDict(
            {name: DECODERS[name](modality, config.block) for name, modality in active.items()}
        )

    def forward(self, batch: Batch, teacher: TeacherFn, kept_blocks: list[bool] | None = None) -> StudentOutput:
        """
        Args:
            batch: one micro-batch.
            teacher: makes targets from the batch and the local features; its weights are not part of this module.
            kept_blocks: layer drop of the shared blocks, the same on all ranks; None keeps all.

        Returns:
            Summed losses and what the health statistics read.
        """
        encoder: ModalityEncoder = self.encoders[batch.modality]  # type: ignore[assignment]
        keep, masked = batch.masks.rows()  # (R, K), (R, T)
        local = encoder.embed(batch)  # (B, T, D)
        if local.shape[1] != masked.shape[1]:
            raise ValueError(
                f"masks are drawn for {masked.shape[1]} tokens, the local encoder makes {local.shape[1]} "
                f"of source {tuple(batch.source.shape)}; data and model disagree on the number of tokens"
            )
        target = teacher(batch, local.detach())  # (B, T, D)
        encoded = self.encode(local, batch, kept_blocks)  # (R, E + K, D)
        context = encoded[:, encoder.num_extra_tokens :]  # (R, K, D)
        decoded = self.decoders[batch.modality](context, keep, masked.shape[1])  # (R, T, D)
        pred = select_masked(decoded, masked, batch.num_masked)  # (U, D)
        wanted = select_masked(target.repeat_interleave(batch.masks.num_masks, 0), masked, batch.num_masked)
        loss = self.config.modalities.active()[batch.modality].loss
        losses = {"regression": regression_loss(pred, wanted, loss)}
        cls, cls_wanted = encoded.new_empty(len(encoded), 0), target.new_empty(len(encoded), 0)
        if loss.cls_weight:
            cls = encoded[:, encoder.num_extra_tokens - 1]  # (R, D)
            cls_wanted = target.mean(1).repeat_interleave(batch.masks.num_masks, 0)  # (R, D)
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

    def encode(self, local: Tensor, batch: Batch, kept_blocks: list[bool] | None = None) -> Tensor:
        """Extra and visible tokens through prenet and shared blocks: (B, T, D) -> (R, E + K, D)."""
        encoder: ModalityEncoder = self.encoders[batch.modality]  # type: ignore[assignment]
        prenet_depth = len(encoder.prenet.blocks)
        x, biases = encoder.visible(local, batch, prenet_depth + len(self.blocks))
        x, _ = run_blocks(encoder.prenet.blocks, x, biases[:prenet_depth], checkpoint=self.activation_checkpointing)
        x, _ = run_blocks(
            self.blocks, x, biases[prenet_depth:], checkpoint=self.activation_checkpointing, kept=kept_blocks
        )
        return x

    def depth(self, modality: str) -> int:
        """Blocks that input of this modality passes, prenet included."""
        encoder: ModalityEncoder = self.encoders[modality]  # type: ignore[assignment]
        return len(encoder.prenet.blocks) + len(self.blocks)

    def layers(
        self, modality: str, source: Tensor, padding: Tensor | None = None, *, depth: int | None = None
    ) -> list[Tensor]:
        """Features of unmasked input, for probes and inference; those of real tokens do not depend on padding.

        Args:
            modality: whose encoder.
            source: as in `Batch`.
            padding: as in `Batch`.
            depth: blocks to run; None runs all.

        Returns:
            Input of the first block and output of every block that ran, prenet first, each (B, T, D): without
            extra tokens.
        """
        encoder: ModalityEncoder = self.encoders[modality]  # type: ignore[assignment]
        blocks = [*encoder.prenet.blocks, *self.blocks][:depth]
        x, biases = encoder.everything(encoder.local(source), padding, len(blocks), zero_padding=True)
        outputs = [x]
        for block, bias in zip(blocks, biases[: len(blocks)], strict=True):
            x, _ = block(x, bias)
            outputs.append(x)
        return [x[:, encoder.num_extra_tokens :] for x in outputs]


def select_masked(x: Tensor, masked: Tensor, num_masked: int) -> Tensor:
    """(R, T, D) at the masked places, row-major: (U, D).

    The count comes from the batch, so that an accelerator need not be asked for it.
    """
    index = masked.flatten().nonzero_static(size=num_masked).squeeze(1)  # (U,)
    return x.flatten(0, 1).index_select(0, index)
