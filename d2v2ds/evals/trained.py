"""Probes trained by Adam on frozen features: learned layer weights, attention over frames, CTC.

All begin with zeros, so that a fit depends on nothing but its data and the seed of its order.
"""

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Rows = NDArray[np.int64]
Inputs = Callable[[Rows], tuple[Tensor, ...]]
"""Row numbers -> inputs of a head."""

BATCH_ROWS = 32
LEARNING_RATE = 1e-2
EPOCHS = 60
"""Most passes over the fitted rows."""
PATIENCE = 8
"""Passes without a lower loss of the held-out rows that end a fit."""
HELD_OUT = 0.1
"""Share of the fitted rows that decide when to stop."""


class LayerWeights(nn.Module):
    """Sum of all layers with learned weights (softmax), then a linear layer (arXiv 2105.01051, section 3.1)."""

    def __init__(self, num_layers: int, width: int, num_outputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_layers))
        self.linear = zero_linear(width, num_outputs)

    def forward(self, layers: Tensor) -> Tensor:
        """(B, L, D) -> (B, C)."""
        return self.linear(torch.einsum("l,bld->bd", self.weights.softmax(0), layers))


class AttentionPooling(nn.Module):
    """Mean of frames weighted by a learned query (arXiv 2008.01077, section 2.2), then a linear layer."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.query, self.linear = zero_linear(width, 1), zero_linear(width, num_outputs)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, C)."""
        inside = torch.arange(frames.shape[1]) < lengths[:, None]  # (B, T)
        shares = self.query(frames)[..., 0].masked_fill(~inside, -math.inf).softmax(1)
        return self.linear(torch.einsum("bt,btd->bd", shares, frames))


def zero_linear(width: int, num_outputs: int) -> nn.Linear:
    """Make a linear layer of zeros."""
    layer = nn.utils.skip_init(nn.Linear, width, num_outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def standardised_layers(layers: Sequence[NDArray[np.float32]], fitted: Rows) -> Inputs:
    """Return inputs of `LayerWeights`: every channel of every layer has mean 0 and variance 1 over the fitted rows."""
    stacked = torch.from_numpy(np.stack(layers, axis=1))  # (N, L, D)
    var, mean = torch.var_mean(stacked[torch.from_numpy(fitted)], 0, correction=0)
    scale = var.clamp(min=1e-12).rsqrt()
    return lambda rows: ((stacked[torch.from_numpy(rows)] - mean) * scale,)


def standardised_frames(frames: Sequence[Tensor], fitted: Rows) -> Inputs:
    """Return padded frames (B, T, D) and lengths (B,); channels have mean 0 and variance 1 over the fitted frames."""
    count = sum(len(frames[i]) for i in fitted)
    mean = torch.stack([frames[i].double().sum(0) for i in fitted]).sum(0) / count
    var = torch.stack([(frames[i].double() - mean).square().sum(0) for i in fitted]).sum(0) / count
    shift, scale = mean.float(), var.clamp(min=1e-12).rsqrt().float()

    def inputs(rows: Rows) -> tuple[Tensor, Tensor]:
        chosen = [(frames[i] - shift) * scale for i in rows]
        return pad_sequence(chosen, batch_first=True), torch.tensor([len(one) for one in chosen])

    return inputs


def fit(
    head: nn.Module,
    inputs: Inputs,
    loss: Callable[[Tensor, Rows], Tensor],
    fitted: Rows,
    *,
    penalty: float = 0.0,
    epochs: int = EPOCHS,
) -> None:
    """Train a head by Adam; a tenth of the fitted rows decides which pass is kept.

    Args:
        head: called with the inputs; changed in place.
        inputs: of rows.
        loss: mean of outputs for rows.
        fitted: numbers of the rows.
        penalty: of the linear layer's squared weights.
        epochs: most passes.
    """
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(fitted)
    num_held = max(1, round(HELD_OUT * len(fitted)))
    held, trained = shuffled[:num_held], shuffled[num_held:]
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    best, kept, waited = math.inf, copy.deepcopy(head.state_dict()), 0
    for _ in range(epochs):
        for rows in _batches(rng.permutation(trained)):
            optimizer.zero_grad(set_to_none=True)
            weight: Tensor = head.linear.weight  # type: ignore[assignment, union-attr]
            (loss(head(*inputs(rows)), rows) + penalty * weight.square().sum()).backward()
            optimizer.step()
        with torch.inference_mode():
            value = sum(float(loss(head(*inputs(rows)), rows)) * len(rows) for rows in _batches(held)) / len(held)
        if value < best:
            best, kept, waited = value, copy.deepcopy(head.state_dict()), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    head.load_state_dict(kept)


@torch.inference_mode()
def outputs_of(head: nn.Module, inputs: Inputs, rows: Rows) -> list[Tensor]:
    """Return the outputs of a head for each of the rows."""
    return [output for some in _batches(rows) for output in head(*inputs(some))]


def _batches(rows: Rows) -> list[Rows]:
    return np.array_split(rows, max(1, math.ceil(len(rows) / BATCH_ROWS)))
