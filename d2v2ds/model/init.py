"""Every initialisation rule in one place (spec section 11), applied in this order:

| module | weight | bias |
|---|---|---|
| front-end convolutions | Kaiming normal, fan-in, gain sqrt 2 | none |
| position and decoder convolutions | the framework's uniform | the framework's uniform |
| norms | 1 | 0 |
| every Linear | N(0, 0.02) | 0 |
| then, for speech: projection of the front end and of the decoder | the framework's uniform | the framework's uniform |
| ALiBi scale | 1 | |
"""

from torch import nn

from d2v2ds.model.data2vec2 import Data2Vec2
from d2v2ds.model.decoder import Decoder1d
from d2v2ds.model.local import ConvLayerNorm, WaveformEncoder

_LINEAR_STD = 0.02


def initialise(model: Data2Vec2) -> None:
    """Draw all parameters from torch's global generator; needs whole parameters, so it runs before ZeRO-3."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module.reset_parameters()
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_LINEAR_STD)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, ConvLayerNorm):
            nn.init.kaiming_normal_(module.conv.weight)
        if isinstance(module, WaveformEncoder):
            module.project.reset_parameters()
        if isinstance(module, Decoder1d):
            module.proj.reset_parameters()
