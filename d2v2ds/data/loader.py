"""Shards -> the `Batch`es of one optimizer step after another, on the CPU, without end.

In: a `DataStream` for each modality (a reader and its `BatchPlan`), a position in each, rank and number of ranks. Out:
`StepData`, this rank's micro-batches of one global batch of every modality, and the positions to store once they are
used. Modalities have the same order on all ranks, so that all ranks always run the same modules.

Each position is stored with its data, so workers that read ahead do not change it. Plan and counter-based random
numbers alone decide the content of a batch, so the number of workers does not.
"""

import atexit
import errno
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from d2v2ds.batch import Batch
from d2v2ds.data.collate import Collator
from d2v2ds.data.order import BatchPlan, GlobalBatch, MicroBatch, SamplerState, for_rank
from d2v2ds.data.reader import Reader
from d2v2ds.data.workers import (
    check_semaphores,
    job_signals_blocked,
    main_module_hidden,
    prepare_worker,
    shared,
    start_server,
    stop_workers,
    worker_context,
)
from d2v2ds.errors import MachineError
from d2v2ds.io.machine_faults import ADVICE, advice

logger = logging.getLogger(__name__)

POLL_S = 2
"""Seconds between two looks at workers and signals while a batch is waited for."""
WARN_S = 60.0
"""Seconds of waiting before a warning."""


class WaitEndedError(Exception):
    """The run is to stop while it waits for data; nothing is wrong."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Settings of reading ahead."""

    num_workers: int = 2
    """Data workers (processes) of each rank; 0 reads in the training process."""
    prefetch_factor: int = 4
    """Micro-batches that each worker reads ahead."""
    max_wait_s: float = 900.0
    """Seconds to wait for a micro-batch of the workers before the run ends."""

    def check(self) -> None:
        """Raise ValueError for counts out of range."""
        if self.num_workers < 0 or self.prefetch_factor < 1:
            raise ValueError(
                f"num_workers must be at least 0 and prefetch_factor at least 1, found {self.num_workers} "
                f"and {self.prefetch_factor}"
            )


@dataclass(frozen=True)
class DataStream:
    """Reader and order of one modality's data."""

    reader: Reader
    plan: BatchPlan


@dataclass(frozen=True)
class StepData:
    """One rank's share of one global batch of every modality."""

    state_after: dict[str, SamplerState]
    """Position of each modality after this step, for the checkpoint."""
    micro: list[Batch]
    """Modality by modality, each in its plan's order; the same number and order of modalities on every rank, with
    fillers of `loss_weight` 0."""


