"""Text: settings of its embeddings and prenet, and how its encoder and decoder are built."""

from dataclasses import dataclass
from typing import Annotated

from d2v2ds.bounds import Bounds, CountOrZero, Rate
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import Decoder, DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.local import TokenEncoder
from d2v2ds.model.network import build_alibi


@dataclass(frozen=True, kw_only=True)
class TextNetwork:
    """Settings of the text encoder; a `NetworkSettings`."""

    prenet_depth: CountOrZero
    """Text blocks before the shared ones; without any there is no input norm either."""
    vocab_size: Annotated[int, Bounds(ge=6)]
    """V, token ids in the embedding: five special ones and at least one other."""
    max_tokens: Annotated[int, Bounds(ge=2)] = 512
    """Longest input, in tokens."""
    learned_positions: bool = True
    """Add an embedding of a token's position."""
    embedding_dropout: Rate = 0.1
    """Dropped fraction of the embeddings; a teacher that shares them reads the same dropped ones."""
    prenet_dropout: Rate = 0.0
    """Dropped fraction after the prenet's input norm."""
    alibi: bool = False
    """Add a distance penalty to the attention logits (no published text recipe does)."""
    alibi_learned: bool = False
    """Train its scale."""
    alibi_per_head: bool = False
    """One scale per head instead of one."""
    alibi_per_block: bool = False
    """Separate scales in every block."""

    num_extra_tokens = 0
    grid_side = None
    has_small_decoder_projection = True

    def num_tokens(self, size: int) -> int:
        """T of a text of `size` token ids."""
        return size

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build embeddings, distance penalty and prenet."""
        local = None
        if with_local:
            max_tokens = self.max_tokens if self.learned_positions else None
            local = TokenEncoder(self.vocab_size, max_tokens, block.width, self.embedding_dropout)
        prenet = PrenetConfig(depth=self.prenet_depth, dropout=self.prenet_dropout, has_norm=self.prenet_depth > 0)
        return ModalityEncoder(
            local=local,
            alibi=build_alibi(self, block, shared_depth),
            prenet=Prenet(prenet, block),
            attention_path=block.attention_path,
        )

    def build_decoder(self, decoder: DecoderConfig, width: int) -> Decoder:
        """Build convolutions along the token sequence."""
        return Decoder(decoder, width)

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Return 0: an embedding is looked up."""
        return 0.0

    def position_flops(self, width: int, rows: int, tokens: int) -> float:
        """Return 0: positions are looked up."""
        return 0.0

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return no message: every field has its own bounds."""
        return []
