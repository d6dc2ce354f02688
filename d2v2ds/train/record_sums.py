"""Sums between two records of metrics."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from d2v2ds.batch import Batch
from d2v2ds.data.reader import Reader
from d2v2ds.train.step import StepOutput
from d2v2ds.train.sums import Sums


@dataclass
class ModalityRecordSums:
    """Sums of one modality since the last record, of this rank."""

    sums: Sums = field(default_factory=Sums)
    """Losses and statistics of applied steps."""
    units: float = 0.0
    """Amount of data, in the unit of the reader; skipped steps included."""


@dataclass
class RecordSums:
    """Sums since the last record, of this rank. Skipped steps count in time and data, not in losses and norms."""

    parts: dict[str, ModalityRecordSums]
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
        readers: Mapping[str, Reader],
        flops_of: Callable[[Batch], float],
    ) -> None:
        """Add one step.

        Args:
            out: its output.
            micro: micro-batches of this rank.
            wait_s: seconds that it waited for them.
            readers: by modality.
            flops_of: counts the operations of a micro-batch.
        """
        self.steps += 1
        self.data_wait_s += wait_s
        if out.applied:
            self.applied += 1
            self.grad_norm += out.grad_norm
            for name, part in out.parts.items():
                self.parts[name].sums.merge(part.sums)
        for batch in micro:
            if batch.loss_weight:
                num_rows, size = batch.source.shape[0], batch.source.shape[-1]
                self.parts[batch.modality].units += readers[batch.modality].units(num_rows, size)
                self.flops += flops_of(batch)
                self.samples += num_rows
