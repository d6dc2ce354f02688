"""Norms of the gradients of a model's parts, at every ZeRO stage."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.engine import Engine


class PartNorms:
    """L2 norms of the averaged gradient over parts of the student, for the steps that are asked for.

    DeepSpeed's stages keep gradients in different places, with and without offload, but each hands the torch optimizer
    inside it this rank's part of the averaged gradient in fp32; there a hook of that optimizer takes its norms.
    """

    def __init__(self, engine: Engine, part_of: Callable[[str], str]) -> None:
        """
        Args:
            engine: the student.
            part_of: name of a parameter -> name of its part.
        """
        self._places: dict[int, dict[str, list[tuple[int, int]]]] = {}  # per tensor of the optimizer and part
        self._flats = zero.flat_groups(engine)  # keeps their ids from being given away
        for group in self._flats:
            places = self._places.setdefault(id(group.flat), {})
            for name, start, numel in group.members:
                places.setdefault(part_of(name), []).append((start, numel))
        trainable = [name for name, param in engine.module.named_parameters() if param.requires_grad]
        self._parts = list(dict.fromkeys(part_of(name) for name in trainable))  # the same on every rank
        self._is_asked = False
        self._found: list[tuple[str, Tensor]] = []
        zero.client_optimizer(engine).register_step_pre_hook(self._measure)

    def ask(self, is_wanted: bool = True) -> None:
        """Measure the next optimizer step, or not. Local."""
        self._is_asked, self._found = is_wanted, []

    def take(self, grad_norm: float) -> dict[str, float]:
        """Return the norms of the step that was asked for, before clipping. Collective; after an applied step.

        Args:
            grad_norm: of all parameters, before clipping: the square root of the sum of the parts' squares.

        Returns:
            Norm of each part with a trainable parameter, in the model's order; the same on every rank.
        """
        squares = dict.fromkeys(self._parts, 0.0)
        for part, norm in self._found:
            squares[part] += float(norm) ** 2
        self.ask(False)
        sums = comm.all_reduce_sum(list(squares.values()))
        clipped = math.sqrt(sum(sums))  # at stage 0 times sqrt(world) besides: every rank has the whole gradient
        unclip = grad_norm / clipped if clipped else 0.0
        return {part: math.sqrt(square) * unclip for part, square in zip(squares, sums, strict=True)}

    def _measure(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_asked:
            return
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                gradient = flat.grad.detach().view(-1)
                for part, places in self._places[id(flat)].items():
                    pieces = [gradient.narrow(0, start, numel) for start, numel in places if numel]
                    if pieces:
                        self._found.append((part, get_total_norm(pieces)))
