"""`FeatureExtractor`: raw inputs to features of every layer of an exported model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.interop.export_folder import ModelFolder, Weights, load_trunk
from d2v2ds.modalities.inference import Inference, InputOptions, Piece
from d2v2ds.modalities.known import modality_of
from d2v2ds.model.block import Block
from d2v2ds.model.trunk import Trunk

MIN_SECONDS = InputOptions.min_seconds
WINDOW_SECONDS = InputOptions.window_seconds
BATCH_TOKENS = {"cpu": 1024}
"""Most tokens of one forward by type of device: more would leave a processor's cache (`benchmarks/extracting.py`)."""
BATCH_TOKENS_OF_ACCELERATORS = 16384


def load_model(
    path: str | Path,
    *,
    weights: Weights = "student",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> Trunk:
    """Load the encoder of an export, in eval mode and without gradient.

    Args:
        path: folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`, or a single file of `d2v2ds.export`.
        weights: the student's, or the teacher's where the export has them.
        device: where to; the accelerator if there is one.
        dtype: of weights and activations.
        compile: compile every block with `torch.compile`; the first calls then take long.

    Returns:
        A `Trunk`; `.layers(modality, source, padding)` are its features.

    Raises:
        CheckpointError: with what was found and what to do.
    """
    return prepared_trunk(ModelFolder(Path(path)), weights, device, dtype, compile)


def prepared_trunk(
    folder: ModelFolder, weights: Weights, device: str | torch.device | None, dtype: torch.dtype, compile: bool
) -> Trunk:
    """Load the encoder of an open export; arguments as `load_model`."""
    trunk = load_trunk(folder, weights)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trunk = trunk.to(device=device, dtype=dtype)
    if compile:
        for module in trunk.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
    return trunk


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of B inputs, padded to the longest one."""

    layers: dict[int, Tensor]
    """Layer -> (B, T, D) fp32 on the CPU, 0 at padding. Layer 0 is the input of the first block, layer i the output of
    block i, blocks of the modality's own first."""
    padding: Tensor
    """(B, T) bool, True = padding."""
    windows: list[int]
    """(B,) overlapping windows that each input was cut into; 1 for all that fit into one."""

    def __len__(self) -> int:
        return len(self.padding)

    def unpadded(self, index: int) -> dict[int, Tensor]:
        """Layer -> (T, D) of one input alone."""
        return {layer: x[index][~self.padding[index]] for layer, x in self.layers.items()}

    def mean(self) -> dict[int, Tensor]:
        """Layer -> (B, D), the mean over each input's tokens."""
        count = (~self.padding).sum(1, keepdim=True)  # (B, 1)
        return {layer: x.sum(1) / count for layer, x in self.layers.items()}


class FeatureExtractor:
    """Raw inputs to features: resamples, resizes or tokenizes, normalises, cuts, pads, batches.

    A recording in a padded batch has the features that it has alone. One that is longer than `window_seconds` (a text
    longer than the model's `max_tokens`) is cut into overlapping windows, whose features are put together again;
    `Features.windows` says so.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layers: Sequence[int] | None = None,
        weights: Weights = "student",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        batch_tokens: int | None = None,
        min_seconds: float = MIN_SECONDS,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        """
        Args:
            path: as in `load_model`, and `weights`, `device`, `dtype`, `compile` likewise.
            layers: which layers; negative numbers count from the last one; None: all.
            batch_tokens: most tokens of one forward, padding included; None: what suits the device.
            min_seconds: shorter recordings are refused.
            window_seconds: longer recordings are cut.

        Raises:
            CheckpointError: if the model cannot be loaded.
            ValueError: a size is not above 0.
        """
        for name, size in (("batch_tokens", batch_tokens), ("window_seconds", window_seconds)):
            if size is not None and not size > 0:
                raise ValueError(f"{name}: expected a number above 0, found {size}")
        self.folder = ModelFolder(Path(path))
        self.model = prepared_trunk(self.folder, weights, device, dtype, compile)
        self.device = next(self.model.parameters()).device
        self._layers = layers
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS_OF_ACCELERATORS)
        self._options = InputOptions(min_seconds=min_seconds, window_seconds=window_seconds)
        self._inference: dict[str, Inference] = {}

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities that the model reads."""
        return list(self.folder.description.model.modalities)

    def __call__(self, inputs: Any, *, sample_rate: int | None = None, modality: str | None = None) -> Features:
        """
        Args:
            inputs: a list of inputs, or one. Recordings: paths, or samples (S,), (C, S), (S, C) as array or tensor;
                (C, S) only in a list, for alone it may be several. Dicts of `datasets` with `array` and
                `sampling_rate`, and sound files as bytes or file objects, are recordings too. Pictures: paths of image
                files or PIL images. Texts: strings, or ids (S,) with <s> and </s>.
            sample_rate: of samples (Hz).
            modality: which encoder; needed where the model has several.

        Raises:
            ValueError: naming the input and what was expected.
            MissingExtraError: a package that reads such inputs is not installed.
        """
        name = self._modality(modality)
        if isinstance(inputs, Iterator) and not hasattr(inputs, "read"):
            raise ValueError(f"inputs: expected one or a list, found a {type(inputs).__name__}; give list(...) of it")
        in_list = isinstance(inputs, list | tuple)
        items = list(inputs) if in_list else [inputs]
        if not items:
            raise ValueError("no inputs")
        reader, options = self.inference(name), replace(self._options, sample_rate=sample_rate, in_list=in_list)
        return self.encode(name, [reader.read(item, options, f"input {i}") for i, item in enumerate(items)])

    def inference(self, modality: str) -> Inference:
        """Reader of raw inputs of a modality."""
        if modality not in self._inference:
            found = self.folder.description
            self._inference[modality] = modality_of(modality, str(self.folder.path)).inference(
                found.model.modalities[modality], found.preprocessing[modality], self.folder.path
            )
        return self._inference[modality]

    def encode(self, modality: str, sources: Sequence[Tensor]) -> Features:
        """Features of inputs that are prepared already.

        Args:
            modality: whose encoder.
            sources: one row of `Batch.source` each, of any length.
        """
        cut = self.inference(modality).cut
        pieces = [piece for index, source in enumerate(sources) for piece in cut(index, source, self._options)]
        return self._run(modality, len(sources), pieces)

    def layers_of(self, modality: str) -> list[int]:
        """Numbers of the layers that are returned, each once.

        Raises:
            ValueError: the model does not have one that was asked for.
        """
        depth = self.model.depth(modality)
        wanted = range(depth + 1) if self._layers is None else self._layers
        numbers = list(dict.fromkeys(layer if layer >= 0 else depth + 1 + layer for layer in wanted))
        if not numbers or not all(0 <= number <= depth for number in numbers):
            raise ValueError(f"layers {list(wanted)}: {modality} has layers 0 (input of the first block) to {depth}")
        return numbers

    def _modality(self, asked: str | None) -> str:
        if asked is None and len(self.modalities) == 1:
            return self.modalities[0]
        if asked not in self.modalities:
            raise ValueError(f"modality={asked!r}: the model reads {', '.join(self.modalities)}; name one of them")
        return asked

    @torch.inference_mode()
    def _run(self, modality: str, count: int, pieces: list[Piece]) -> Features:
        network = self.folder.description.model.modalities[modality]
        numbers = self.layers_of(modality)
        lengths, number_of = [0] * count, Counter(piece.index for piece in pieces)
        for piece in pieces:
            lengths[piece.index] = max(lengths[piece.index], piece.place + piece.last - piece.first)
        longest, width = max(lengths), self.folder.description.model.block.width
        layers = {number: torch.zeros(count, longest, width) for number in numbers}
        sizes = [piece.source.shape[-1] for piece in pieces]
        for chosen in batches_by_size(sizes, self.batch_tokens, network.num_tokens):
            batch = [pieces[i] for i in chosen]
            source, padding = collate([piece.source for piece in batch], self.inference(modality).fill)
            if padding is not None:
                padding = padding.to(self.device)
            outputs = self.model.layers(modality, source.to(self.device), padding, depth=max(numbers))
            for number in numbers:
                found = outputs[number].float().cpu()  # (b, t, D)
                for row, piece in zip(found, batch, strict=True):
                    end = piece.place + piece.last - piece.first
                    layers[number][piece.index, piece.place : end] = row[piece.first : piece.last]
        return Features(
            layers=layers,
            padding=torch.arange(longest) >= torch.tensor(lengths)[:, None],
            windows=[number_of[index] for index in range(count)],
        )


def batches_by_size(sizes: Sequence[int], most: int, num_tokens: Callable[[int], int]) -> Iterator[list[int]]:
    """Divide inputs into forwards: similar sizes together, largest first, with at most so many tokens.

    Args:
        sizes: of the inputs.
        most: tokens of one forward, padding included; an input of more has one to itself.
        num_tokens: T of an input of a size.

    Yields:
        Indices into `sizes`.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        room = max(1, most // max(1, num_tokens(sizes[order[0]])))
        yield order[:room]
        order = order[room:]


def collate(sources: Sequence[Tensor], fill: float) -> tuple[Tensor, Tensor | None]:
    """Stack sources, padded at the end of the last axis: (b, ..., S) and padding (b, S) or None."""
    lengths = torch.tensor([source.shape[-1] for source in sources])
    if bool((lengths == lengths[0]).all()):
        return torch.stack(list(sources)), None
    longest = int(lengths.max())
    padded = [torch.nn.functional.pad(source, (0, longest - source.shape[-1]), value=fill) for source in sources]
    return torch.stack(padded), torch.arange(longest) >= lengths[:, None]
