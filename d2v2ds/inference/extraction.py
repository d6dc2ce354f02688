"""Features of a whole packed folder, into one Arrow file; see `d2v2ds.extract`.

Every process takes parts of the folder, a few minutes of work each, and writes them to OUT.parts/; the last step joins
them. Killed and started again, finished parts are kept. Rows stand in the order of the folder, whatever the number of
processes; `feature_file.py` says how to read them.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from d2v2ds.data.schema import read_index
from d2v2ds.errors import ConfigError, ShardError
from d2v2ds.inference.extraction_options import DTYPES, PART_TOKENS, Options
from d2v2ds.inference.extractor import FeatureExtractor, batches_by_size
from d2v2ds.inference.feature_file import feature_schema, join_files, write_rows
from d2v2ds.io.crc import crc32
from d2v2ds.io.output import sole_writer, whole_file
from d2v2ds.io.read import open_regular, read_json
from d2v2ds.modalities.known import modality_of, modality_reading, open_reader, open_shards

logger = logging.getLogger(__name__)

PART_BYTES = 1 << 30
"""Features of a part that are not pooled."""
PLAN_NAME = "plan.json"
_PART = re.compile(r"part-\d{6}\.arrow|\.(part-\d{6}\.arrow|plan\.json)\.partial")


class Extraction:
    """The work of one process: model, folder, and bounds of the parts."""

    def __init__(self, options: Options, device: str | None = None) -> None:
        """
        Raises:
            CheckpointError, ShardError, ConfigError: with what to do.
        """
        self.options = options
        self.extractor = FeatureExtractor(
            options.model,
            layers=options.layers,
            weights=options.weights,  # type: ignore[arg-type]
            dtype=DTYPES[options.dtype],
            device=device,
            batch_tokens=options.batch_tokens,
        )
        folder = Path(options.shards)
        found = modality_reading(folder, self.extractor.modalities)
        if found is None:
            packed = read_index(folder).modality
            raise ConfigError(f"{folder}: holds {packed}, the model reads {', '.join(self.extractor.modalities)}")
        self.modality = found
        try:
            self.layers = self.extractor.layers_of(self.modality)
        except ValueError as error:
            raise ConfigError(f"--layers: {error}") from error
        description = self.extractor.folder.description
        self._network = description.model.modalities[self.modality]
        preprocessing, modality = description.preprocessing[self.modality], modality_of(self.modality, options.model)
        self.reader = open_reader(self.modality, modality.whole_inputs(folder, preprocessing), self._network, None)
        if faults := self.reader.misfits():
            raise ShardError(f"{folder}: " + "; ".join(faults))
        if faults := modality.packed_faults(self.extractor.folder.path, preprocessing, folder):
            raise ConfigError("; ".join(faults))
        self._shards = open_shards(folder)
        self._annotations = self._shards.annotations
        self.schema = feature_schema(
            self.layers,
            description.model.block.width,
            pooled=options.pool == "mean",
            annotations=self._annotations,
            facts={**asdict(options), "modality": self.modality, "origin": description.origin.get("kind")},
        )
        part_tokens = options.part_tokens or PART_TOKENS
        if options.pool == "none" and options.part_tokens is None:  # a part is whole in memory before it is written
            part_tokens = min(part_tokens, PART_BYTES // (4 * description.model.block.width * len(self.layers)))
        self.bounds = part_bounds(self._tokens(), max(1, part_tokens))

    def _tokens(self) -> NDArray[np.int64]:
        """(N,) tokens of every row, about: exact ones would take a Python call a row."""
        sizes = np.asarray(self.reader.sizes, dtype=np.int64)
        largest = int(sizes.max(initial=1))
        per_token = max(1.0, largest / max(1, self._network.num_tokens(largest)))
        return np.maximum(1, sizes // per_token).astype(np.int64)

    def fingerprint(self) -> dict[str, Any]:
        """Everything the parts depend on; model and shards by their contents, because they may be moved."""
        index = read_index(Path(self.options.shards))
        checksum = 0
        for _, parameter in sorted(self.extractor.model.named_parameters()):  # all: norms alone are equal at init
            checksum = crc32(parameter.float().cpu().contiguous().numpy().data, checksum)
        description = self.extractor.folder.description
        return {
            **asdict(self.options),
            "model": f"{description.model} {checksum:08x}",
            "preprocessing": description.preprocessing[self.modality],
            "shards": f"{index.rows} rows {index.digest(index.num_shards)}",
            "layers": list(self.layers),
            "bounds": self.bounds,
        }

    def write_part(self, number: int, path: Path) -> float:
        """Compute and write one part; returns its amount in the reader's unit."""
        first, last = self.bounds[number], self.bounds[number + 1]
        rows = range(first, last)
        vectors: dict[int, list[Any]] = {layer: [None] * len(rows) for layer in self.layers}
        tokens = [0] * len(rows)
        amount = 0.0
        sizes = np.asarray(self.reader.sizes[first:last]).tolist()
        for chosen in batches_by_size(sizes, self.extractor.batch_tokens, self._network.num_tokens):
            group = [rows[i] for i in chosen]
            sources = [self.reader.read_whole(row) for row in group]
            features = self.extractor.encode(self.modality, sources)
            pooled = features.mean() if self.options.pool == "mean" else None
            for index, row in enumerate(group):
                tokens[row - first] = int((~features.padding[index]).sum())
                found = features.unpadded(index) if pooled is None else {k: x[index] for k, x in pooled.items()}
                for layer, x in found.items():
                    vectors[layer][row - first] = x.numpy()
                amount += self.reader.units(1, sources[index].shape[-1])
        labels = [self._shards.read_labels(row) for row in rows]
        columns: dict[str, Any] = {"row": list(rows), "tokens": tokens, "id": [label.id for label in labels]}
        columns |= {name: [getattr(label, name) for label in labels] for name in self._annotations}
        columns |= {f"layer_{layer}": vectors[layer] for layer in self.layers}
        write_rows(path, self.schema, columns)
        return amount


