"""Limits that a forked process gives itself before its program starts, for `tests.forked.ForkedProgram`."""

import ctypes
import importlib
import itertools
import os
import resource
import shutil
import subprocess
from pathlib import Path

from preprocessing.driver.protocol import Row

_CLONE_NEWNS = 0x20000


def address_space(extra_bytes: int, *modules: str) -> None:
    """Import modules, then let this process map so many bytes more than it has mapped by then (`ulimit -v`)."""
    for module in modules:
        importlib.import_module(module)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra_bytes, mapped + extra_bytes))


def small_shared_memory(size: str) -> None:
    """Mount a /dev/shm of its own of this size, such as `8k`."""
    _own_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)


def read_only(folder: str) -> None:
    """Mount a folder for reading only; other processes see it as before."""
    _own_mounts()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def vanishes_at_row(row: int, folder: str, how: str) -> None:
    """Move or remove a folder when a packer writes its row of this number, counted from 1."""
    from preprocessing.driver.writer import ShardWriter

    inner, rows = ShardWriter.add, itertools.count(1)

    def add(writer: ShardWriter, written: Row) -> None:
        if next(rows) == row:
            lose(Path(folder), how)
        inner(writer, written)

    ShardWriter.add = add  # type: ignore[method-assign]


def lose(folder: Path, how: str) -> None:
    """Move a folder at work to the name `moved` beside it, or remove it."""
    if how == "moved":
        folder.rename(folder.with_name("moved"))
    while how == "removed" and folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
