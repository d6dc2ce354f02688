"""Text: its settings and how its encoder and decoder are wired (spec section 3.3)."""

from dataclasses import dataclass

from d2v2ds.errors import below
from d2v2ds.modalities.network import build_alibi, common_faults
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import Decoder, DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder, Prenet, PrenetConfig
from d2v2ds.model.local import TokenEncoder
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Embeddings, prenet, decoder, targets and loss of text."""

    prenet_depth: int
    """Text blocks before the shared ones; without any there is no input norm either."""
    decoder: DecoderConfig
    target: TargetConfig
    loss: LossConfig = LossConfig()
    vocab_size: int
    """V, token ids in the embedding."""
    max_tokens: int = 512
    """Longest input, in tokens."""
    learned_positions: bool = True
    """Add an embedding of a token's place."""
    embedding_dropout: float = 0.1
    """Dropped fraction of the embeddings; teacher and student read the same dropped ones if they share them."""
    prenet_dropout: float = 0.0
    """Dropped fraction after the prenet's input norm."""
    alibi: bool = False
    """Add a distance penalty to the attention logits (no published text recipe does)."""
    alibi_learned: bool = False
    """Train its scale."""
    alibi_per_head: bool = False
    """One scale per head instead of one."""
    alibi_per_block: bool = False
    """Separate scales in every block."""
    share_local_encoder: bool = True
    """True (published): the teacher reads the student's embeddings. False: it has its own."""

    num_extra_tokens = 0
    input_size = None
    grid_side = None

    def num_tokens(self, size: int) -> int:
        """T of a text of `size` token ids."""
        return size

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""
        problems = common_faults(self, block, shared_depth) + below(self, "", vocab_size=6, max_tokens=2)
        if not 0.0 <= self.embedding_dropout < 1.0:
            problems.append(f"embedding_dropout is {self.embedding_dropout}, expected 0 <= rate < 1")
        return problems


def build_text_encoder(
    config: TextConfig, block: BlockConfig, shared_depth: int, *, with_local: bool
) -> ModalityEncoder:
    """The text encoder of a student, or of a teacher (`with_local` unless `share_local_encoder`)."""
    local = None
    if with_local:
        max_tokens = config.max_tokens if config.learned_positions else None
        local = TokenEncoder(config.vocab_size, max_tokens, block.width, config.embedding_dropout)
    prenet = PrenetConfig(depth=config.prenet_depth, dropout=config.prenet_dropout, has_norm=config.prenet_depth > 0)
    return ModalityEncoder(
        local=local,
        alibi=build_alibi(config, block, shared_depth),
        prenet=Prenet(prenet, block),
        attention_path=block.attention_path,
    )


def build_text_decoder(config: TextConfig, block: BlockConfig) -> Decoder:
    """The decoder of text."""
    return Decoder(config.decoder, block.width)
