"""`Trunk`: local encoders, positions, prenets and shared blocks (arXiv 2212.07525, section 3).

Objectives, export, extraction, probes, the hub model and ONNX graphs use it; it has no loss, decoder or teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.bounds import Depth, Rate
from d2v2ds.model.block import Block, BlockConfig, TargetLayer
from d2v2ds.model.encoder import ModalityEncoder, run_blocks
from d2v2ds.model.network import NetworkSettings


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Settings of the trunk."""

    block: BlockConfig
    """Settings of every transformer block."""
    shared_depth: Depth
    """Blocks after the prenet, shared by all modalities."""
    modalities: Mapping[str, Any]
    """`NetworkSettings` of each modality in use, by name."""
    layer_drop: Rate = 0.0
    """Probability of skipping a shared block in training, drawn once for all ranks."""
    final_norm: bool = True
    """Pre-norm blocks: normalise the output of the last one. False if a head normalises what it pools, as fine-tuned
    models of BEiT and MAE do (`use_mean_pooling`)."""

    def depth(self, modality: str) -> int:
        """Number of blocks of this modality, prenet included."""
        return int(self.modalities[modality].prenet_depth) + self.shared_depth

    def check(self) -> list[str]:
        """Return one message for each contradiction between fields."""
        problems = self.block.check()
        if not (self.final_norm or self.block.pre_norm):
            problems.append("final_norm is false, and block.pre_norm too: only pre-norm blocks have a norm behind them")
        for name, settings in self.modalities.items():
            problems += [f"modalities.{name}: {fault}" for fault in settings.check(self.block, self.shared_depth)]
        if not self.modalities:
            problems.append("modalities: none is configured")
        return problems


