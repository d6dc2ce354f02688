"""What is summed between two records of metrics, and what follows from the sums over all ranks."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.data.collate import Reader
from d2v2ds.distributed import comm
from d2v2ds.objectives.loss import channel_variances, mean_channel_std
from d2v2ds.train.step import ModalityOutput, StepOutput


@dataclass(frozen=True, kw_only=True)
class ModalityInfo:
    """What turns the steps of one modality into numbers."""

    reader: Reader
    loss_scale: float | None
    """What the squared errors of the loss are multiplied with; None if the loss is not a sum of squares."""
    grid_side: int | None = None
    """Tokens per side where they form a square grid."""


@dataclass
class ModalitySums:
    """Sums of one modality since the last record, of this rank but for `num_masked`."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    num_masked: int = 0
    moments: Tensor | None = None
    masked_here: int = 0
    tokens_here: int = 0
    units_here: float = 0.0

    def add_losses(self, part: ModalityOutput) -> None:
        """Take in an applied step."""
        self.num_masked += part.num_masked
        self.moments = part.moments if self.moments is None else self.moments + part.moments
        for name, loss in part.loss_sums.items():
            self.losses[name] = self.losses.get(name, 0.0) + loss

    def add_data(self, batch: Batch, reader: Reader) -> None:
        """Count a micro-batch."""
        self.masked_here += batch.num_masked
        self.tokens_here += batch.masks.masked.numel()
        self.units_here += reader.units(batch.source.shape[0], batch.source.shape[-1])

    def reduce(self, loss_scale: float | None) -> tuple[dict[str, float], float]:
        """Metrics over all ranks, and how much data they have seen, in the unit of the reader. Collective."""
        own = [float(self.masked_here), float(self.tokens_here), self.units_here]
        losses = sorted(self.losses)
        if self.moments is not None:  # some step was applied, which all ranks agree on
            own += [*(float(self.losses[name]) for name in losses), *self.moments.flatten().tolist()]
        masked, tokens, units, *rest = comm.all_reduce_sum(own)
        values = {"mask/fraction": masked / tokens} if tokens else {}
        if rest and self.num_masked:
            totals = dict(zip(losses, rest, strict=False))
            moments = torch.tensor(rest[len(losses) :], dtype=torch.float64).view(2, 2, -1)
            values |= prediction_metrics(totals, moments, self.num_masked, loss_scale)
        return values, units


@dataclass
class Interval:
    """Sums since the last record, of this rank. Skipped steps count in time and data, not in losses and norms."""

    parts: dict[str, ModalitySums]
    steps: int = 0
    applied: int = 0
    started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0
    grad_norm: float = 0.0
    flops: float = 0.0
    samples: int = 0

    def add(
        self,
        out: StepOutput,
        micro: list[Batch],
        wait_s: float,
        modalities: Mapping[str, ModalityInfo],
        flops_of: Callable[[Batch], float],
    ) -> None:
        """Take in one step.

        Args:
            out: what it did.
            micro: the micro-batches of this rank.
            wait_s: seconds for which it waited for them.
            modalities: by name.
            flops_of: algorithmic operations of a micro-batch.
        """
        self.steps += 1
        self.data_wait_s += wait_s
        if out.applied:
            self.applied += 1
            self.grad_norm += out.grad_norm
            for name, part in out.parts.items():
                self.parts[name].add_losses(part)
        for batch in micro:
            if batch.loss_weight:
                self.parts[batch.modality].add_data(batch, modalities[batch.modality].reader)
                self.flops += flops_of(batch)
                self.samples += batch.source.shape[0]


def prediction_metrics(
    loss_sums: Mapping[str, float], moments: Tensor, num_masked: int, loss_scale: float | None
) -> dict[str, float]:
    """Losses per masked token, and how much predictions and targets vary.

    Args:
        loss_sums: over all ranks, by loss.
        moments: (2, 2, D) fp64 on the CPU, `channel_moments` of predictions and of targets over all ranks.
        num_masked: masked tokens of all ranks.
        loss_scale: what the squared errors of the loss are multiplied with; None if it is no sum of squares.
    """
    values = {f"loss/{name}": total / num_masked for name, total in loss_sums.items()}
    pred, target = moments
    values["pred/std"] = mean_channel_std(pred, num_masked)
    values["target/std"] = mean_channel_std(target, num_masked)
    if loss_scale is not None:
        variance = loss_scale * float(channel_variances(target, num_masked).sum())
        values["target/explained"] = 1.0 - values["loss/regression"] / max(variance, 1e-12)
    return values
