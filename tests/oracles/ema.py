"""The slow, obvious EMA: whole fp32 weights in a dictionary, averaged one by one."""

from collections.abc import Mapping

from torch import Tensor


class WholeWeightEma:
    """Exponential moving average of whole weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """`ema = decay * ema + (1 - decay) * weight` for every weight of the average."""
        for name in self.weights:
            self.weights[name] = decay * self.weights[name] + (1.0 - decay) * weights[name].float()
