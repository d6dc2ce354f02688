"""The smallest objective there can be: a trunk, one linear layer, no masks, no teacher, nothing of data2vec 2.0."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.objectives.defaults import ObjectiveDefaults
from d2v2ds.objectives.protocol import (
    AveragedNetwork,
    Losses,
    Totals,
)

WANTED = 3.0
"""What every input is to be mapped to."""


class PlainNetwork(nn.Module):
    """Mean-pooled features of the last block through one linear layer, the same for all modalities."""

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        self.trunk = Trunk(trunk)
        self.head = nn.Linear(trunk.block.width, 1)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) outputs."""
        pooled = self.trunk.layers(batch.modality, batch.source, batch.padding)[-1].mean(1)  # (B, D)
        return self.head(pooled)[:, 0]


class Plain(ObjectiveDefaults):
    """Mean squared error of the outputs to a constant; an `Objective`."""

    units: Mapping[str, str] = {
        "loss/square": "squared error; mean over inputs",
        "output/mean": "mean output; over the interval and all ranks",
        "optim/grad_norm/head": "norm of the head's gradient",
    }

    def __init__(self, trunk: TrunkConfig) -> None:
        self.trunk = trunk
        self.updates: list[int] = []
        """Numbers of the applied steps."""

    def build_network(self, *, activation_checkpointing: bool) -> PlainNetwork:
        return PlainNetwork(self.trunk)

    def initialise(self, network: nn.Module, seed: int) -> None:
        assert isinstance(network, PlainNetwork)
        initialise(trunk_parts(network.trunk) | {"head": network.head}, seed)

    def follow(self, teacher: AveragedNetwork | None) -> None:
        assert teacher is None

    def losses(self, network: Callable[..., Any], batch: Batch, step: int | None) -> Losses:
        assert batch.masks is None
        outputs = network(batch).float()  # (B,)
        return Losses(
            sums={"square": (outputs - WANTED).square().sum()},
            count=len(outputs),
            statistics={"outputs": outputs.detach().double().sum()},
            output=None,
        )

    def flops(self, modality: str, num_samples: int, size: int) -> float:
        return float(num_samples * size)

    def describe(self, modality: str, num_tokens: int) -> str:
        return "nothing masked"

    def count(self, batch: Batch) -> int:
        return len(batch.ids)

    def after_step(self, step_number: int) -> None:
        self.updates.append(step_number)

    def metrics(self, modality: str, totals: Totals) -> dict[str, float]:
        return {"output/mean": float(totals.statistics["outputs"]) / totals.count}
