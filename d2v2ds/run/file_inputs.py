"""Files and folders as inputs of a fine-tuned model: what is found, read, run in batches, and could not be read."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.errors import ConfigError
from d2v2ds.inference.extractor import BATCH_TOKENS, BATCH_TOKENS_OF_ACCELERATORS, collate
from d2v2ds.io.crc import crc32
from d2v2ds.io.walk import walk
from d2v2ds.modalities.inference import FileInference, InputOptions, Piece
from d2v2ds.modalities.known import modality_of
from d2v2ds.run.task_model import TaskModel

logger = logging.getLogger(__name__)

EXIT_UNREAD = 3
"""Exit code of a command that could not read more than one in a hundred inputs, as of packers."""
WindowOutput = tuple[Piece, Tensor]
"""Window of an input and its logits: (T, V) of real frames, or (C,)."""


def file_inference(model: TaskModel) -> FileInference:
    """Return what reads files for a model.

    Raises:
        ConfigError: its modality reads packed inputs only.
    """
    modality = modality_of(model.modality, "the model")
    network = model.task.trunk.modalities[model.modality]
    found = modality.inference(network, model.preprocessing, model.files)
    if not isinstance(found, FileInference):
        raise ConfigError(f"{model.modality}: files cannot be read; pack them and use d2v2ds.evaluate")
    return found


def find_files(paths: Sequence[Path], suffixes: Collection[str]) -> list[tuple[Path, str]]:
    """List files, and those of folders that have one of the suffixes; each once, in the order given.

    Returns:
        (file, name): the name below its folder, or the file's own name.

    Raises:
        ConfigError: a path is absent, or a folder holds no such file.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise ConfigError(f"{path}: expected a file or folder, found nothing there")
            found.setdefault(path, path.name)
            continue
        ignored: Counter[str] = Counter()
        inside = [Path(folder, name) for folder, names in walk(path, suffixes, ignored) for name in names]
        if not inside:
            raise ConfigError(f"{path}: expected files ({', '.join(sorted(suffixes))}), found none")
        if ignored:
            logger.info("%s: %d files of other suffixes are left out", path, ignored.total())
        for file in inside:
            found.setdefault(file, str(file.relative_to(path)))
    return list(found.items())


def window_options(window_seconds: float, context_seconds: float | None = None) -> InputOptions:
    """Make the options of windows.

    Raises:
        ConfigError: windows that are no positive time, or whose contexts leave nothing between them.
    """
    if not 0 < window_seconds < math.inf:
        raise ConfigError(f"--window-seconds {window_seconds:g}: expected seconds above 0")
    if context_seconds is not None and not 0 <= 2 * context_seconds < window_seconds:
        raise ConfigError(
            f"--context-seconds {context_seconds:g}: expected 0 or more, and twice of it below --window-seconds "
            f"{window_seconds:g}"
        )
    return InputOptions(window_seconds=window_seconds, context_seconds=context_seconds)


class InputFiles:
    """Inputs of some files, read one after another."""

    def __init__(
        self,
        inference: FileInference,
        files: Sequence[Path],
        options: InputOptions,
        done: Collection[str] = (),
    ) -> None:
        """
        Args:
            inference: reads them.
            files: of the inputs.
            options: of windows.
            done: names of inputs that are left out.
        """
        self._inference, self._files, self._options, self._done = inference, files, options, done
        self.names: dict[int, str] = {}
        """Names of inputs that were begun, by their number."""
        self.unread: dict[int, str] = {}
        """Numbers of inputs that could not be read, and why."""
        self.left_out = 0
        """Inputs that were done already."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the windows of every input that can be read; others are logged and noted in `unread`."""
        number = 0
        for file in self._files:
            inputs = self._inference.inputs(file)
            while True:
                try:
                    found = next(inputs, None)
                except ValueError as error:
                    self._note(number, str(error))
                    number += 1
                    break
                if found is None:
                    break
                name, item = found
                if name in self._done:
                    self.left_out += 1
                    continue
                self.names[number] = name
                try:
                    yield from self._inference.pieces(number, item, self._options, name)
                except ValueError as error:
                    self._note(number, str(error))
                number += 1

    def _note(self, number: int, fault: str) -> None:
        self.unread[number] = fault
        logger.warning("not read: %s", fault)

    @property
    def too_many_unread(self) -> bool:
        """True if more than one in a hundred inputs could not be read."""
        return len(self.unread) * 100 > len(self.names.keys() | self.unread.keys()) + self.left_out


def outputs_by_input(
    model: TaskModel, inputs: InputFiles, fill: float, device: torch.device
) -> Iterator[tuple[int, Iterator[WindowOutput]]]:
    """Run every input through the network, in order.

    Yields:
        Number of an input, and its windows with their outputs. When these are used up, `InputFiles.unread` has the
        number if the input could not be read to its end.
    """
    most = BATCH_TOKENS.get(device.type, BATCH_TOKENS_OF_ACCELERATORS)
    return groupby(run_pieces(model, inputs.pieces(), fill, device, most), key=lambda output: output[0].index)


@torch.inference_mode()
def run_pieces(
    model: TaskModel, pieces: Iterator[Piece], fill: float, device: torch.device, most_tokens: int
) -> Iterator[WindowOutput]:
    """Run windows through the network in padded batches, in order.

    Where padding changes the features of a model (`hide_padding` is False) a batch holds windows of one length.

    Args:
        model: moved to the device.
        pieces: windows.
        fill: value at padded places.
        device: of the network.
        most_tokens: tokens of one forward pass, padding included; a window of more has one to itself.
    """
    network = model.network.to(device)
    num_tokens = model.task.trunk.modalities[model.modality].num_tokens
    held: list[Piece] = []
    longest = 0
    for piece in pieces:
        size = piece.source.shape[-1]
        grown = max(longest, num_tokens(size))
        is_mixed = bool(held) and not network.hide_padding and size != held[0].source.shape[-1]
        if held and (is_mixed or grown * (len(held) + 1) > most_tokens):
            yield from _forward(network, model.modality, held, fill, device)
            held, grown = [], num_tokens(size)
        held.append(piece)
        longest = grown
    if held:
        yield from _forward(network, model.modality, held, fill, device)


def _forward(
    network: torch.nn.Module, modality: str, pieces: list[Piece], fill: float, device: torch.device
) -> Iterator[WindowOutput]:
    source, padding = collate([piece.source for piece in pieces], fill)
    batch = Batch(modality=modality, source=source, padding=padding, ids=torch.arange(len(pieces)))
    out = network(batch.to(device))
    frames = out["frames"].tolist() if "frames" in out else [None] * len(pieces)
    for piece, count, logits in zip(pieces, frames, out["logits"].float().cpu(), strict=True):
        yield piece, logits if count is None else logits[:count][piece.first : piece.last]


def work_name(model: TaskModel, settings: object) -> str:
    """Return a checksum of a model's weights, its outputs and settings: the name of work that may be continued."""
    checksum = crc32(f"{model.task.config.names} {settings}".encode(), 0)
    for _, parameter in sorted(model.network.named_parameters()):
        checksum = crc32(parameter.float().cpu().contiguous().numpy().data, checksum)
    return f"{checksum:08x}"