def build_loader(
    streams: Mapping[str, DataStream],
    *,
    state: Mapping[str, SamplerState],
    rank: int,
    world: int,
    config: LoaderConfig,
    pin_memory: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> "StepLoader":
    """Read batches from a position on.

    Args:
        streams: by modality; the readers are sent to the workers. The seed of a plan also decides crops and masks.
        state: first position, by modality.
        rank: this rank.
        world: number of ranks.
        config: workers and reading ahead.
        pin_memory: place batches in page-locked memory, for copies to a GPU.
        is_stopping: asked while a batch is waited for; True ends the wait.

    Returns:
        An endless iterator; it closes at the end of the program at the latest.

    Raises:
        ValueError: impossible settings.
    """
    config.check()
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in 0..{world - 1}, found {rank}")
    collators = {name: Collator(reader=stream.reader, seed=stream.plan.seed) for name, stream in streams.items()}
    plans = {name: stream.plan for name, stream in streams.items()}
    workers: dict[str, Any] = {}
    if config.num_workers > 0:
        workers = {
            "multiprocessing_context": worker_context(__name__),
            "prefetch_factor": config.prefetch_factor,
            "worker_init_fn": prepare_worker,
            "timeout": POLL_S,
        }
    return StepLoader(
        DataLoader(
            _MicroBatches(collators),
            sampler=_RankOrder(plans, state, rank, world),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=config.num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else a new loader draws from the model's generator
            **workers,
        ),
        config.max_wait_s,
        is_stopping,
    )


def start_worker_server() -> None:
    """Start the process that workers are forked from, before the loader is built: its imports take seconds."""
    start_server(__name__)


class StepLoader(Iterator[StepData]):
    """Collects micro-batches into steps, and stops the workers."""

    def __init__(self, loader: DataLoader, max_wait_s: float, is_stopping: Callable[[], bool]) -> None:
        self._max_wait_s, self._is_stopping = max_wait_s, is_stopping
        try:
            with job_signals_blocked(), main_module_hidden():
                if loader.num_workers > 0:
                    check_semaphores(worker_context(__name__), loader.num_workers)
                running = [iter(loader)]
        except OSError as error:  # workers need semaphores, which lie in /dev/shm, and descriptors
            raise MachineError(f"the data workers cannot be started: {error}; {advice(error)}") from error
        self._running = running
        self.close = weakref.finalize(self, stop_workers, running)
        """Stop the workers. Runs automatically at exit, or when the loader is garbage-collected."""
        atexit.register(self.close)  # before multiprocessing's own, which would wait for workers for ever

    def __next__(self) -> StepData:
        """Wait for the data of the next step.

        Raises:
            ShardError: no row of a micro-batch can be read.
            WaitEndedError: the run is to stop.
            MachineError: a worker ended, nothing came for `max_wait_s`, or the machine is at fault.
        """
        if not self._running:
            raise RuntimeError("StepLoader: expected an open loader, found a closed one; build another")
        micro: list[Batch] = []
        while True:
            batch, state_after = self._receive()
            micro.append(batch)
            if state_after is not None:
                return StepData(state_after, micro)

    def _receive(self) -> tuple[Batch, dict[str, SamplerState] | None]:
        """Wait for a micro-batch, a few seconds at a time: a worker may have ended, or lost one on its way."""
        began, has_warned = time.monotonic(), False
        while True:
            try:
                found: tuple[Batch, dict[str, SamplerState] | None] = next(self._running[0])
                return found
            except RuntimeError as error:
                if "exited unexpectedly" in str(error):
                    raise MachineError(f"{error}; the system kills processes when memory runs out") from error
                if "Too many open files" in str(error):
                    raise MachineError(f"{error}; {ADVICE[errno.EMFILE]}") from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            waited = time.monotonic() - began
            if self._is_stopping():
                raise WaitEndedError
            if waited > self._max_wait_s:
                raise MachineError(
                    f"no data came from the data workers for {waited:.0f} s, though they live; what they printed says "
                    "why, else the file system hangs. Raise data.max_wait_seconds if it is only slow"
                )
            if waited > WARN_S and not has_warned:
                has_warned = True
                logger.warning("no data for %.0f s; waiting for the data workers up to %g s", waited, self._max_wait_s)


@dataclass(frozen=True)
class _Request:
    """Micro-batch for a worker to read."""

    modality: str
    micro: MicroBatch
    state_after: dict[str, SamplerState] | None
    """Set only for the last micro-batch of a step."""


class _RankOrder(Sampler[_Request]):
    """Micro-batches of one rank in order, without end. Runs in the training process."""

    def __init__(
        self, plans: Mapping[str, BatchPlan], state: Mapping[str, SamplerState], rank: int, world: int
    ) -> None:
        self.plans, self.state, self.rank, self.world = plans, state, rank, world

    def __iter__(self) -> Iterator[_Request]:
        endless = {name: plan.iter_from(self.state[name]) for name, plan in self.plans.items()}
        while True:
            step: dict[str, GlobalBatch] = {name: next(batches) for name, batches in endless.items()}
            *first, last = [
                (name, micro) for name, batch in step.items() for micro in for_rank(batch, self.rank, self.world)
            ]
            for name, micro in first:
                yield _Request(name, micro, None)
            yield _Request(*last, {name: batch.state_after for name, batch in step.items()})


class _MicroBatches(Dataset[tuple[Batch, dict[str, SamplerState] | None]]):
    """Reads and masks the micro-batches of requests. Runs in the workers."""

    def __init__(self, collators: Mapping[str, Collator]) -> None:
        self.collators = dict(collators)

    def __getitem__(self, request: _Request) -> tuple[Batch, dict[str, SamplerState] | None]:
        batch = self.collators[request.modality](request.micro)
        if torch.utils.data.get_worker_info() is not None:
            batch = shared(batch)
        return batch, request.state_after


def _unchanged(item: Any) -> Any:
    return item
