"""Errors of one golden case."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Report:
    """Worst relative error of every quantity of one case."""

    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, found: Tensor | float, expected: Tensor | float) -> None:
        """Record one quantity; a different shape or a value that is not finite counts as infinitely wrong."""
        error = _relative_error(torch.as_tensor(found).double(), torch.as_tensor(expected).double())
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def allow(self, name: str, share: float) -> None:
        """Record a difference as a share of the largest one that passes, such as one that chance explains."""
        self.errors[name] = max(share * self.tolerance, self.errors.get(name, 0.0))

    @property
    def passed(self) -> bool:
        """True if something was compared and every quantity is within the tolerance."""
        return bool(self.errors) and all(error <= self.tolerance for error in self.errors.values())


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute expected value, infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    found, expected = found[finite], expected[finite]
    if not expected.numel():
        return 0.0
    largest, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    return difference / largest if largest else difference
