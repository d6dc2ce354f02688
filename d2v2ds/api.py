"""Inference: load an exported model, and turn recordings, pictures and texts into features of every layer.

    from d2v2ds import FeatureExtractor

    extractor = FeatureExtractor("my-model")              # a folder written by d2v2ds.export
    features = extractor(["a.wav", waveform], sample_rate=44100)
    features.layers[12], features.padding                 # (B, T, D) and (B, T), True = padding

`load_model` gives the bare network, for fine-tuning code of your own.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.data.schema import read_index
from d2v2ds.errors import CheckpointError
from d2v2ds.inference.inputs import given_ids, normalised, read_picture, read_waveform, token_ids
from d2v2ds.interop.export_folder import ModelFolder, Weights, load_encoder
from d2v2ds.modalities.text.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from d2v2ds.model.block import Block
from d2v2ds.model.trunk import Data2Vec2
from d2v2ds.shapes import PAD_ID, shortest_input

MIN_SECONDS = 0.25
"""Shorter recordings are refused: they are clicks or cut-off files more often than sounds."""
WINDOW_SECONDS = 40.0
"""Twice the longest clip of published pretraining; attention over more costs memory with the square."""
BATCH_TOKENS = {"cpu": 1024}
"""Most tokens of one forward by type of device: more would leave a processor's cache (`benchmarks/extracting.py`)."""
BATCH_TOKENS_OF_ACCELERATORS = 16384
CONTEXT_SHARE = 8
"""A window's features are used up to 1 / 8 of its length from its ends, where it lacks one side of its surroundings."""


def load_model(
    path: str | Path,
    *,
    weights: Weights = "student",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> Data2Vec2:
    """The encoder of an export, in eval mode and without gradient.

    Args:
        path: folder written by `d2v2ds.export` or `d2v2ds.interop.fairseq`, or a single file of `d2v2ds.export`.
        weights: the student's, or the teacher's where the export has them.
        device: where to; the accelerator if there is one.
        dtype: of weights and activations.
        compile: compile every block with `torch.compile`; the first calls then take long.

    Returns:
        A `Data2Vec2` without decoders; `.layers(modality, source, padding)` are its features.

    Raises:
        CheckpointError: with what was found and what to do.
    """
    return _loaded(ModelFolder(Path(path)), weights, device, dtype, compile)


def _loaded(
    folder: ModelFolder, weights: Weights, device: str | torch.device | None, dtype: torch.dtype, compile: bool
) -> Data2Vec2:
    """`load_model` of a folder that is open."""
    model = load_encoder(folder, weights)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device=device, dtype=dtype)
    if compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
    return model


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


@dataclass(frozen=True)
class _Piece:
    """One forward's worth of an input; its features `first` to `last` are those of the input from `place` on."""

    index: int
    source: Tensor
    first: int
    last: int
    place: int


