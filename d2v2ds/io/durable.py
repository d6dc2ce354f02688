"""Small files that survive a power cut, and change in one step."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's or folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file and make it durable."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Change a small file in one step: readers see the old text or the new one."""
    fresh = path.with_name(path.name + ".tmp")
    write_text(fresh, text)
    fresh.replace(path)
    sync(path.parent)
