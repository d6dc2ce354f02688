"""`Sums`: losses and statistics summed over micro-batches, steps and ranks, for training and validation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2v2ds.distributed import comm
from d2v2ds.objectives.protocol import Losses, Totals


class Sums:
    """Sums of one modality on this rank. The names of losses and statistics are the same on every rank."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        """Scalars by name, on the device."""
        self.count = 0.0
        """Items that the losses cover."""
        self.statistics: dict[str, Tensor] = {}
        """fp64 sums by name."""
        self.kept: dict[str, list[Tensor]] = {}
        """Values of this rank's rows by name, a tensor (B, ...) on the CPU for each micro-batch."""

    def add(self, losses: Losses, weight: float) -> None:
        """Add one micro-batch; a filler with weight 0 adds only its names."""
        self._add({name: loss.detach() * weight for name, loss in losses.sums.items()}, losses.count * weight)
        self._add_statistics({name: value * weight for name, value in losses.statistics.items()})
        for name, values in losses.kept.items():
            self.kept.setdefault(name, []).append(values.detach().cpu()[: len(values) if weight else 0])

    def merge(self, other: "Sums") -> None:
        """Add other sums, such as those of a step."""
        self._add(other.losses, other.count)
        self._add_statistics(other.statistics)
        for name, values in other.kept.items():
            self.kept.setdefault(name, []).extend(values)

    def _add(self, losses: Mapping[str, Tensor], count: float) -> None:
        self.count += count
        for name, loss in losses.items():
            self.losses[name] = loss + self.losses.get(name, 0.0)

    def _add_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        for name, value in statistics.items():
            before = self.statistics.get(name)
            self.statistics[name] = value if before is None else before.to(value.device) + value

    def reduce(self) -> Totals | None:
        """Sum over ranks and join kept values; return None if no rank has counted an item. Collective."""
        names, shapes = sorted(self.losses), {name: self.statistics[name].shape for name in sorted(self.statistics)}
        own = [self.count, *(float(self.losses[name]) for name in names)]
        for name in shapes:
            own += self.statistics[name].flatten().tolist()
        count, *rest = comm.all_reduce_sum(own)
        if not count:
            return None
        sums, values = dict(zip(names, rest, strict=False)), torch.tensor(rest[len(names) :], dtype=torch.float64)
        pieces = values.split([shape.numel() for shape in shapes.values()])
        statistics = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        kept = {name: _joined(comm.gather_objects(torch.cat(self.kept[name]))) for name in sorted(self.kept)}
        return Totals({name: sums[name] for name in self.losses}, count, statistics, kept)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
