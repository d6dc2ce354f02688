"""Loss of the student against the teacher's targets on held-out data: deterministic, and without any update.

The same rows, crops, masks and noise every time and on any number of ranks, no dropout and no layer drop, so that two
numbers differ only where the weights do. Nothing of the training is touched: its draws are functions of its own steps.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.data.collate import Collator, Reader
from d2v2ds.data.order import BatchPlan, GlobalBatch, MicroBatch, SamplerState, for_rank
from d2v2ds.distributed import comm
from d2v2ds.distributed.engine import Engine
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.objectives.loss import channel_moments
from d2v2ds.train.health import Sample
from d2v2ds.train.interval import prediction_metrics
from d2v2ds.train.step import step_seed

logger = logging.getLogger(__name__)

SEED = 0
"""Of crops, masks and noise. Not the run's: runs of several seeds are compared on the same inputs."""


@dataclass
class _Sums:
    """Sums over this rank's micro-batches of one modality."""

    losses: dict[str, float] = field(default_factory=dict)
    num_masked: int = 0
    moments: Tensor | None = None
    target: Sample = field(default_factory=Sample)
    pred: Sample = field(default_factory=Sample)


class Validation:
    """Validates one run. Calling it is collective."""

    def __init__(
        self,
        student: Engine,
        teacher: Teacher,
        readers: Mapping[str, Reader],
        *,
        loss_scales: Mapping[str, float | None],
        loss_weights: Mapping[str, float],
        micro_batches: int,
    ) -> None:
        """
        Args:
            student, teacher: engine and sharded average.
            readers: of the held-out folders, by modality.
            loss_scales: what the squared errors of each modality's loss are multiplied with; None if it is no such sum.
            loss_weights: of the modalities in `valid/loss/total`.
            micro_batches: of each modality that are looked at, over all ranks; fewer if a folder has fewer.

        Raises:
            ShardError: a folder has no row that is large enough.
        """
        self._student, self._teacher = student, teacher
        self._scales, self._weights = loss_scales, loss_weights
        self._collators = {name: Collator(reader=reader, seed=SEED) for name, reader in readers.items()}
        self._micro = {name: _first_micro_batches(reader, micro_batches) for name, reader in readers.items()}

    @torch.no_grad()
    def __call__(self) -> dict[str, dict[str, float]]:
        """Metrics by modality, named `valid/...`; the same on every rank.

        Raises:
            ShardError: a row cannot be read.
        """
        self._student.eval()
        found = {name: self._modality(name) for name in self._collators}
        self._student.train()
        return found

    def total(self, found: Mapping[str, Mapping[str, float]]) -> float:
        """Weighted sum of all losses: what the best checkpoint has the least of."""
        losses = {name: (v for metric, v in values.items() if "/loss/" in metric) for name, values in found.items()}
        return sum(self._weights[name] * sum(values) for name, values in losses.items())

    def _modality(self, name: str) -> dict[str, float]:
        sums, place = _Sums(), comm.rank()
        for micro in for_rank(self._micro[name], comm.rank(), comm.world()):
            self._add(sums, self._collators[name](micro), place)
            place += comm.world()
        return self._reduce(name, sums)

    def _add(self, sums: _Sums, batch: Batch, place: int) -> None:
        for fault in batch.faults:
            logger.warning("validation: a row was left out: %s", fault)
        torch.manual_seed(step_seed(SEED, 0, batch.modality, place))
        out = self._student(batch.to(comm.device()), self._teacher, None)
        weight = 1.0 if batch.loss_weight else 0.0
        for loss, value in out["losses"].items():
            sums.losses[loss] = sums.losses.get(loss, 0.0) + float(value) * weight
        here = torch.stack((channel_moments(out["pred"]), channel_moments(out["wanted"]))).cpu() * weight
        sums.moments = here if sums.moments is None else sums.moments + here
        if weight:
            sums.num_masked += batch.num_masked
            _, masked = batch.masks.rows()
            positions, length = masked.nonzero()[:, 1], masked.shape[1]
            sums.pred.add(out["pred"], positions, length)
            sums.target.add(out["wanted"], positions, length)

    def _reduce(self, name: str, sums: _Sums) -> dict[str, float]:
        assert sums.moments is not None
        losses = sorted(sums.losses)
        ranks = [sums.target.richness().effective_rank, sums.pred.richness().effective_rank]
        has_ranks = float(sums.num_masked > 0)  # a rank with nothing but a filler has no vectors
        own = [float(sums.num_masked), has_ranks, *(has_ranks and value for value in ranks)]
        own += [sums.losses[loss] for loss in losses] + sums.moments.flatten().tolist()
        masked, num_ranks, target_rank, pred_rank, *rest = comm.all_reduce_sum(own)
        totals = dict(zip(losses, rest, strict=False))
        moments = torch.tensor(rest[len(losses) :], dtype=torch.float64).view(2, 2, -1)
        values = prediction_metrics(totals, moments, int(masked), self._scales[name])
        values["pred/effective_rank"] = pred_rank / num_ranks
        values["target/effective_rank"] = target_rank / num_ranks
        return {f"valid/{metric}": value for metric, value in values.items()}


def _first_micro_batches(reader: Reader, count: int) -> GlobalBatch:
    """The first micro-batches of a fixed order of the folder, each row at most once."""
    plan = BatchPlan(reader.datasets, config=replace(reader.plan_config(), num_micro=1), seed=SEED)
    batches: list[MicroBatch] = []
    for batch in plan.iter_from(SamplerState()):
        if batch.micro[0].epoch > 0 or len(batches) == count:
            break
        batches += batch.micro
    return GlobalBatch(tuple(batches), SamplerState())
