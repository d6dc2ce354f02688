"""`ModalityEncoder`: all modules between raw input and the shared blocks (arXiv 2212.07525, section 3).

The student calls `embed`, then `visible_tokens`. The teacher calls `all_tokens`; it has the same modules, and a local
encoder only with `share_local_encoder=false`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.model.alibi import Alibi, DistanceBias, dense_bias
from d2v2ds.model.attention import DENSE_PATHS, AttentionPath, resolve_path
from d2v2ds.model.block import Block, BlockConfig, TargetLayer
from d2v2ds.model.cpu.dropout import dropout
from d2v2ds.model.positions import RelativePositions


@dataclass(frozen=True, kw_only=True)
class PrenetConfig:
    """Settings of the modality's own transformer blocks."""

    depth: int
    """Number of blocks; 0 leaves only the input norm."""
    dropout: float
    """Dropped fraction after the input norm."""
    has_norm: bool = True
    """Normalise the input; False for text without own blocks. Pre-norm blocks have no norm in front of them."""


class ExtraTokens(nn.Module):
    """Learned tokens in front of all others, such as CLS; they have no position."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, number, width))

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) -> (R, E + N, D)."""
        return torch.cat((self.tokens.to(x.dtype).expand(len(x), -1, -1), x), dim=1)


class Prenet(nn.Module):
    """Input norm, dropout and a list of blocks, which the caller runs so that it can checkpoint each."""

    def __init__(self, prenet: PrenetConfig, block: BlockConfig) -> None:
        super().__init__()
        has_norm = prenet.has_norm and not block.pre_norm
        self.norm = nn.LayerNorm(block.width, eps=block.norm_eps) if has_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(block) for _ in range(prenet.depth))
        self.dropout = prenet.dropout
        self.width = block.width

    def forward(self, x: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, D), input of the first block."""
        return dropout(self.norm(x), self.dropout, self.training)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    biases: list[DistanceBias | None],
    *,
    checkpoint: bool = False,
    kept: list[bool] | None = None,
    target: TargetLayer = "feed_forward",
) -> tuple[Tensor, list[Tensor]]:
    """Run transformer blocks in order.

    Args:
        blocks: L blocks.
        x: (R, N, D).
        biases: one for each block.
        checkpoint: recompute the activations of each block in the backward pass.
        kept: layer drop; False skips the block. Ranks that differ in it block each other under ZeRO-3.
        target: tensor of a block that is returned.

    Returns:
        The last output (R, N, D) and the target (R, N, D) of every block that ran.
    """
    targets = []
    for i, block in enumerate(blocks):
        if kept is not None and not kept[i]:
            continue
        if checkpoint and torch.is_grad_enabled():
            x, wanted = torch.utils.checkpoint.checkpoint(block, x, biases[i], target, use_reentrant=False)
        else:
            x, wanted = block(x, biases[i], target)
        targets.append(wanted)
    return x, targets


class ModalityEncoder(nn.Module):
    """Local encoder, positions, ALiBi, extra tokens and prenet of one modality.

    All parameters belong to submodules that are *called*: ZeRO-3 gathers a module's parameters when its forward begins.
    """

    def __init__(
        self,
        *,
        local: nn.Module | None,
        num_tokens: Callable[[Tensor], Tensor] | None = None,
        fixed_positions: nn.Module | None = None,
        positions: nn.Module | None = None,
        alibi: Alibi | None = None,
        relative: RelativePositions | None = None,
        num_extra_tokens: int = 0,
        prenet: Prenet,
        attention_path: AttentionPath,
    ) -> None:
        """
        Args:
            local: source -> (B, T, D); None in a teacher that reads the student's local features.
            num_tokens: (B,) real samples -> (B,) real tokens, for padded inputs; None if padding counts tokens.
            fixed_positions: (B, T, D) -> (B, T, D), adds positions before masking; or None.
            positions: (R, T, D) with masked tokens zeroed -> (R, T, D) to be added to the visible ones; or None.
            alibi: distance penalty, or None.
            relative: learned bias of each pair of tokens, or None; then all tokens are read.
            num_extra_tokens: E, learned tokens in front.
            prenet: input norm and own blocks.
            attention_path: implementation of the blocks' attention; some need a dense bias.
        """
        super().__init__()
        if local is not None:
            self.local = local
        self.num_tokens = num_tokens
        if fixed_positions is not None:
            self.fixed_positions = fixed_positions
        if positions is not None:
            self.positions = positions
        if alibi is not None:
            self.alibi = alibi
        if relative is not None:
            self.relative = relative
        self.num_extra_tokens = num_extra_tokens
        if num_extra_tokens:
            self.extra = ExtraTokens(num_extra_tokens, prenet.width)
        self.prenet = prenet
        self.attention_path = attention_path

    def embed(self, batch: Batch) -> Tensor:
        """Compute local features (B, T, D), once per sample and before cloning."""
        return self.local(batch.source)

    def visible_tokens(self, local: Tensor, batch: Batch, num_blocks: int) -> tuple[Tensor, list[DistanceBias | None]]:
        """Compute the input of the student's first block: extra tokens, then visible ones with their positions.

        Position convolutions read every row at full length with masked tokens set to zero, so that these cannot leak
        through their neighbours.

        Args:
            local: (B, T, D).
            batch: its masks and padding.
            num_blocks: blocks that need a bias.

        Returns:
            (R, E + K, D) and one bias for each block.
        """
        if hasattr(self, "relative"):
            raise ValueError(f"{batch.modality}: relative positions need all tokens, found masks that remove some")
        masks = batch.required_masks()
        keep, masked = masks.rows()  # (R, K), (R, T)
        samples, num_masks, num_visible = masks.keep.shape
        x = self._add_fixed_positions(local)
        width = x.shape[-1]
        every = masks.keep.reshape(samples, -1, 1).expand(-1, -1, width)  # (B, M*K, D)
        tokens = x.gather(1, every).view(-1, num_visible, width)  # (R, K, D)
        if hasattr(self, "positions"):
            cloned = x.repeat_interleave(num_masks, 0)  # (R, T, D)
            positions = self.positions(cloned.masked_fill(masked[..., None], 0))  # (R, T, D)
            tokens = tokens + positions.gather(1, keep[..., None].expand(-1, -1, width))
        padding = self.token_padding(batch.padding, local.shape[1])  # (B, T)
        if padding is not None:
            padding = padding.repeat_interleave(num_masks, 0).gather(1, keep)  # (R, K)
        return self._first_input(tokens), self.biases(keep, padding, num_blocks)

    def all_tokens(
        self, local: Tensor, padding: Tensor | None, num_blocks: int, *, zero_padding: bool = False
    ) -> tuple[Tensor, list[DistanceBias | None]]:
        """Compute the input of the first block in a teacher or in inference: all tokens, no masks, no clones.

        Args:
            local: (B, T, D).
            padding: (B, S) bool, True = pad, or None.
            num_blocks: blocks that need a bias.
            zero_padding: hide padding from the position convolutions, so that real tokens do not depend on it;
                False in training, as in the official code.

        Returns:
            (B, E + T, D) and one bias for each block.
        """
        if hasattr(self, "relative"):
            self.relative.check(local.shape[1])
        x = self._add_fixed_positions(local)
        token_padding = self.token_padding(padding, local.shape[1])  # (B, T)
        if hasattr(self, "positions"):
            x = x + self.positions(x, token_padding if zero_padding else None)  # (B, T, D)
        order = torch.arange(local.shape[1], device=local.device)[None]  # (1, T): one bias serves all samples
        return self._first_input(x), self.biases(order, token_padding, num_blocks)

    def _add_fixed_positions(self, local: Tensor) -> Tensor:
        return self.fixed_positions(local) if hasattr(self, "fixed_positions") else local

    def _first_input(self, tokens: Tensor) -> Tensor:
        return self.prenet(self.extra(tokens) if self.num_extra_tokens else tokens)

    def token_padding(self, padding: Tensor | None, length: int) -> Tensor | None:
        """(B, S) padding of the source -> (B, T) bool, True = this token is padding; None if nothing is padded."""
        if padding is None or self.num_tokens is None:
            return padding
        real = self.num_tokens(padding.logical_not().sum(1))  # (B,)
        return torch.arange(length, device=real.device) >= real[:, None]

    def clear_padding(self, local: Tensor, padding: Tensor | None) -> Tensor:
        """Write zeros into padded tokens: (B, T, D) and (B, S) bool -> (B, T, D)."""
        token_padding = self.token_padding(padding, local.shape[1])
        return local if token_padding is None else local.masked_fill(token_padding[..., None], 0)

    def biases(self, positions: Tensor, padding: Tensor | None, num_blocks: int) -> list[DistanceBias | None]:
        """Return one bias for each block, prenet blocks first; the same object if all share one scale.

        Args:
            positions: (R or 1, N) int64.
            padding: (R, N) bool or None.
            num_blocks: prenet and shared blocks together.
        """
        if padding is not None:
            # Masks may hide every real token of a short text. A row that sees only padding attends to it: softmax over
            # no key would make the whole step NaN, as it does in the official code.
            padding = padding & ~padding.all(1, keepdim=True)
            if not torch.compiler.is_exporting():  # an exported graph cannot branch on data
                padding = padding if padding.any() else None
        # Extra tokens are never padding, and have no position.
        if self.num_extra_tokens and (padding is not None or hasattr(self, "alibi")):
            in_front = (self.num_extra_tokens, 0)
            positions = F.pad(positions, in_front)
            padding = None if padding is None else F.pad(padding, in_front)
        penalties: list[Tensor | None] = [None]
        tables: list[Tensor | None] = [None]
        if hasattr(self, "alibi"):
            penalties = list(self.alibi().unbind(0))  # L or 1 times (H,)
        if hasattr(self, "relative"):
            tables = list(self.relative().unbind(0))  # L or 1 times (H, E + T, E + T)
        elif not hasattr(self, "alibi") and padding is None:
            return [None] * num_blocks
        free = self.num_extra_tokens if hasattr(self, "alibi") else 0
        needs_dense = hasattr(self, "relative") or free > 0
        path = resolve_path(self.attention_path, positions.device, needs_dense=needs_dense)
        count = max(len(penalties), len(tables))
        biases: list[DistanceBias | None] = [
            DistanceBias(
                positions=positions,
                penalty=penalty,
                padding=padding,
                table=table,
                num_free=free,
                dense=dense_bias(positions, penalty, padding, table, free) if path in DENSE_PATHS else None,
            )
            for penalty, table in zip(_stretched(penalties, count), _stretched(tables, count), strict=True)
        ]
        return biases if count > 1 else biases * num_blocks


def _stretched(values: list[Tensor | None], count: int) -> list[Tensor | None]:
    """Repeat the only value `count` times."""
    return values if len(values) == count else values * count
