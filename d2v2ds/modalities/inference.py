"""Raw inputs -> sources that an encoder reads, and how long ones are cut: what all modalities share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

CONTEXT_SHARE = 8
"""A window's features are used up to 1 / 8 of its length from its ends, where it lacks one side of its surroundings."""


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Options of feature extraction that concern raw inputs; a modality reads those that mean something to it."""

    sample_rate: int | None = None
    """Rate of samples given as arrays (Hz)."""
    min_seconds: float = 0.25
    """Shorter recordings are refused: they are clicks or cut-off files more often than sounds."""
    window_seconds: float = 40.0
    """Longer recordings are cut into windows."""
    context_seconds: float | None = None
    """A window's features are used up to so far from its ends; None: `CONTEXT_SHARE` of it."""
    in_list: bool = True
    """True if the inputs were given as a list, so that each is one; an array that was given alone may be several."""


@dataclass(frozen=True)
class Piece:
    """Part of an input for one forward; its features `first` to `last` are those of the input from `place` on."""

    index: int
    """Number of the input."""
    source: Tensor
    first: int
    last: int
    place: int


class Inference(Protocol):
    """Raw inputs of one modality for one exported model."""

    fill: float
    """Value at padded places of a source."""

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Turn a raw input into one row of `Batch.source`.

        Raises:
            ValueError: naming the input (`place`) and what was expected.
            MissingExtraError: a package that reads such inputs is not installed.
        """

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide one source into pieces that the model can take."""


@runtime_checkable
class FileInference(Inference, Protocol):
    """An `Inference` that also reads files of inputs, of any length."""

    suffixes: frozenset[str]
    """Lower-case suffixes of files with such inputs."""

    @property
    def token_seconds(self) -> float | None:
        """Time from one token to the next (seconds); None for inputs without time."""

    def inputs(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the inputs of a file, each with its name: the path, or with a line number behind it.

        Raises:
            ValueError, MachineError: it cannot be read.
        """

    def pieces(self, index: int, item: Any, options: InputOptions, place: str) -> Iterator[Piece]:
        """Yield what `cut` makes of `read`; of a long input only the next pieces are in memory.

        Raises:
            ValueError, MissingExtraError: as `read`.
        """


@dataclass(frozen=True, kw_only=True)
class HubInput:
    """Names of an input and its preprocessor in transformers."""

    argument: str
    """Argument of the model's forward."""
    example: str
    """Line of the model card that extracts features."""
    classifier: str = "AudioClassification"
    """Name of a classifier of such inputs in transformers."""
    is_padded: bool = True
    """True if `attention_mask` marks padding of the source."""
    pad_id: int | None = None
    """Id that is padding where no `attention_mask` is given; None for inputs that are not ids."""
    modules: Callable[[dict[str, Any]], list[str]] = lambda preprocessing: []
    """Preprocessing -> templates of `d2v2ds.interop.hub.files` that the folder needs besides."""
    files: Callable[[dict[str, Any]], dict[str, dict[str, Any]]] = lambda preprocessing: {}
    """Preprocessing -> settings by kind of processor: feature_extractor, image_processor, tokenizer_config."""


@dataclass(frozen=True, kw_only=True)
class GraphInput:
    """Input of an ONNX graph."""

    axes: tuple[str | None, ...]
    """Names of its free axes from the first on, the last that of S; None for an axis of fixed size between them."""
    padding: float | None
    """Value at padded places; None if nothing is ever padded."""
    sizes: Callable[[Any, Sequence[int]], list[int]]
    """(network settings, numbers of tokens) -> sizes of inputs with about so many tokens, if the model takes them."""
    draw: Callable[[Any, int, int, torch.Generator], Tensor]
    """(network settings, rows, size, generator) -> noise."""

    @property
    def input_names(self) -> list[str]:
        """Input names of the graph."""
        return ["source"] if self.padding is None else ["source", "padding"]


def windows(total: int, size: int, context: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Cut tokens into overlapping windows; each token is taken from a window in which it lies far from the ends.

    Args:
        total: T.
        size: most tokens of a window.
        context: tokens at an inner end of a window that are taken from its neighbour, less than half of `size`; None:
            `size` / `CONTEXT_SHARE`. Two windows overlap by twice as many, and the middle of the overlap divides them.

    Yields:
        (start, first, last): the window begins at token `start`; tokens `first` to `last` (exclusive) are its own.
    """
    if total <= size:
        yield 0, 0, total
        return
    context = size // CONTEXT_SHARE if context is None else context
    taken = 0
    while taken < total:
        start = min(max(0, taken - context), total - size)
        end = total if start + size == total else start + size - context
        yield start, taken, end
        taken = end
