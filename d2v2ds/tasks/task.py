"""`Task`: what the `Objective` of every fine-tuning task has in common."""

import math
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

from d2v2ds.batch import Batch
from d2v2ds.labels import LabelEncoder, Labelled
from d2v2ds.model.flops import block_flops
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.network import NetworkSettings
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.defaults import ObjectiveDefaults
from d2v2ds.objectives.protocol import Losses, Totals
from d2v2ds.tasks.encoding import TaskConfig, TaskNetwork, draw_kept_blocks

Config = TypeVar("Config", bound=TaskConfig)


class Task(ObjectiveDefaults, Generic[Config]):
    """A trunk and a head without teacher; each task derives its own."""

    def __init__(self, config: Config, trunk: TrunkConfig, seed: int) -> None:
        """
        Args:
            config: settings.
            trunk: settings of the trunk.
            seed: of the run; layer drop draws from it.
        """
        self.config, self.trunk, self._seed = config, trunk, seed

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of all outputs in their order; empty where they have none."""
        return self.config.names

    def new_network(self, activation_checkpointing: bool) -> TaskNetwork:
        """Build trunk and head."""
        raise NotImplementedError

    def encoder(self) -> LabelEncoder:
        """Build what encodes the labels."""
        raise NotImplementedError

    def labelled(self, modality: str) -> Labelled:
        """Whole inputs with labels, masked in training."""
        return Labelled(encoder=self.encoder(), spans=self.config.mask, width=self.trunk.block.width)

    def build_network(self, *, activation_checkpointing: bool) -> nn.Module:
        """Build encoder and head; parameters that are never trained need no gradient."""
        network = self.new_network(activation_checkpointing)
        for name, parameter in network.named_parameters():
            if any(re.fullmatch(pattern, name) for pattern in self.config.freeze):
                parameter.requires_grad_(False)
        return network

    def initialise(self, network: nn.Module, seed: int) -> None:
        """Draw the trunk as in pretraining, then the head."""
        assert isinstance(network, TaskNetwork)
        initialise(trunk_parts(network.trunk), seed)
        initialise({"head": network.head}, seed)
        network.head.draw()  # type: ignore[operator]

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        """Run one micro-batch; see `Objective.losses`."""
        raise NotImplementedError

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        """Return nothing: the losses are logged in any case."""
        return {}

    def kept_blocks(self, step: int | None) -> list[bool] | None:
        """Layer drop of a step; None keeps all."""
        return draw_kept_blocks(self.trunk, self.config, self._seed, step)

    def is_frozen(self, step: int | None) -> bool:
        """Return True while the head alone learns."""
        return step is not None and step < self.config.freeze_steps

    def lr_scale(self, name: str) -> float:
        """Learning rate of a parameter over that of the step: decay^(blocks above it and itself)."""
        found = re.fullmatch(r"trunk\.(?:encoders\.(\w+)\.prenet\.)?blocks\.(\d+)\..*", name)
        depth = self.trunk.depth(self.config.modality)
        if found is None:
            is_below = self.config.layer_decay_embeddings and name.startswith("trunk.encoders.")
            return self.config.layer_decay ** (depth + 1) if is_below else 1.0
        if self.config.layer_decay == 1.0:
            return 1.0
        modality, number = found.groups()
        index = int(number) + (0 if modality else depth - self.trunk.shared_depth)
        return self.config.layer_decay ** (depth - index)

    def held_steps(self, name: str) -> int:
        """Return `freeze_steps` for the encoder, 0 for the head."""
        is_held = name.startswith("trunk.") and not self.config.fill_frozen
        return self.config.freeze_steps if is_held else 0

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        """Count operations of forward and backward; the frozen steps count as if all trained."""
        network: NetworkSettings = self.trunk.modalities[modality]
        width, tokens = self.trunk.block.width, network.num_tokens(size)
        forward = (
            network.local_flops(width, num_samples, size)
            + network.position_flops(width, num_samples, tokens)
            + block_flops(self.trunk.block, self.trunk.depth(modality), num_samples, network.num_extra_tokens + tokens)
        )
        return 3.0 * forward

    def describe(self, modality: str, num_tokens: int) -> str:
        """Describe how much of an input is masked."""
        mask = self.config.mask
        parts = [("tokens", mask.time), ("channels", mask.channels)]
        said = [f"spans of {spans.length} {what}, {spans.fraction:g} of all" for what, spans in parts if spans]
        return f"{num_tokens} tokens; masks: {' and '.join(said) or 'none'}"

    def count(self, batch: Batch) -> float:
        """Return the number of samples."""
        return len(batch.ids)


def bits(nats: float) -> float:
    """Convert a loss to bits, in which the official code logs it."""
    return nats / math.log(2)
