"""The source files of the packages and what they import, read with `ast`: for the import table and the measures."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("d2v2ds", "preprocessing")

COMMANDS = frozenset(
    {
        "pretrain", "finetune", "probe", "evaluate", "ngram", "outputs", "transcribe", "classify", "tune_decoder",
        "export", "extract", "checkpoints", "demo", "results", "sweep",
    }
)  # fmt: skip
"""Modules or folders of `d2v2ds` that a user starts; so is every ``__main__.py``."""


def source_files(root: Path = ROOT) -> list[Path]:
    """Every Python file of the packages."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def module_of(path: Path, root: Path = ROOT) -> str:
    """Dotted name of a file: `d2v2ds.io` for ``d2v2ds/io/__init__.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Room of a module: `model` for `d2v2ds.model.block`, `commands` for what a user starts."""
    top, *rest = module.split(".")
    if top != "d2v2ds":
        return top
    if not rest:
        return "__init__"
    return "commands" if rest[0] in COMMANDS or rest[-1] == "__main__" else rest[0]


def imports_of(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each imported module, those inside functions too; submodules are named in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import; name the room"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if _is_module(name, root) else node.module


def _is_module(name: str, root: Path) -> bool:
    place = root.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
