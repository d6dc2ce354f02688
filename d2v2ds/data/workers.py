"""Data workers of a loader: start, signals, end."""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from d2v2ds.batch import Batch
from d2v2ds.errors import MachineError
from d2v2ds.io.machine_faults import ADVICE, say_once

JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job. The training process finishes its step and
saves; data workers ignore them, because that step still needs data."""


def start_server(preload: str) -> None:
    """Start the process that workers are forked from; it imports a module while the caller continues."""
    worker_context(preload)
    with job_signals_blocked():
        forkserver.ensure_running()


def worker_context(preload: str) -> multiprocessing.context.ForkServerContext:
    """Return the start method of the workers: a server that imports the module `preload` once, then forks.

    Forking a process that has GPU, MPI or communication threads can deadlock the child, and each spawned worker would
    import torch again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def check_semaphores(context: multiprocessing.context.BaseContext, num_workers: int) -> None:
    """Make as many semaphores as the queues of a DataLoader have, and give them back.

    A DataLoader that lacks one of them raises the same error, and prints a traceback of its own too.

    Raises:
        OSError: there is no room in /dev/shm.
    """
    for_queue, for_event = 3, 5
    held = [context.Semaphore() for _ in range(for_queue * (num_workers + 1) + for_event)]
    held.clear()


def prepare_worker(worker: int) -> None:
    """Make this worker ignore the signals of the job and end with the training process."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training_process, daemon=True).start()


def shared(batch: Batch) -> Batch:
    """Move a batch into shared memory here, where a failure can be met; else it goes by value, through a pipe.

    The thread that sends batches would only print the failure and lose the batch. In containers shared memory is often
    64 MB.
    """
    try:
        return batch.share_memory()
    except RuntimeError as error:
        if "Too many open files" in str(error):
            raise MachineError(f"{error}; {ADVICE[errno.EMFILE]}") from error
        if "shared memory" not in str(error) and "shm" not in str(error):
            raise
        ForkingPickler.register(torch.Tensor, _by_value)
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        say_once(
            "shared memory", "/dev/shm has %.1f MB left; batches go through pipes, which is slower: mount a larger one",
            free / 1e6,
        )  # fmt: skip
        return batch


def _by_value(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)


def _end_with_training_process() -> None:
    """End this worker when the training process has ended.

    The DataLoader's own check watches the parent, which here is the fork server, and that waits for its workers. They
    would survive a killed training process.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


@contextmanager
def job_signals_blocked() -> Iterator[None]:
    """Block these signals in processes started inside, such as the fork server; this process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    resource_tracker.ensure_running()  # started here, or a signal would end it; this call unblocks some signals
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep processes started inside from importing the main module, and with it DeepSpeed, which is slow. Workers do
    not need it: all objects sent to them are defined in this package."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def stop_workers(running: list[Any]) -> None:
    """Stop the workers of an iterator, and remove it from the list.

    Without this, the traceback of an error can keep the iterator alive until the program ends, and the workers ignore
    the signal with which Python would end them then.
    """
    while running:
        shut_down = getattr(running.pop(), "_shutdown_workers", None)  # absent with num_workers=0
        if shut_down is not None:
            shut_down()
