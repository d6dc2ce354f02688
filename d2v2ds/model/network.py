"""`NetworkSettings`: the trunk's protocol for the settings of one modality."""

from typing import Any, Protocol

from d2v2ds.model.alibi import Alibi
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.encoder import ModalityEncoder


class NetworkSettings(Protocol):
    """Settings of one modality's modules, and the functions that build them.

    A modality's settings are a frozen dataclass with these members, such as `modalities.audio.network.AudioNetwork`.
    """

    @property
    def prenet_depth(self) -> int:
        """Number of own blocks before the shared ones."""

    @property
    def num_extra_tokens(self) -> int:
        """E, learned tokens in front of the others."""

    @property
    def grid_side(self) -> int | None:
        """Tokens per side of a square grid; None for a sequence."""

    @property
    def has_small_decoder_projection(self) -> bool:
        """True: the projection of a decoder starts from N(0, 0.02). False: from torch's default distribution."""

    def num_tokens(self, size: int) -> int:
        """Number of tokens T of an input of this size."""

    def build_encoder(self, block: BlockConfig, shared_depth: int, *, with_local: bool) -> ModalityEncoder:
        """Build local encoder, positions and prenet; no local encoder for a teacher that shares the student's."""

    def build_decoder(self, decoder: DecoderConfig, width: int) -> Any:
        """Build the decoder that predicts masked tokens: (visible, keep, T) -> (R, T, D)."""

    def local_flops(self, width: int, num_samples: int, size: int) -> float:
        """Operations of the local encoder for B inputs of one size."""

    def position_flops(self, width: int, rows: int, tokens: int) -> float:
        """Operations of the position encoder for R rows of T tokens."""

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Return one message for each contradiction with the shared blocks."""


class AlibiSettings(Protocol):
    """Settings of a modality with a distance penalty."""

    @property
    def prenet_depth(self) -> int: ...

    @property
    def alibi(self) -> bool: ...

    @property
    def alibi_learned(self) -> bool: ...

    @property
    def alibi_per_head(self) -> bool: ...

    @property
    def alibi_per_block(self) -> bool: ...


def build_alibi(settings: AlibiSettings, block: BlockConfig, shared_depth: int) -> Alibi | None:
    """Build the distance penalty of a modality; None if it is switched off."""
    if not settings.alibi:
        return None
    return Alibi(
        block.num_heads,
        learned=settings.alibi_learned,
        per_head=settings.alibi_per_head,
        num_layers=settings.prenet_depth + shared_depth if settings.alibi_per_block else None,
    )
