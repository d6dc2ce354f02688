"""Statistics of vectors that show a collapse. Pure functions.

Loss and variance do not show it, because instance norm keeps the variance of collapsed targets near one. RESULTS.md
lists values of healthy and collapsed runs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 4096
"""Most vectors of one kind in the statistics; more change them little and take time."""
NUM_STEPS = 8
"""Optimizer steps whose vectors are combined, because a single short clip has fewer tokens than channels."""
POLYNOMIAL_DEGREE = 6
"""Degree of the polynomial that the position share fits."""


@dataclass(frozen=True)
class Richness:
    """Statistics of one set of vectors."""

    std: float
    """Mean over channels of the standard deviation over vectors."""
    effective_rank: float
    """Exponential of the entropy of the covariance's normalised eigenvalues; between 1 and D."""
    position_share: float
    """Fraction of the variance that a polynomial of degree 6 in position / length explains."""
    exact_position_share: float
    """Fraction of the variance between exact positions, corrected for chance."""


def effective_rank(x: Tensor) -> float:
    """Return exp(entropy) of the normalised eigenvalues of the covariance of x (U, D)."""
    centred = x.double() - x.double().mean(0)
    smaller = centred.T @ centred if x.shape[1] <= x.shape[0] else centred @ centred.T
    values = torch.linalg.eigvalsh(smaller).clamp(min=0)
    total = values.sum()
    if total <= 0:
        return 1.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def position_share(x: Tensor, relative_positions: Tensor) -> float:
    """Return the fraction of the variance of x that a polynomial in its position explains, by least squares.

    Args:
        x: (U, D).
        relative_positions: (U,) position over length, 0 to 1.
    """
    centred = x.double() - x.double().mean(0)
    total = centred.square().sum()
    if total <= 0:
        return 0.0
    scaled = 2 * relative_positions.double() - 1  # (U,)
    powers = torch.stack([scaled**k for k in range(POLYNOMIAL_DEGREE + 1)], dim=1)  # (U, 7)
    basis, _ = torch.linalg.qr(powers)
    return float((basis.T @ centred).square().sum() / total)


def exact_position_share(x: Tensor, positions: Tensor) -> float:
    """Return the fraction of the variance of x between the means of its positions.

    It also shows learned positions, as in text, which no polynomial fits. The variance expected by chance is subtracted
    (omega squared of an analysis of variance).

    Args:
        x: (U, D).
        positions: (U,) int64.
    """
    _, groups, counts = torch.unique(positions, return_inverse=True, return_counts=True)
    centred = x.double() - x.double().mean(0)
    total, num_groups = centred.square().sum(), len(counts)
    if total <= 0 or num_groups < 2 or num_groups >= len(x):
        return 0.0
    sums = torch.zeros(num_groups, x.shape[1], dtype=torch.float64).index_add_(0, groups, centred)
    between = (sums.square().sum(1) / counts).sum()
    within = (total - between) / (len(x) - num_groups)
    return float(((between - (num_groups - 1) * within) / (total + within)).clamp(min=0))


class Sample:
    """Vectors of one kind, collected over a few micro-batches, and their positions in the sequence."""

    def __init__(self, *, reports_std: bool = False) -> None:
        """
        Args:
            reports_std: report the standard deviation of these vectors in the metrics.
        """
        self.reports_std = reports_std
        self._vectors: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._relative_positions: list[Tensor] = []

    def add(self, vectors: Tensor, positions: Tensor, length: int) -> None:
        """
        Args:
            vectors: (U, D); at most `MAX_ROWS / NUM_STEPS` evenly spread ones are kept.
            positions: (U,) int64 position of each in its sequence.
            length: T, tokens of the sequence.
        """
        stride = -(-vectors.shape[0] * NUM_STEPS // MAX_ROWS)
        while math.gcd(stride, length) > 1:
            stride += 1  # otherwise only some positions would be sampled
        self._vectors.append(vectors[::stride].detach().float().cpu())
        self._positions.append(positions[::stride].cpu())
        self._relative_positions.append(positions[::stride].cpu() / length)

    def richness(self) -> Richness:
        """Compute the statistics; NaN if no vectors were added because every step was skipped."""
        if not self._vectors:
            return Richness(math.nan, math.nan, math.nan, math.nan)
        x = torch.cat(self._vectors)
        return Richness(
            std=float(x.std(0, correction=0).mean()),
            effective_rank=effective_rank(x),
            position_share=position_share(x, torch.cat(self._relative_positions)),
            exact_position_share=exact_position_share(x, torch.cat(self._positions)),
        )
