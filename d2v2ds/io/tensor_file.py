"""safetensors files of flat tensors, written and read at the speed of the disk, with a checksum on the way.

The library writes and reads them too, but then a checksum costs another pass over the bytes, and reading a copy. Here
the checksum of one block is computed while the next is on its way to or from the disk.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.io import durable
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import reading_error
from d2v2ds.io.read import open_regular
from d2v2ds.io.safetensors_header import DTYPES, make_header

BLOCK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100 << 20
"""Longest header, as in the library."""


class TensorFileWriter:
    """Writes files in a thread of its own while the caller's thread computes their checksums."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []
        self.files: dict[str, dict[str, int]] = {}
        """Bytes and crc32 of each file begun, by name."""

    def add_tensors(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Begin a file of contiguous CPU tensors, which must not change before `finish`."""
        header, places = make_header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)
        in_order = [tensors[name] for name in places]
        self.add_bytes(path, [memoryview(header), *(_bytes_of(tensor) for tensor in in_order if tensor.numel())])

    def add_bytes(self, path: Path, parts: list[memoryview]) -> None:
        """Begin a file of any content."""
        self._jobs.append(self._thread.submit(_write_and_sync, path, parts))
        size = checksum = 0
        for part in parts:
            size += len(part)
            for block in _blocks(part):
                checksum = crc32(block, checksum)
        self.files[path.name] = {"bytes": size, "crc32": checksum}

    def finish(self) -> dict[str, dict[str, int]]:
        """Wait until all files are on disk.

        Raises:
            OSError: one of them could not be written.
        """
        try:
            for job in self._jobs:
                job.result()
        finally:
            self._thread.shutdown(cancel_futures=True)
        return self.files


class TensorFileReader:
    """Reads one file from its beginning to its end, once."""

    def __init__(self, path: Path, num_bytes: int, crc32: int) -> None:
        """Read the header.

        Args:
            path: of the file.
            num_bytes, crc32: what the file must be.

        Raises:
            CheckpointError: it is missing, of another size, or has no such header.
        """
        self._path, self._crc32 = path, crc32
        try:
            found = path.stat().st_size
            with open_regular(path, CheckpointError) as file:
                prefix = file.read(8)
                self._head = prefix + file.read(min(struct.unpack("<Q", prefix)[0], MAX_HEADER_BYTES))
            entries = json.loads(self._head[8:])
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})
            """The metadata given to `TensorFileWriter.add_tensors`."""
            self._entries = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])
            end = len(self._head)
            for _, entry in self._entries:
                end += math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        except OSError as error:
            raise reading_error(path, error, CheckpointError) from error
        except (ValueError, struct.error, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged, no header of tensors: {error!r}") from error
        if found != num_bytes:
            raise CheckpointError(f"{path}: expected {num_bytes} bytes, found {found}")
        if end != found:
            raise CheckpointError(f"{path}: damaged, its header describes {end} bytes, found {found}")

    def numel(self, name: str) -> int:
        """Elements of a tensor; 0 if the file does not have it."""
        return math.prod(next((entry["shape"] for key, entry in self._entries if key == name), [0]))

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors of the same number of elements, on any device; those that are not asked for are checked too.

        Raises:
            CheckpointError: the checksum is another one; what was filled is worth nothing then.
        """
        checksum = crc32(self._head)
        try:
            with ThreadPoolExecutor(1) as thread, self._path.open("rb", buffering=0) as file:
                file.seek(len(self._head))
                before = memoryview(b"")
                for name, entry in self._entries:
                    target = targets.get(name)
                    place = self._place(entry, target)
                    for block in _blocks(_bytes_of(place)):
                        reading = thread.submit(file.readinto, block)
                        checksum = crc32(before, checksum)
                        if reading.result() != len(block):
                            raise CheckpointError(f"{self._path}: cut off while it was read")
                        before = block
                    if target is not None and place is not target:
                        target.copy_(place)
                checksum = crc32(before, checksum)
        except OSError as error:
            raise reading_error(self._path, error, CheckpointError) from error
        if checksum != self._crc32:
            raise CheckpointError(f"{self._path}: damaged, its checksum differs from the manifest")

    def _place(self, entry: Mapping[str, Any], target: Tensor | None) -> Tensor:
        """The target itself where it can be written to directly, else memory of the same size and the file's type."""
        dtype = DTYPES[entry["dtype"]]
        if target is not None and target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
            return target
        return torch.empty(entry["shape"], dtype=dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _blocks(part: memoryview) -> Iterator[memoryview]:
    return (part[start : start + BLOCK_BYTES] for start in range(0, len(part), BLOCK_BYTES))


def _write_and_sync(path: Path, parts: list[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for block in _blocks(part):
                while block:
                    block = block[file.write(block) :]
        durable.fsync(file.fileno(), path)