def part_bounds(tokens: NDArray[np.int64], part_tokens: int) -> list[int]:
    """Rows at which parts begin, and the number of rows: each part has about so many tokens, and one row or more."""
    if not len(tokens):
        return [0, 0]
    ends = np.cumsum(tokens)
    parts = (ends - 1) // part_tokens
    return [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(tokens)]


_own: Extraction | None = None
"""The extraction of a worker process."""


def _begin_worker(options: Options, devices: list[str], threads: int, counter: Any) -> None:
    global _own
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    torch.set_flush_denormal(True)  # before any product; see train.perf.tune_cpu
    torch.set_num_threads(threads)
    _own = Extraction(options, devices[number % len(devices)])


def _work(number: int, path: Path) -> float:
    assert _own is not None
    return _own.write_part(number, path)


def extract(options: Options, out: Path, workers: int | None = None) -> int:
    """Write the file.

    Args:
        options: what is extracted.
        out: file to write.
        workers: processes; None: one for each accelerator, or one that uses all cores.

    Returns:
        Rows of the file.

    Raises:
        CheckpointError, ShardError, ConfigError: with what to do.
    """
    if not out.name or out.is_dir():
        raise ConfigError(f"--out {out}: expected the name of a file to write, found a folder")
    with sole_writer(out, ConfigError):
        return _extract(options, out, workers)


def _extract(options: Options, out: Path, workers: int | None) -> int:
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    processes = workers or len(devices)
    own = Extraction(options, devices[0] if processes == 1 else "cpu")
    folder = out.with_name(out.name + ".parts")
    _check_plan(folder, own.fingerprint())
    paths = [folder / f"part-{number:06d}.arrow" for number in range(len(own.bounds) - 1)]
    todo = [number for number, path in enumerate(paths) if not _is_done(path)]
    if len(todo) < len(paths):
        logger.info("%s: %d of %d parts are there already", folder, len(paths) - len(todo), len(paths))
    with tqdm(total=own.bounds[-1], unit="row", disable=None, smoothing=0.1) as bar:
        bar.update(own.bounds[-1] - sum(own.bounds[n + 1] - own.bounds[n] for n in todo))
        amount = 0.0
        for number, done in _finished(own, options, devices, processes, todo, paths):
            amount += done
            bar.update(own.bounds[number + 1] - own.bounds[number])
            bar.set_postfix_str(f"{amount / max(bar.format_dict['elapsed'], 1e-9):,.1f} {own.reader.unit.name}/s")
    rows = [range(first, last) for first, last in pairwise(own.bounds)]
    join_files(dict(zip(paths, rows, strict=True)), out, own.schema)
    _remove_parts(folder, paths)
    return own.bounds[-1]


def _is_done(part: Path) -> bool:
    """Return True if a part is there; a FIFO or folder of its name is refused."""
    if not part.exists():
        return False
    open_regular(part, ConfigError).close()
    return True


def _remove_parts(folder: Path, parts: Sequence[Path]) -> None:
    """Remove plan and parts, and the folder unless somebody else's files or a link of the owner keep it."""
    for file in (folder / PLAN_NAME, *parts):  # first the plan: parts without one are of no extraction
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _finished(
    own: Extraction, options: Options, devices: list[str], processes: int, todo: list[int], paths: list[Path]
) -> Iterator[tuple[int, float]]:
    """Do the parts; yields each with its amount when it is on disk."""
    if processes == 1:
        for number in todo:
            yield number, own.write_part(number, paths[number])
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    arguments = (options, devices, threads, context.Value("i", 0))
    with ProcessPoolExecutor(processes, context, _begin_worker, arguments) as pool:
        jobs = {pool.submit(_work, number, paths[number]): number for number in todo}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits: the call at the block's end would take the cancelling back
            raise


def _check_plan(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder of the parts, or make sure that its parts are of this very work.

    Raises:
        ConfigError: they are not.
    """
    plan = folder / PLAN_NAME
    text = json.dumps(fingerprint, sort_keys=True)
    advice = "finish that one, remove the folder, or give another --out"
    if plan.exists():
        found, expected = read_json(plan, ConfigError), json.loads(text)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if different:
            raise ConfigError(f"{folder}: holds parts of an extraction with other {', '.join(different)}; {advice}")
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: expected no file, or the folder of an earlier extraction; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # parts of an extraction that was killed at its very end, while it removed them
    for part in folder.iterdir():
        if not _PART.fullmatch(part.name):
            raise ConfigError(f"{folder}: expected parts of an extraction, found {part.name}; {advice}")
    for part in folder.iterdir():
        part.unlink()
    with whole_file(plan) as file:
        file.write(text.encode())
