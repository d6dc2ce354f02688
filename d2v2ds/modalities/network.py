"""What the settings of every modality have in common, and the checks that go with it."""

from typing import Protocol

from d2v2ds.errors import below
from d2v2ds.model.alibi import Alibi
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig


class ModalityConfig(Protocol):
    """Settings of one modality's part of the network; `AudioConfig`, `ImageConfig` and `TextConfig` are such."""

    @property
    def prenet_depth(self) -> int:
        """Own blocks before the shared ones."""

    @property
    def prenet_dropout(self) -> float:
        """Dropped fraction of what enters them."""

    @property
    def decoder(self) -> DecoderConfig:
        """Of this modality."""

    @property
    def target(self) -> TargetConfig:
        """Of this modality."""

    @property
    def loss(self) -> LossConfig:
        """Of this modality."""

    @property
    def share_local_encoder(self) -> bool:
        """Whether the teacher reads the student's local features."""

    @property
    def num_extra_tokens(self) -> int:
        """E."""

    @property
    def input_size(self) -> int | None:
        """Side of an image in pixels; None where inputs have no fixed size."""

    @property
    def grid_side(self) -> int | None:
        """Tokens per side where they form a square grid."""

    def num_tokens(self, size: int) -> int:
        """T of an input of this size."""

    def check(self, block: BlockConfig, shared_depth: int) -> list[str]:
        """Contradictions, as sentences; empty if there are none."""


def common_faults(config: ModalityConfig, block: BlockConfig, shared_depth: int) -> list[str]:
    """Contradictions in what all modalities have."""
    problems = below(config, "", prenet_depth=0) + config.decoder.check(block.width)
    problems += config.target.check(shared_depth) + config.loss.check(config.num_extra_tokens)
    if not 0.0 <= config.prenet_dropout < 1.0:
        problems.append(f"prenet_dropout is {config.prenet_dropout}, expected 0 <= rate < 1")
    return problems


class AlibiSettings(Protocol):
    """What a modality with a distance penalty says of it."""

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


def build_alibi(config: AlibiSettings, block: BlockConfig, shared_depth: int) -> Alibi | None:
    """The distance penalty of a modality, None if it is switched off."""
    if not config.alibi:
        return None
    return Alibi(
        block.num_heads,
        learned=config.alibi_learned,
        per_head=config.alibi_per_head,
        num_layers=config.prenet_depth + shared_depth if config.alibi_per_block else None,
    )
