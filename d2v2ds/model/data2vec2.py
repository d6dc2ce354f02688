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
from d2v2ds.model.audio import AudioConfig, build_audio_decoder, build_audio_encoder
from d2v2ds.model.block import Block, BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, run_blocks
from d2v2ds.model.loss import LossConfig, regression_loss
from d2v2ds.model.targets import TargetConfig

TeacherFn = Callable[[Batch, Tensor], Tensor]
"""(batch, local (B, T, D) detached) -> targets (B, T, D) fp32."""


@dataclass(frozen=True, kw_only=True)
class ModalitiesConfig:
    """One field per modality; None leaves it out."""

    audio: AudioConfig | None = None

    def active(self) -> dict[str, AudioConfig]:
        """Settings of the modalities in use, by name."""
        return {name: config for name, config in vars(self).items() if config is not None}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network."""

    block: BlockConfig
    shared_depth: int
    """Blocks after the prenet, shared by all modalities."""
    modalities: ModalitiesConfig
    target: TargetConfig
    loss: LossConfig = LossConfig()
    layer_drop: float = 0.0
    """Probability of skipping a shared block in training, drawn once for all ranks."""

    def check(self) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        problems = self.block.check() + below(self, "", shared_depth=1) + self.target.check(self.shared_depth)
        for config in self.modalities.active().values():
            problems += config.check(self.block)
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


def total_loss(out: StudentOutput) -> Tensor:
    """Scalar: sum of all losses."""
    return torch.stack(list(out["losses"].values())).sum()


ENCODERS = {"audio": build_audio_encoder}
DECODERS = {"audio": build_audio_decoder}


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
                f"of source {tuple(batch.source.shape)}; conv_layers of data and model differ"
            )
        target = teacher(batch, local.detach())  # (B, T, D)
        context = self.encode(local, batch, kept_blocks)  # (R, K, D)
        decoded = self.decoders[batch.modality](context, keep, masked.shape[1])  # (R, T, D)
        pred = select_masked(decoded, masked, batch.num_masked)  # (U, D)
        wanted = select_masked(target.repeat_interleave(batch.masks.num_masks, 0), masked, batch.num_masked)
        losses = {"regression": regression_loss(pred, wanted, self.config.loss)}
        return StudentOutput(
            losses=losses,
            local=local.detach(),
            context=context.detach(),
            pred=pred.detach(),
            wanted=wanted,
            target=target,
        )

    def encode(self, local: Tensor, batch: Batch, kept_blocks: list[bool] | None = None) -> Tensor:
        """Visible tokens through prenet and shared blocks: (B, T, D) -> (R, K, D)."""
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

    def layers(self, modality: str, source: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Features of unmasked input, for probes and inference.

        Args:
            modality: whose encoder.
            source: as in `Batch`, audio (B, S).
            padding: (B, S) bool, True = pad, or None.

        Returns:
            Input of the first block and output of every block, prenet first, each (B, T, D).
        """
        encoder: ModalityEncoder = self.encoders[modality]  # type: ignore[assignment]
        blocks = [*encoder.prenet.blocks, *self.blocks]
        x, biases = encoder.everything(encoder.local(source), padding, len(blocks))
        outputs = [x]
        for block, bias in zip(blocks, biases, strict=True):
            x, _ = block(x, bias)
            outputs.append(x)
        return outputs


def select_masked(x: Tensor, masked: Tensor, num_masked: int) -> Tensor:
    """(R, T, D) at the masked places, row-major: (U, D).

    The count comes from the batch, so that an accelerator need not be asked for it.
    """
    index = masked.flatten().nonzero_static(size=num_masked).squeeze(1)  # (U,)
    return x.flatten(0, 1).index_select(0, index)
