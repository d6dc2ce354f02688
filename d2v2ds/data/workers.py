"""Reading processes of a loader: start, signals, end."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import ModuleType
from typing import Any

JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler or a terminal sends to every process of a job. The training process answers them by
saving; data workers must outlive them, or there would be no data for the step that is finished first."""


def start_server(preload: str) -> None:
    """Start the process that workers are forked from, so that it imports a module while the caller goes on."""
    worker_context(preload)
    with job_signals_blocked():
        forkserver.ensure_running()


def worker_context(preload: str) -> multiprocessing.context.ForkServerContext:
    """Return the start method of the workers: a server that imports the module `preload` once, then forks.

    Neither by fork nor by spawn: forking a process that has GPU, MPI or communication threads can deadlock the child,
    and spawned workers would each import torch anew.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def prepare_worker(worker: int) -> None:
    """Make a worker ignore the signals of the job and end with the training process. Runs in the worker."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training_process, daemon=True).start()


def _end_with_training_process() -> None:
    """End this worker when the training process is gone.

    The DataLoader's own watch looks at the parent, which here is the fork server, and that in turn waits for its
    workers: a killed training process would leave all of them behind.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


@contextmanager
def job_signals_blocked() -> Iterator[None]:
    """Start processes that keep these signals blocked, the fork server among them; ours arrive afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    resource_tracker.ensure_running()  # inside, or a signal would end the tracker; it unblocks some of them here
    signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Start processes that do not import the program's main module, as multiprocessing's would: what is sent to ours
    comes from this package, and importing the trainer with DeepSpeed would cost each of them more than a second."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def stop_workers(running: list[Any]) -> None:
    """End the workers of an iterator at once, and empty the list that held it.

    Without this, the traceback of an error can keep the iterator alive until the program ends, and the workers ignore
    the signal by which Python would end them then.
    """
    while running:
        shut_down = getattr(running.pop(), "_shutdown_workers", None)  # absent where no worker was asked for
        if shut_down is not None:
            shut_down()
