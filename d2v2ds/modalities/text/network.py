"""Text: settings of its embeddings and prenet, and how its encoder and decoder are built."""

from dataclasses import dataclass
from typing import Annotated

from d2v2ds.bounds import Bounds, Rate
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.local import TokenEncoder
from d2v2ds.model.network import AlibiSettings


@dataclass(frozen=True, kw_only=True)
class TextNetwork(AlibiSettings):
    """Settings of the text encoder. No published text recipe has a distance penalty; without prenet blocks there is no
    input norm either.
    """

    vocab_size: Annotated[int, Bounds(ge=6)]
    """V, token ids in the embedding: five special ones and at least one other."""
    max_tokens: Annotated[int, Bounds(ge=2)] = 512
    """Longest input, in tokens."""
    learned_positions: bool = True
    """Add an embedding of a token's position."""
    embedding_dropout: Rate = 0.1
    """Dropped fraction of the embeddings; a teacher that shares them reads the same dropped ones."""

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
            alibi=self.build_alibi(block, shared_depth),
            prenet=Prenet(prenet, block),
            attention_path=block.attention_path,
        )
