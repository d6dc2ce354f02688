"""`NetworkSettings`: what the trunk asks of the settings of one modality."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from d2v2ds.bounds import DepthOrZero, Rate
from d2v2ds.model.alibi import Alibi
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import Decoder, DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder
from d2v2ds.model.transformer_decoder import TransformerDecoder, TransformerDecoderConfig

AnyDecoder = DecoderConfig | TransformerDecoderConfig
"""Settings of a decoder; `kind` chooses."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of one modality's modules, and the functions that build them; each modality derives its own."""

    prenet_depth: DepthOrZero
    """Own blocks before the shared ones."""
    prenet_dropout: Rate = 0.0
    """Dropped fraction after the prenet's input norm."""

    has_small_decoder_projection = False
    """True: the projection of a decoder starts from N(0, 0.02). False: from torch's default distribution."""

    @property
    def num_extra_tokens(self) -> int:
        """E, learned tokens in front of the others."""
        return 0

    @property
    def grid_columns(self) -> int | None:
        """Tokens in a row of a grid of tokens, whose rows follow from T; None for a sequence."""
        return None

    @property
    def patch_numbers(self) -> int | None:
        """P, numbers of a patch of the input; None if tokens are no patches."""
        return None

    @property
    def needs_all_tokens(self) -> bool:
        """True if the encoder cannot read visible tokens alone."""
        return False

    def patches(self, source: Tensor) -> Tensor:
        """Divide a normalised input into patches, one for each token: (B, ...) -> (B, T, P) fp32."""
        raise NotImplementedError

    def build_fixed_positions(self, width: int, num_extra: int) -> nn.Module:
        """Build the table of positions of a grid of patches: (B, E + T, D) -> (B, E + T, D); none for extra tokens."""
        raise NotImplementedError

    def num_tokens(self, size: int) -> int:
        """Return the number of tokens T of an input of this size."""
        raise NotImplementedError

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build local encoder, positions and prenet; no local encoder for a teacher that shares the student's."""
        raise NotImplementedError

    @property
    def position_grid(self) -> tuple[int, int] | None:
        """Rows and columns of a table of positions for all tokens; None if the modality has no grid of fixed size."""
        return None

    def build_decoder(self, decoder: AnyDecoder, width: int) -> Any:
        """Build the decoder that predicts masked tokens: (visible, keep, T) -> (R, T, D)."""
        if isinstance(decoder, TransformerDecoderConfig):
            assert self.position_grid is not None, "`decoder_faults` names it"
            return TransformerDecoder(decoder, width, self.position_grid)
        return Decoder(decoder, width, columns=self.grid_columns)

    def decoder_faults(self, decoder: AnyDecoder, width: int) -> list[str]:
        """Return one message for each contradiction within a decoder's settings, and with this network."""
        faults = decoder.check(width)
        if isinstance(decoder, TransformerDecoderConfig) and self.position_grid is None:
            faults.append("decoder.kind is 'transformer', and the modality has no grid of tokens for its positions")
        return faults

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Return the operations of the local encoder for B inputs of one size; 0 for a table."""
        return 0.0

    def position_flops(self, width: int, rows: int, tokens: int) -> float:
        """Return the operations of the position encoder for R rows of T tokens; 0 for a table."""
        return 0.0

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction with the shared blocks."""
        return []


@dataclass(frozen=True, kw_only=True)
class AlibiSettings(NetworkSettings):
    """Settings of a modality with a distance penalty."""

    alibi: bool = False
    """Add a distance penalty to the attention logits."""
    alibi_learned: bool = False
    """Train its scale."""
    alibi_per_head: bool = False
    """One scale per head instead of one."""
    alibi_per_block: bool = False
    """Separate scales in every block."""

    def build_alibi(self, block: BlockConfig, shared_depth: int) -> Alibi | None:
        """Build the distance penalty; None if it is switched off."""
        if not self.alibi:
            return None
        return Alibi(
            block.num_heads,
            learned=self.alibi_learned,
            per_head=self.alibi_per_head,
            num_layers=self.prenet_depth + shared_depth if self.alibi_per_block else None,
        )
