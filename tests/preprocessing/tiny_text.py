"""A packer of made-up tokens: the smallest thing that the driver can pack, and shards of text without a tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2v2ds.data.schema import Index
from d2v2ds.modalities.text.shards import TEXT_LAYOUT, TOKEN_DTYPES
from preprocessing.driver.packing import pack
from preprocessing.driver.progress import MEBIBYTES
from preprocessing.driver.protocol import Notes, Row
from preprocessing.driver.shard_plan import Plan, Skipped, cut_shards, fingerprint
from preprocessing.driver.team.local import LocalTeam
from preprocessing.driver.team.protocol import Team

SPECIAL = {"bos": 0, "pad": 1, "eos": 2, "unk": 3}


@dataclass(frozen=True)
class TinySettings:
    """Where the bytes come from: nothing is read."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    dtype: str = "uint16"
    vocab_size: int = 1000
    shard_bytes: int = 1 << 20
    noted: Mapping[int, float] = field(default_factory=dict)
    """Length of rows that get a note -> share that they lost."""

    def check(self) -> None:
        """Everything is fine."""

    def as_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


@dataclass(frozen=True)
class TinyUnit:
    number: int
    size: int
    files: int = 1


def tokens_of(row: int, length: int, vocab_size: int) -> np.ndarray:
    """(length,) int64: what row `row` holds."""
    return np.random.default_rng(row).integers(len(SPECIAL), vocab_size, length)


@dataclass(frozen=True)
class TinyPacker:
    settings: TinySettings
    layout = TEXT_LAYOUT
    measure = MEBIBYTES

    def scan(self, team: Team, inputs: Sequence[Path]) -> Plan:
        units = [TinyUnit(number, length) for number, length in enumerate(self.settings.lengths)]
        shards = cut_shards(units, self.settings.shard_bytes, TOKEN_DTYPES[self.settings.dtype].itemsize)
        return Plan(shards=shards, skipped=(), files=len(units), sha256=fingerprint(units))

    def make_beside(self, folder: Path, plan: Plan) -> tuple[str, ...]:
        (folder / "tokenizer.txt").write_text("no tokenizer")
        return ("tokenizer.txt",)

    def format(self, folder: Path) -> dict[str, Any]:
        assert (folder / "tokenizer.txt").exists()
        return {
            "token_dtype": self.settings.dtype,
            "vocab_size": self.settings.vocab_size,
            "block_tokens": max(self.settings.lengths),
            "tokenizer": "none",
            "tokenizer_file": "tokenizer.txt",
            "special": SPECIAL,
        }

    def rows(self, units: Sequence[TinyUnit], folder: Path, notes: Notes) -> Iterator[Row]:
        for unit in units:
            notes.report(unit.files, unit.size)
            if not unit.size:
                notes.skipped.append(Skipped(order=unit.number, source=f"{unit.number}", reason="no tokens"))
                continue
            if unit.size in self.settings.noted:
                lost = self.settings.noted[unit.size]
                notes.note(
                    "unknown", f"{lost:.0%} of the tokens", order=unit.number, source=f"{unit.number}", lost=lost
                )
            tokens = tokens_of(unit.number, unit.size, self.settings.vocab_size)
            notes.counts["documents"] += 2
            yield Row(
                tokens.astype(TOKEN_DTYPES[self.settings.dtype]),
                {"id": None, "label": None, "num_tokens": unit.size, "source": f"{unit.number}", "start": 0},
            )

    def totals(self, size: int, counts: Mapping[str, int]) -> dict[str, Any]:
        return {"tokens": size, "documents": counts["documents"]}

    def describe(self, index: Index) -> str:
        return f"{index.totals['tokens']:,} tokens"

    def versions(self) -> dict[str, str]:
        return {}


def pack_tiny(
    output: Path, lengths: Sequence[int], workers: int = 1, part: tuple[int, int] | None = None, **settings: Any
) -> Any:
    """A folder of text with rows of these lengths, or a part of it: its index, None for a part."""
    team, packer = LocalTeam(workers), TinyPacker(TinySettings(tuple(lengths), **settings))
    return pack(team, packer.scan(team, []), output, packer, part=part)
