"""Strings -> token ids that a text encoder reads."""

import io
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.io.machine_faults import reading_error
from d2v2ds.io.read import open_regular
from d2v2ds.modalities.inference import InputOptions, Piece, windows
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.sentences import join_sentences
from d2v2ds.modalities.text.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from d2v2ds.shapes import PAD_ID


class TextInference:
    """Raw texts for one exported model; an `Inference`."""

    fill = float(PAD_ID)
    suffixes = frozenset({".txt", ".text"})
    token_seconds = None

    def __init__(self, network: TextNetwork, preprocessing: Mapping[str, Any], folder: Path) -> None:
        """
        Args:
            network: settings of the encoder.
            preprocessing: `tokenizer` (its kind) and `file` of the export.
            folder: of the export.
        """
        self._network, self._preprocessing, self._folder = network, preprocessing, folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the export.

        Raises:
            CheckpointError: the export has none, or it is another model's.
            ConfigError: its file is no tokenizer.
        """
        kind, file = self._preprocessing["tokenizer"], self._preprocessing["file"]
        if file is None:
            raise CheckpointError(
                f"{self._folder}: has no tokenizer; export again where the run's shards can be read, or import the "
                "official file with --tokenizer"
            )
        if kind not in tuple(TOKENIZERS):
            raise CheckpointError(f"{self._folder}: tokenizer of kind {kind!r}, expected {' or '.join(TOKENIZERS)}")
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{self._folder}: expected the name of a file of the export, found {file!r:.60}")
        tokenizer = load_tokenizer(kind, self._folder / file)
        if tokenizer.vocab_size > self._network.vocab_size:
            raise CheckpointError(
                f"{self._folder / file}: has {tokenizer.vocab_size} ids, the model embeds {self._network.vocab_size}; "
                "it is another model's"
            )
        return tokenizer

    def read(self, item: Any, options: InputOptions, place: str) -> Tensor:
        """Tokenize a string, or check given ids: (S,) int64 with <s> and </s>."""
        if isinstance(item, str):
            return token_ids(item, self.tokenizer, place)
        return given_ids(item, self._network.vocab_size, place)

    def cut(self, index: int, source: Tensor, options: InputOptions) -> list[Piece]:
        """Divide a long text into overlapping pieces that all begin with <s>, as the blocks of pretraining do."""
        front, content = source[:1], source[1:]
        size, pieces = self._network.max_tokens - 1, []
        for start, first, last in windows(len(content), size):
            piece = torch.cat((front, content[start : start + size]))
            with_front = first == 0  # that of the first window is the text's own
            begin = 0 if with_front else first - start + 1
            pieces.append(Piece(index, piece, begin, last - start + 1, 0 if with_front else first + 1))
        return pieces

    def inputs(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Yield the lines that are not blank, without white space around them, named FILE:LINE."""
        try:
            with open_regular(path, CheckpointError) as file:
                for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1):
                    if text := line.strip():
                        yield f"{path}:{number}", text
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8, found {error}") from error
        except OSError as error:
            raise reading_error(path, error, CheckpointError) from error

    def pieces(self, index: int, item: Any, options: InputOptions, place: str) -> Iterator[Piece]:
        """Yield the windows of a text."""
        yield from self.cut(index, self.read(item, options, place), options)


def token_ids(text: str, tokenizer: Tokenizer, place: str) -> Tensor:
    """(S,) int64 ids of a text, <s> in front and </s> at its end.

    Raises:
        ValueError: nothing is left of it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: expected text, found half a character of UTF-16: {error}") from error
    ids, _ = tokenizer.encode([text])
    if not len(ids):
        raise ValueError(f"{place}: expected text, found {text!r}, of which the tokenizer makes no token")
    return torch.from_numpy(join_sentences(ids))


def given_ids(given: Any, vocab_size: int, place: str) -> Tensor:
    """(S,) int64 ids that the user has made, with <s> and </s>, as they are.

    Args:
        given: array or tensor (S,) of whole numbers.
        vocab_size: of the model.
        place: how messages call the input.

    Raises:
        ValueError: it is something else, or an id is not one of the model's.
    """
    ids = np.asarray(given.numpy(force=True) if isinstance(given, Tensor) else given)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{place}: expected a string, or ids (S,) as array or tensor, found {type(given).__name__} "
            f"of {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{place}: ids from {ids.min()} to {ids.max()}, the model has 0 to {vocab_size - 1}")
    return torch.from_numpy(ids.astype(np.int64))
