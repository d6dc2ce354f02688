"""Measures of the layout against their limits: ``python -m tests.structure``; exits 1 if a limit is broken.

Counted are `d2v2ds` and `preprocessing`. A function has all lines from ``def`` to its end, docstring included, and
nested ones count for the outer one too; a module has all lines of its file. Imports inside functions count like others.
"""

import ast
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.sources import ROOT, imports_of, module_of, room_of, source_files

READ = [
    ("d2v2ds/data/loader.py", "_MicroBatches.__getitem__"),
    ("d2v2ds/data/collate.py", "Collator.__call__", "collators"),
    ("d2v2ds/modalities/audio/reader.py", "AudioReader.read"),
    ("d2v2ds/modalities/audio/reader.py", "decode"),
    ("d2v2ds/modalities/audio/shards.py", "AudioShards.read_audio"),
]
"""File and function on the way from the loader down to the mapped shard; each calls the next by its name, or by the
third value if that is another one."""
LOSS = [
    ("d2v2ds/train/step.py", "train_step"),
    ("d2v2ds/objectives/data2vec2.py", "Data2Vec2.losses"),
    ("d2v2ds/objectives/data2vec2.py", "Data2Vec2Network.forward", "network"),
    ("d2v2ds/objectives/loss.py", "regression_loss"),
]
"""File and function on the way from a batch down to its loss, in the same form."""

MODALITIES = {"audio", "image", "text", "spectrogram"}
KNOW_MODALITIES = [
    "d2v2ds/modalities", "d2v2ds/interop/fairseq", "d2v2ds/interop/data2vec1/images", "preprocessing/audio",
    "preprocessing/image", "preprocessing/text",
]  # fmt: skip
"""Folders that may compare strings with the name of a modality."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measure:
    """One line of the table."""

    name: str
    limit: int
    found: int
    worst: Sequence[str] = ()
    """Places, the worst first."""


def functions_in(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Name with those of the classes and functions around it, and definition."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, (ast.ClassDef, Function)) else prefix
        if isinstance(child, Function):
            yield name, child
        yield from functions_in(child, f"{name}." if isinstance(child, (ast.ClassDef, Function)) else prefix)


def length_measures(kind: str, lengths: Iterable[tuple[int, str]], p90: int, most: int) -> list[Measure]:
    """90th percentile and maximum."""
    ordered = sorted(lengths)
    at = ordered[math.ceil(0.9 * len(ordered)) - 1][0]
    over = [f"{name} {length}" for length, name in reversed(ordered) if length > most]
    return [
        Measure(f"{kind}: 90th percentile of lines", p90, at),
        Measure(f"{kind}: most lines", most, ordered[-1][0], over or [ordered[-1][1]]),
    ]


def part_of(module: str) -> str:
    """Room of a module; a folder of `preprocessing` counts as one."""
    top, *rest = module.split(".")
    return ".".join([top, *rest[:1]]) if top == "preprocessing" and len(rest) > 1 else room_of(module)


def is_command(module: str, path: Path) -> bool:
    """Return True for the file that a command starts with."""
    return room_of(module) == "commands" and (path.name == "__main__.py" or path.parent.name == "d2v2ds")


def two_way_pairs(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Rooms that import each other."""
    arrows = {(part_of(one), part_of(other)) for one, other in edges}
    return sorted(f"{one} <-> {other}" for one, other in arrows if one < other and (other, one) in arrows)