def windows(total: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Overlapping windows over tokens, each place taken from a window in which it lies far from the ends.

    Args:
        total: T.
        size: most tokens of a window.

    Yields:
        (start, first, last): the window begins at token `start`; tokens `first` to `last` (exclusive) are its own.
    """
    if total <= size:
        yield 0, 0, total
        return
    context = size // CONTEXT_SHARE
    taken = 0
    while taken < total:
        start = min(max(0, taken - context), total - size)
        end = total if start + size == total else start + size - context
        yield start, taken, end
        taken = end


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
        self.model = _loaded(self.folder, weights, device, dtype, compile)
        self.device = next(self.model.parameters()).device
        self._layers = layers
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS_OF_ACCELERATORS)
        self._min_seconds, self._window_seconds = min_seconds, window_seconds

    @property
    def modalities(self) -> list[str]:
        """What the model reads."""
        return list(self.folder.description.model.modalities.active())

    def __call__(self, inputs: Any, *, sample_rate: int | None = None, modality: str | None = None) -> Features:
        """
        Args:
            inputs: a list of inputs, or one. Recordings: paths, or samples (S,), (C, S), (S, C) as array or tensor.
                Pictures: paths of files that `preprocessing.pack_images` takes, or PIL images.
                Texts: strings, or ids (S,) with <s> and </s>.
            sample_rate: of samples (Hz).
            modality: which encoder; needed where the model has several.

        Raises:
            ValueError: naming the input and what was expected.
            MissingExtraError: a package that reads such inputs is not installed.
        """
        name = self._modality(modality)
        items = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if not items:
            raise ValueError("no inputs")
        return self.encode(name, [READ[name](self, item, sample_rate, f"input {i}") for i, item in enumerate(items)])

    def encode(self, modality: str, sources: Sequence[Tensor]) -> Features:
        """Features of inputs that are prepared already.

        Args:
            modality: whose encoder.
            sources: one row of `Batch.source` each, of any length.
        """
        config = self.folder.description.model.modalities.active()[modality]
        pieces = [p for index, source in enumerate(sources) for p in CUT[modality](self, config, index, source)]
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

    # --- raw input -> what the encoder reads --------------------------------------------------------------------------

    def _waveform(self, item: Any, sample_rate: int | None, place: str) -> Tensor:
        settings = self.folder.description.preprocessing["audio"]
        rate = settings["sample_rate_hz"]
        samples = read_waveform(item, sample_rate, rate, place)
        if len(samples) < self._min_seconds * rate:
            raise ValueError(
                f"{place}: a recording of {len(samples) / rate:.3f} s, expected {self._min_seconds:g} s or more; "
                "min_seconds= lowers it, features of so short a sound mean little"
            )
        return normalised(samples, settings["variance_eps"])

    def _picture(self, item: Any, sample_rate: int | None, place: str) -> Tensor:
        return read_picture(item, self.folder.description.preprocessing["image"]["side"], place)

    def _ids(self, item: Any, sample_rate: int | None, place: str) -> Tensor:
        if isinstance(item, str):
            return token_ids(item, self.tokenizer, place)
        config: Any = self.folder.description.model.modalities.text
        return given_ids(item, config.vocab_size, place)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of text.

        Raises:
            CheckpointError: the export has none.
        """
        settings = self.folder.description.preprocessing["text"]
        if settings["file"] is None:
            raise CheckpointError(
                f"{self.folder.path}: has no tokenizer; export again where the run's shards can be read, or import the "
                "official file with --tokenizer"
            )
        if settings["tokenizer"] not in TOKENIZERS:
            raise CheckpointError(
                f"{self.folder.path}: tokenizer of kind {settings['tokenizer']!r}, expected {' or '.join(TOKENIZERS)}"
            )
        return load_tokenizer(settings["tokenizer"], self.folder.path / settings["file"])

    # --- cutting and putting together ---------------------------------------------------------------------------------

    def _cut_waveform(self, config: Any, index: int, source: Tensor) -> list[_Piece]:
        total, layers = config.num_tokens(len(source)), config.conv_layers
        if total < 1:
            needed = shortest_input(1, layers)
            raise ValueError(f"input {index}: {len(source)} samples make no token; the front end needs {needed}")
        hop = math.prod(stride for _, _, stride in layers)
        rate = self.folder.description.preprocessing["audio"]["sample_rate_hz"]
        size = max(2 * CONTEXT_SHARE, int(self._window_seconds * rate) // hop)
        if total <= size:
            return [_Piece(index, source, 0, total, 0)]
        samples = shortest_input(size, layers)
        return [
            _Piece(index, source[start * hop : start * hop + samples], first - start, last - start, first)
            for start, first, last in windows(total, size)
        ]

    def _cut_picture(self, config: Any, index: int, source: Tensor) -> list[_Piece]:
        return [_Piece(index, source, 0, config.num_tokens(source.shape[-1]), 0)]

    def _cut_ids(self, config: Any, index: int, source: Tensor) -> list[_Piece]:
        """Pieces that all begin with the first id, which is <s>, as the blocks of pretraining do."""
        front, content = source[:1], source[1:]
        size, pieces = config.max_tokens - 1, []
        for start, first, last in windows(len(content), size):
            piece = torch.cat((front, content[start : start + size]))
            with_front = first == 0  # that of the first window is the text's own
            begin = 0 if with_front else first - start + 1
            pieces.append(_Piece(index, piece, begin, last - start + 1, 0 if with_front else first + 1))
        return pieces

    @torch.inference_mode()
    def _run(self, modality: str, count: int, pieces: list[_Piece]) -> Features:
        config: Any = self.folder.description.model.modalities.active()[modality]
        numbers = self.layers_of(modality)
        lengths, number_of = [0] * count, Counter(piece.index for piece in pieces)
        for piece in pieces:
            lengths[piece.index] = max(lengths[piece.index], piece.place + piece.last - piece.first)
        longest, width = max(lengths), self.folder.description.model.block.width
        layers = {number: torch.zeros(count, longest, width) for number in numbers}
        sizes = [piece.source.shape[-1] for piece in pieces]
        for chosen in batches_by_size(sizes, self.batch_tokens, config.num_tokens):
            batch = [pieces[i] for i in chosen]
            source, padding = _collate([piece.source for piece in batch])
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


def tokenizer_faults(folder: ModelFolder, shards: Path) -> list[str]:
    """Why ids of packed text are not those that a model was trained on, as sentences; empty if they are, or unknown.

    Args:
        folder: of the model.
        shards: packed text.

    Raises:
        ShardError: the packed folder cannot be read.
    """
    file = folder.description.preprocessing.get("text", {}).get("file")
    beside = [(shards / entry.file).read_bytes() for entry in read_index(shards).files_beside]
    if file is None or not beside or (folder.path / file).read_bytes() in beside:
        return []
    own = folder.path / file
    return [f"{shards}: was packed with another tokenizer than the model's; pack with --tokenizer {own}"]


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


def _collate(sources: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(b, S) and its padding, None where all are of one length; pictures have one size."""
    lengths = torch.tensor([source.shape[-1] for source in sources])
    if bool((lengths == lengths[0]).all()):
        return torch.stack(list(sources)), None
    fill = PAD_ID if sources[0].dtype == torch.int64 else 0
    batch = torch.nn.utils.rnn.pad_sequence(list(sources), batch_first=True, padding_value=fill)
    return batch, torch.arange(batch.shape[1]) >= lengths[:, None]


READ: dict[str, Callable[[FeatureExtractor, Any, int | None, str], Tensor]] = {
    "audio": FeatureExtractor._waveform,
    "image": FeatureExtractor._picture,
    "text": FeatureExtractor._ids,
}
"""How each modality's raw input is read."""
CUT: dict[str, Callable[[FeatureExtractor, Any, int, Tensor], list[_Piece]]] = {
    "audio": FeatureExtractor._cut_waveform,
    "image": FeatureExtractor._cut_picture,
    "text": FeatureExtractor._cut_ids,
}
"""How an input of each modality is divided into forwards."""
