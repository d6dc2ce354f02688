"""Files and folders as inputs of a fine-tuned model: what is found, read, run in batches, and could not be read."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v2ds.batch import Batch
from d2v2ds.errors import ConfigError
from d2v2ds.inference.extractor import BATCH_TOKENS, BATCH_TOKENS_OF_ACCELERATORS, collate
from d2v2ds.io.crc import crc32
from d2v2ds.io.walk import walk
from d2v2ds.modalities.inference import FileInference, InputOptions, Piece
from d2v2ds.modalities.known import modality_of
from d2v2ds.run.record_file import STAMP
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


class Ended(NamedTuple):
    """Name of an input, and stamp of its file before it was read."""

    name: str
    stamp: str


def stamp_of(file: Path) -> str:
    """Return size and time of modification of a file; empty if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def changed_since(files: Collection[Path]) -> Callable[[Mapping[str, Any]], bool]:
    """Return what tells a record of an input (`RecordFile`) whose file, one of these, is another one by now."""
    known, stamp = {str(file) for file in files}, lru_cache(maxsize=1)(stamp_of)  # lines of one file come together

    def is_stale(record: Mapping[str, Any]) -> bool:
        name = str(record["file"])
        file = name if name in known else name.rpartition(":")[0]
        return file in known and stamp(Path(file)) != record.get(STAMP)

    return is_stale


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
        self._begun: dict[int, Ended] = {}
        self.seen = 0
        """Inputs so far, those included that were left out or could not be read."""
        self.left_out = 0
        """Inputs that were done already."""
        self.unread = 0
        """Inputs that could not be read."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the windows of every input that can be read; others are logged and counted in `unread`."""
        for file in self._files:
            stamp, inputs = stamp_of(file), self._inference.inputs(file)
            while True:
                number = self.seen
                try:
                    found = next(inputs, None)
                except ValueError as error:
                    self.seen += 1
                    self._note(number, str(error))
                    break
                if found is None:
                    break
                name, item = found
                self.seen += 1
                if name in self._done:
                    self.left_out += 1
                    continue
                self._begun[number] = Ended(name, stamp)
                try:
                    yield from self._inference.pieces(number, item, self._options, name)
                except ValueError as error:
                    self._note(number, str(error))

    def end(self, number: int) -> Ended | None:
        """Return what is known of an input whose windows are used up; None if it could not be read to its end."""
        return self._begun.pop(number, None)

    def _note(self, number: int, fault: str) -> None:
        self._begun.pop(number, None)
        self.unread += 1
        logger.warning("not read: %s", fault)

    @property
    def finished(self) -> int:
        """Inputs that were read to their end, once all were seen."""
        return self.seen - self.left_out - self.unread

    @property
    def too_many_unread(self) -> bool:
        """True if more than one in a hundred inputs could not be read."""
        return self.unread * 100 > self.seen


def outputs_by_input(
    model: TaskModel, inputs: InputFiles, fill: float, device: torch.device
) -> Iterator[tuple[int, Iterator[WindowOutput]]]:
    """Run every input through the network, in order.

    Yields:
        Number of an input, and its windows with their outputs. When these are used up, `InputFiles.end` says whether it
        was read to its end.
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