def circles(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Groups of modules each of which reaches all others of the group through imports."""
    below: dict[str, set[str]] = {}
    for one, other in edges:
        below.setdefault(one, set()).add(other)

    def reached(module: str) -> set[str]:
        found, ahead = set[str](), list(below.get(module, ()))
        while ahead:
            if (here := ahead.pop()) not in found:
                found.add(here)
                ahead.extend(below.get(here, ()))
        return found

    reach = {module: reached(module) for module in below}
    groups = {frozenset(other for other in reach[one] if one in reach.get(other, ())) for one in below}
    return sorted(" ".join(sorted(group)) for group in groups if group)


def named_modalities(path: str, tree: ast.AST) -> Iterator[str]:
    """Comparisons with the name of a modality, alone or in a list of names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [part for side in sides for part in getattr(side, "elts", [side])]
        else:
            parts = [node.value] if isinstance(node, ast.MatchValue) else []
        if any(isinstance(part, ast.Constant) and part.value in MODALITIES for part in parts):
            yield f"{path}:{getattr(node, 'lineno', 0)} {ast.unparse(node)[:60]}"


def breaks_of(chain: Sequence[tuple[str, ...]], trees: dict[str, ast.Module]) -> Iterator[str]:
    """Functions of a chain that do not exist, or do not call the next one."""
    bodies = [dict(functions_in(trees[file])).get(name) if file in trees else None for file, name, *_ in chain]
    yield from (f"{file}: no {name}" for (file, name, *_), body in zip(chain, bodies, strict=True) if body is None)
    for (here, there), body in zip(pairwise(chain), bodies, strict=False):
        called = there[2] if len(there) > 2 else there[1].split(".")[-1]
        if body is not None and called not in {_called(node) for node in ast.walk(body) if isinstance(node, ast.Call)}:
            yield f"{here[1]} does not call {called}"


def _called(call: ast.Call) -> str:
    target = call.func.value if isinstance(call.func, ast.Subscript) else call.func
    return target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")


def measure(root: Path = ROOT) -> list[Measure]:
    """Every measure of the source tree under a folder."""
    modules = {module_of(path, root): path for path in source_files(root)}
    files = {module: str(path.relative_to(root)) for module, path in modules.items()}
    trees = {files[module]: ast.parse(path.read_text(encoding="utf-8")) for module, path in modules.items()}
    lengths = {files[module]: len(path.read_text("utf-8").splitlines()) for module, path in modules.items()}
    edges = [(one, other) for one, path in modules.items() for _, other in imports_of(path, root) if other in modules]
    functions = [
        ((body.end_lineno or 0) - body.lineno + 1, f"{file} {name}")
        for file, tree in trees.items()
        for name, body in functions_in(tree)
    ]
    commands = [files[module] for module, path in modules.items() if is_command(module, path)]
    long = [f"{name} {lengths[name]}" for name in sorted(commands, key=lengths.__getitem__) if lengths[name] >= 60]
    knowing = tuple(f"{folder}/" for folder in KNOW_MODALITIES)
    compared = [
        line for file, tree in trees.items() if not file.startswith(knowing) for line in named_modalities(file, tree)
    ]
    pairs, groups = two_way_pairs(edges), circles(edges)
    breaks = [*breaks_of(READ, trees), *breaks_of(LOSS, trees)]
    return [
        Measure("rooms: two-way pairs", 0, len(pairs), pairs),
        Measure("modules: circles of imports", 0, len(groups), groups),
        *length_measures("functions", functions, 30, 60),
        *length_measures("modules", ((length, name) for name, length in lengths.items()), 330, 450),
        Measure("commands of 60 lines or more", 0, len(long), long[::-1]),
        Measure("comparisons with a modality's name", 0, len(compared), compared),
        Measure("from disk to loss: functions", 9, len(READ) + len(LOSS), [step[1] for step in (*READ[::-1], *LOSS)]),
        Measure("from disk to loss: files", 7, len({step[0] for step in (*READ, *LOSS)})),
        Measure("from batch to loss: functions", 5, len(LOSS)),
        Measure("from disk to loss: breaks of the chain", 0, len(breaks), breaks),
    ]


def main() -> int:
    """Print the table; returns the exit code."""
    measures = measure()
    print(f"{'measure':<42}{'limit':>7}{'found':>7}")
    for one in measures:
        print(f"{one.name:<42}{one.limit:>7}{one.found:>7}{'' if one.found <= one.limit else '  TOO MANY'}")
        print("".join(f"    {line}\n" for line in one.worst), end="")
    return int(any(one.found > one.limit for one in measures))


if __name__ == "__main__":
    sys.exit(main())
