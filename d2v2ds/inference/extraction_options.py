"""Options of `d2v2ds.extract`, and how they are given on a command line."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PART_TOKENS = 1 << 17
"""Tokens of a part, about: 44 minutes of speech, 669 images of 224 pixels, 256 blocks of 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an extraction; a part file is reused only under equal options."""

    model: str
    shards: str
    layers: tuple[int, ...] | None
    pool: str
    weights: str
    dtype: str
    batch_tokens: int | None
    part_tokens: int | None


def parse(arguments: list[str] | None, description: str) -> tuple[Options, Path, int | None]:
    """Read a command line: what is extracted, the file to write, and the number of processes."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.extract", description=description)
    parser.add_argument("--model", required=True, help="folder written by d2v2ds.export")
    parser.add_argument("--shards", required=True, help="packed folder")
    parser.add_argument("--out", type=Path, required=True, help="Arrow file to write")
    parser.add_argument("--layers", help="numbers such as 6,12; --layers=-2,-1 counts from the last; all if not given")
    parser.add_argument("--pool", choices=("mean", "none"), default="mean", help="mean over tokens (default), or none")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the computation (float32)")
    parser.add_argument("--workers", type=int, help="processes; one for each accelerator if not given")
    parser.add_argument(
        "--batch-tokens", type=int, help="most tokens of one forward; what suits the device if not given"
    )
    parser.add_argument(
        "--part-tokens", type=int, help=f"tokens of a part that is kept when killed ({PART_TOKENS}, unpooled 1 GiB)"
    )
    given = parser.parse_args(arguments)
    for name in ("workers", "batch_tokens", "part_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    try:
        layers = None if given.layers is None else tuple(int(number) for number in given.layers.split(","))
    except ValueError:
        parser.error(f"--layers {given.layers}: expected numbers divided by commas, such as 6,12")
    options = Options(
        model=given.model,
        shards=given.shards,
        layers=layers,
        pool=given.pool,
        weights=given.weights,
        dtype=given.dtype,
        batch_tokens=given.batch_tokens,
        part_tokens=given.part_tokens,
    )
    return options, given.out, given.workers