class Trunk(nn.Module):
    """Encoders of all modalities and the blocks that they share."""

    def __init__(
        self,
        config: TrunkConfig,
        *,
        with_local: Mapping[str, bool] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            config: settings.
            with_local: by modality, False for no local encoder; None keeps all.
            activation_checkpointing: recompute the activations of each block in the backward pass.
        """
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        encoders: dict[str, nn.Module] = {}
        for name, settings in config.modalities.items():
            network: NetworkSettings = settings
            has_local = with_local is None or with_local[name]
            encoders[name] = network.build_encoder(config.block, config.shared_depth, with_local=has_local)
        self.encoders = nn.ModuleDict(encoders)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.shared_depth))
        if config.block.pre_norm and config.final_norm:
            self.norm = nn.LayerNorm(config.block.width, eps=config.block.norm_eps)

    def encoder(self, modality: str) -> ModalityEncoder:
        """Encoder of a modality."""
        return self.encoders[modality]  # type: ignore[return-value]

    def embed(self, batch: Batch) -> Tensor:
        """Compute local features (B, T, D), once per sample and before cloning."""
        return self.encoder(batch.modality).embed(batch)

    def encode_visible(self, local: Tensor, batch: Batch, kept_blocks: list[bool] | None = None) -> Tensor:
        """Run the visible tokens of every mask through prenet and shared blocks.

        Args:
            local: (B, T, D) local features.
            batch: its masks and padding.
            kept_blocks: layer drop of the shared blocks, the same on all ranks; None keeps all.

        Returns:
            (R, E + K, D): extra tokens, then visible ones.
        """
        encoder = self.encoder(batch.modality)
        prenet_depth = len(encoder.prenet.blocks)
        x, biases = encoder.visible_tokens(local, batch, prenet_depth + len(self.blocks))
        x, _ = run_blocks(encoder.prenet.blocks, x, biases[:prenet_depth], checkpoint=self.activation_checkpointing)
        x, _ = run_blocks(
            self.blocks, x, biases[prenet_depth:], checkpoint=self.activation_checkpointing, kept=kept_blocks
        )
        return self.normed(x)

    def encode_all(
        self, local: Tensor, batch: Batch, kept_blocks: list[bool] | None = None, *, hide_padding: bool = True
    ) -> Tensor:
        """Run all tokens through prenet and shared blocks, with gradient: the input of a head.

        Args:
            local: (B, T, D) local features, masked or not.
            batch: modality and padding.
            kept_blocks: layer drop of prenet and shared blocks, the same on all ranks; None keeps all.
            hide_padding: keep padding from changing the features of real tokens; False as in the official code.

        Returns:
            (B, E + T, D): extra tokens, then all others.
        """
        encoder = self.encoder(batch.modality)
        blocks = [*encoder.prenet.blocks, *self.blocks]
        x, biases = encoder.all_tokens(local, batch.padding, len(blocks), zero_padding=hide_padding)
        if torch.is_grad_enabled() and self.training and not x.requires_grad:
            x.requires_grad_()  # ZeRO-3 needs an input with gradient of each block that trains
        return self.normed(run_blocks(blocks, x, biases, checkpoint=self.activation_checkpointing, kept=kept_blocks)[0])

    def normed(self, x: Tensor) -> Tensor:
        """Apply the norm behind the last block of a pre-norm trunk."""
        return self.norm(x) if hasattr(self, "norm") else x

    def target_layers(
        self, batch: Batch, local: Tensor, target: TargetLayer = "feed_forward", *, clear_padding: bool = False
    ) -> list[Tensor]:
        """Run all tokens unmasked, as a teacher does.

        Args:
            batch: modality, source and padding; its masks are not read.
            local: (B, T, D) local features; unused if this trunk has its own local encoder.
            target: tensor of a block that is returned.
            clear_padding: write zeros into padded tokens before their positions.

        Returns:
            That tensor of every shared block, each (B, T, D), in order, without the norm behind the last block.
        """
        encoder = self.encoder(batch.modality)
        if hasattr(encoder, "local"):
            local = encoder.embed(batch)
        if clear_padding:
            local = encoder.clear_padding(local, batch.padding)
        prenet_depth = len(encoder.prenet.blocks)
        x, biases = encoder.all_tokens(local, batch.padding, prenet_depth + len(self.blocks))  # (B, E + T, D)
        x, _ = run_blocks(encoder.prenet.blocks, x, biases[:prenet_depth])
        _, outputs = run_blocks(self.blocks, x, biases[prenet_depth:], target=target)  # L x (B, E + T, D)
        return [output[:, encoder.num_extra_tokens :] for output in outputs]

    def depth(self, modality: str) -> int:
        """Number of blocks of this modality, prenet included."""
        return self.config.depth(modality)

    def layers(
        self,
        modality: str,
        source: Tensor,
        padding: Tensor | None = None,
        *,
        depth: int | None = None,
        run: Callable[..., Any] | None = None,
        with_extra_tokens: bool = False,
    ) -> list[Tensor]:
        """Compute features of unmasked input, for probes and inference; padding does not change those of real tokens.

        Args:
            modality: name.
            source: as in `Batch`.
            padding: as in `Batch`.
            depth: blocks to run; None runs all.
            run: calls a block with its input and bias, for instance to recompute it in the backward; None calls it.
            with_extra_tokens: keep them in front, for heads that read one.

        Returns:
            Input of the first block and output of every block that ran, prenet first, each (B, T, D), or (B, E + T, D).
            The output of the last block of a pre-norm trunk has the norm behind it.
        """
        encoder = self.encoder(modality)
        blocks = [*encoder.prenet.blocks, *self.blocks][:depth]
        x, biases = encoder.all_tokens(encoder.local(source), padding, len(blocks), zero_padding=True)
        outputs = [x]
        for block, bias in zip(blocks, biases[: len(blocks)], strict=True):
            x, _ = block(x, bias) if run is None else run(block, x, bias)
            outputs.append(x)
        if len(outputs) == len(encoder.prenet.blocks) + len(self.blocks) + 1:
            outputs[-1] = self.normed(x)
        return outputs if with_extra_tokens else [x[:, encoder.num_extra_tokens :] for x in outputs]
