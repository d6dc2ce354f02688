"""Initial weights, as in the official code (examples/data2vec/models/data2vec2.py and modalities/):

| module | weight | bias |
|---|---|---|
| front-end convolutions | Kaiming normal, fan-in, gain sqrt 2 | none |
| patch convolution | Xavier uniform on (D, 3 * patch * patch) | torch's default |
| position and decoder convolutions | torch's default | torch's default |
| norms | 1 | 0 |
| every Linear | N(0, 0.02) | 0 |
| every embedding, tokens and positions | N(0, 0.02), the row of padding 0 | |
| then, speech: projection of the front end; speech and images: of the decoder | torch's default | torch's default |
| ALiBi scale | 1 | |
| extra tokens | N(0, 1) | |
| layer scale | its setting | |
| relative positions | 0 | |
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.model.encoder import ExtraTokens
from d2v2ds.model.local import ConvLayerNorm, PatchEncoder, WaveformEncoder
from d2v2ds.model.trunk import Trunk

_LINEAR_STD = 0.02


def initialise(parts: Mapping[str, nn.Module], seed: int, draw: Callable[[nn.Module], None] | None = None) -> None:
    """Draw the parameters of some modules of a network; call it before ZeRO-3 partitions them.

    Each module has its own random stream, derived from its name, so that removing one does not change the others.
    Changes the state of torch's global generator.

    Args:
        parts: modules on any device, by name.
        seed: of the run.
        draw: sets the parameters that a module has itself, by the rule of its class; None: by the table above.
    """
    for name, part in parts.items():
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # a CPU generator reads 32 bits of a seed
        for module in part.modules():
            (draw or draw_by_class)(module)
        for module in part.modules():
            _redraw(module)


def trunk_parts(trunk: Trunk) -> dict[str, nn.Module]:
    """Return the modules of a trunk for `initialise`: the shared blocks and the encoder of each modality."""
    parts: dict[str, nn.Module] = {f"encoders.{name}": module for name, module in trunk.encoders.items()}
    return {"blocks": trunk.blocks} | parts | ({"norm": trunk.norm} if hasattr(trunk, "norm") else {})


def redraw_projection(decoder: nn.Module) -> None:
    """Draw the projection of a decoder from torch's default distribution."""
    for module in decoder.proj.modules():  # type: ignore[union-attr]
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@contextmanager
def skip_init() -> Iterator[None]:
    """Leave the weights of modules built inside uninitialised, for modules whose weights are overwritten anyway."""
    rules = {name: rule for name, rule in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}

    def unchanged(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    for name in rules:
        setattr(nn.init, name, unchanged)
    try:
        yield
    finally:
        for name, rule in rules.items():
            setattr(nn.init, name, rule)


def draw_by_class(module: nn.Module) -> None:
    """Apply the rule of a module's class."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_LINEAR_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_LINEAR_STD)
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
    elif isinstance(module, ExtraTokens):
        nn.init.normal_(module.tokens)
    elif hasattr(module, "reset_parameters"):  # convolutions, norms, tables, and modules of other projects
        module.reset_parameters()  # type: ignore[operator]


def _redraw(module: nn.Module) -> None:
    """Apply the rule of a module's role, which replaces that of its class."""
    if isinstance(module, ConvLayerNorm):
        nn.init.kaiming_normal_(module.conv.weight)
    elif isinstance(module, WaveformEncoder):
        module.project.reset_parameters()
    elif isinstance(module, PatchEncoder):
        nn.init.xavier_uniform_(module.proj.weight.view(len(module.proj.weight), -1))
