"""Loss of the network on held-out data, deterministic and without updates.

Rows, crops, masks and noise are the same every time and on any number of ranks, without dropout and layer drop, so that
results differ only if the weights do. Validation does not change training: the random draws of a training step depend
only on its number.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from d2v2ds.batch import Batch
from d2v2ds.data.collate import Collator
from d2v2ds.data.order import BatchPlan, GlobalBatch, MicroBatch, SamplerState, for_rank
from d2v2ds.data.reader import Reader
from d2v2ds.distributed import comm
from d2v2ds.distributed.engine import Engine
from d2v2ds.errors import ConfigError
from d2v2ds.objectives.protocol import Losses, Objective
from d2v2ds.train.health import Sample
from d2v2ds.train.step import step_seed
from d2v2ds.train.sums import Sums

logger = logging.getLogger(__name__)

SEED = 0
"""Seed of crops, masks and noise; not the run's, so that runs of several seeds are compared on the same inputs."""


MOST_KEPT = 1 << 26
"""Most numbers that validation keeps of the rows of one modality, on every rank.

Each takes 4 bytes and a mark of 1 byte. While ranks exchange them it takes up to 24 bytes in every process: 1.5 GiB.
"""


class Validation:
    """Validates one run. Calling it is collective."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        readers: Mapping[str, Reader],
        *,
        loss_weights: Mapping[str, float],
        micro_batches: int,
        name: str = "",
    ) -> None:
        """
        Args:
            engine: around the network of the objective.
            objective: computes the losses.
            readers: of the held-out folders, by modality.
            loss_weights: of the modalities in `valid/loss/total`.
            micro_batches: number of each modality over all ranks; fewer if a folder has fewer.
            name: of the set; empty for the first one.

        Raises:
            ConfigError: the objective keeps more than `MOST_KEPT` numbers of the rows.
            ShardError: a folder has no row that is large enough.
        """
        self.name, self.prefix = name, f"valid/{name}" if name else "valid"
        self._engine, self._objective, self._weights = engine, objective, loss_weights
        self._collators = {name: Collator(reader=reader, seed=SEED) for name, reader in readers.items()}
        self._micro = {name: _first_micro_batches(reader, micro_batches) for name, reader in readers.items()}
        for modality, batch in self._micro.items():
            rows = sum(len(micro.rows) for micro in batch.micro)
            _check_kept(f"more.{self.name}.{modality}" if self.name else modality, rows, objective.kept_numbers)

    @torch.no_grad()
    def __call__(self) -> dict[str, dict[str, float]]:
        """Compute metrics by modality, named `valid/...` or `valid/NAME/...`; the same on every rank.

        Raises:
            ShardError: a row cannot be read.
        """
        self._engine.eval()
        found = {name: self._modality(name) for name in self._collators}
        self._engine.train()
        return found

    def total(self, found: Mapping[str, Mapping[str, float]]) -> float:
        """Return the weighted sum of all losses; the best checkpoint has the lowest."""
        losses = {name: (v for metric, v in values.items() if "/loss/" in metric) for name, values in found.items()}
        return sum(self._weights[name] * sum(values) for name, values in losses.items())

    def _modality(self, name: str) -> dict[str, float]:
        sums, samples, index = Sums(), dict[str, Sample](), comm.rank()
        for micro in for_rank(self._micro[name], comm.rank(), comm.world()):
            batch = comm.together(partial(self._collators[name], micro))
            for fault in batch.faults:
                logger.warning("validation: skipped a row: %s", fault)
            losses = self._losses(batch, index)
            sums.add(losses, 1.0 if batch.loss_weight else 0.0)
            if batch.loss_weight:
                for kind in self._objective.held_out_vectors(batch, losses):
                    samples.setdefault(kind.name, Sample()).add(kind.vectors, kind.positions, kind.length)
            index += comm.world()
        return {f"{self.prefix}/{metric}": value for metric, value in self._metrics(name, sums, samples).items()}

    def _losses(self, batch: Batch, index: int) -> Losses:
        torch.manual_seed(step_seed(SEED, 0, batch.modality, index))
        losses = self._objective.losses(self._engine, batch.to(comm.device()), None)
        return replace(losses, sums={name: loss.double() for name, loss in losses.sums.items()})

    def _metrics(self, name: str, sums: Sums, samples: Mapping[str, Sample]) -> dict[str, float]:
        """Compute losses, metrics of the objective and effective ranks over all ranks. Collective."""
        totals = sums.reduce()
        if totals is None:
            return {}
        values = {f"loss/{loss}": total / totals.count for loss, total in totals.sums.items()}
        values |= self._objective.metrics(name, totals)
        all_kinds = sorted({kind for kinds in comm.gather_objects(list(samples)) for kind in kinds})
        for kind in all_kinds:  # a rank with only fillers has no vectors
            own = samples[kind].richness().effective_rank if kind in samples else 0.0
            rank, ranks = comm.all_reduce_sum([own, float(kind in samples)])
            values[f"{kind}/effective_rank"] = rank / ranks
        return values


def _first_micro_batches(reader: Reader, count: int) -> GlobalBatch:
    """Return the first micro-batches of a fixed order of the folder, each row at most once."""
    plan = BatchPlan(reader.datasets, config=replace(reader.plan_config(), num_micro=1), seed=SEED)
    batches: list[MicroBatch] = []
    for batch in plan.iter_from(SamplerState()):
        if batch.micro[0].epoch > 0 or len(batches) == count:
            break
        batches += batch.micro
    return GlobalBatch(tuple(batches), SamplerState())


def _check_kept(name: str, rows: int, numbers: int) -> None:
    """Raise a `ConfigError` if a validation would keep too much for scores that sums cannot give."""
    if rows * numbers > MOST_KEPT:
        raise ConfigError(
            f"valid.{name}: {numbers} numbers of {rows:,} rows are kept for its scores, expected at most "
            f"{MOST_KEPT // numbers:,} rows; lower valid.micro_batches, or take a smaller folder"
        )
