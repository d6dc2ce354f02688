"""Rows of an epoch, from one or several datasets: a pure function of (seed, epoch). No files, no torch.

In: the sizes of the rows of one or several packed folders, and a weight for each. Out: the row at each position of an
epoch, 0 to `num_rows(epoch) - 1`.

- An epoch has every row of the folders with the largest weight once. Of a folder with half that weight it has half the
  rows, and the next epoch the others: each round of 1 / share epochs has every row exactly once, in a new order.
- A row's number is `dataset << DATASET_BITS | row in the dataset`, so that it stays the same when datasets grow.
- A dataset may grow between two starts of a run. The current epoch ends with the rows it began with, so that the
  position keeps its meaning; the next epoch has all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2v2ds.data.permutation import permute
from d2v2ds.errors import CheckpointError, ShardError
from d2v2ds.rng import Stream, hash64

DATASET_BITS = 40
"""Low bits of a row's number, which hold the row inside its dataset; the high bits hold the dataset."""


class Identity(Protocol):
    """Identity of a packed folder's content, which changes when the folder grows."""

    @property
    def num_shards(self) -> int:
        """Number of shards of the folder."""

    def digest(self, num_shards: int) -> str:
        """Return a hash of the rows of its first shards."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One packed folder."""

    sizes: NDArray[np.int64]
    """(N,) sizes of its rows; may be memory-mapped."""
    weight: float = 1.0
    """Frequency of its rows relative to those of the other datasets."""
    identity: Identity | None = None
    """None for rows in memory; only their number is then compared with a checkpoint's."""


def split_row_numbers(rows: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the dataset of each row, and the row's number in it."""
    numbers = np.asarray(rows, dtype=np.int64)
    return numbers >> DATASET_BITS, numbers & ((1 << DATASET_BITS) - 1)


class Mixture:
    """Rows of all datasets, epoch by epoch."""

    def __init__(self, datasets: Sequence[Dataset], seed: int) -> None:
        """
        Args:
            datasets: in a fixed order; later starts may append more.
            seed: of the run.

        Raises:
            ShardError: a dataset has no rows.
            ValueError: a weight is not positive.
        """
        if not datasets or any(len(dataset.sizes) == 0 for dataset in datasets):
            raise ShardError("batch plan: expected at least one row, the dataset has none; pack something first")
        if any(not dataset.weight > 0 for dataset in datasets):
            raise ValueError(f"weights of datasets: expected more than 0, found {[d.weight for d in datasets]}")
        self.datasets = tuple(datasets)
        self.seed = seed
        largest = max(dataset.weight for dataset in datasets)
        self._shares = [dataset.weight / largest for dataset in datasets]
        self.history: list[tuple[int, list[int]]] = [(0, [len(dataset.sizes) for dataset in datasets])]
        """(first epoch, rows of each dataset from it on), oldest first."""

    def num_rows(self, epoch: int) -> int:
        """Return the number of rows of an epoch."""
        return sum(last - first for first, last in self._ranges(epoch))

    def rows(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the (n,) int64 numbers of the rows at (n,) positions of an epoch, each below `num_rows(epoch)`."""
        counts, found, before = self._counts(epoch), np.empty(len(positions), dtype=np.int64), 0
        for dataset, (first, last) in enumerate(self._ranges(epoch)):
            inside = (positions >= before) & (positions < before + last - first)
            own = positions[inside] - before + first
            found[inside] = (dataset << DATASET_BITS) | self._row_at(dataset, counts[dataset], own)
            before += last - first
        return found

    def sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n,) sizes of some rows, read in file order, which is faster from a cold disk."""
        order = np.argsort(rows)
        numbers, local = split_row_numbers(rows[order])
        sizes = np.empty(len(rows), dtype=np.int64)
        for dataset in np.unique(numbers):
            inside = numbers == dataset
            sizes[order[inside]] = self.datasets[dataset].sizes[local[inside]]
        return sizes

    def _row_at(self, dataset: int, count: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at positions of a dataset's endless sequence of rows."""
        if self._shares[dataset] == 1.0:
            return positions % count  # every epoch has all rows, and the plan shuffles the whole epoch
        rounds = positions // count
        rows = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(rounds):
            inside = rounds == number
            key = hash64(self.seed, int(number), Stream.MIXTURE, dataset)
            rows[inside] = permute(positions[inside] % count, count, key)
        return rows

    def _ranges(self, epoch: int) -> list[tuple[int, int]]:
        """Return for each dataset the range of its endless sequence of rows that an epoch has."""
        return [
            (int(epoch * share * count), int((epoch + 1) * share * count))
            for share, count in zip(self._shares, self._counts(epoch), strict=True)
        ]

    def _counts(self, epoch: int) -> list[int]:
        """Return the number of rows of each dataset in an epoch; 0 for datasets that were added later."""
        counts = next(counts for first, counts in reversed(self.history) if first <= epoch)
        return [*counts, *[0] * (len(self.datasets) - len(counts))]

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the datasets that a position refers to, as plain values."""
        return {
            "datasets": [
                {
                    "rows": len(dataset.sizes),
                    "weight": dataset.weight,
                    "shards": 0 if dataset.identity is None else dataset.identity.num_shards,
                    "digest": "" if dataset.identity is None else dataset.identity.digest(dataset.identity.num_shards),
                }
                for dataset in self.datasets
            ],
            "history": [[first, list(counts)] for first, counts in self.history],
        }

    def load_state_dict(self, stored: Mapping[str, Any], *, next_epoch: int, allow_grown: bool) -> None:
        """Continue the epochs of a checkpoint.

        Args:
            stored: from `state_dict`.
            next_epoch: the first epoch that has not begun.
            allow_grown: accept rows that were added since.

        Raises:
            CheckpointError: the datasets differ, or have grown without `allow_grown`.
        """
        before, now = stored["datasets"], self.state_dict()["datasets"]
        faults, grown = [], [f"dataset {number} is new" for number in range(len(before), len(now))]
        if len(before) > len(now):
            faults.append(f"there were {len(before)} datasets, there are {len(now)}")
        for number, (old, new) in enumerate(zip(before, now, strict=False)):
            if old["weight"] != new["weight"]:
                faults.append(f"the weight of dataset {number} was {old['weight']}, is {new['weight']}")
            if (old["rows"], old["digest"]) != (new["rows"], new["digest"]):
                change = f"dataset {number} had {old['rows']} rows, has {new['rows']}"
                (grown if self._has_grown(number, old) else faults).append(change)
        if faults:
            raise CheckpointError(
                f"data position of the checkpoint does not fit this run: {'; '.join(faults)}, and its first rows are "
                "not the same; resume with the same shards, or start a new run from the weights"
            )
        if grown and not allow_grown:
            raise CheckpointError(
                f"the data has grown since the checkpoint: {'; '.join(grown)}; start with --allow-grown to finish the "
                "epoch with the rows it began with and continue with all rows"
            )
        self.history = [(first, list(counts)) for first, counts in stored["history"]]
        if grown:
            self.history = [entry for entry in self.history if entry[0] < next_epoch]
            self.history.append((next_epoch, [len(dataset.sizes) for dataset in self.datasets]))

    def _has_grown(self, number: int, old: Mapping[str, Any]) -> bool:
        identity = self.datasets[number].identity
        return (
            identity is not None
            and 0 < old["shards"] < identity.num_shards
            and identity.digest(old["shards"]) == old["digest"]
        )
