"""Who may import whom (house rules, README "Annotated tree"): arrows between rooms point one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED = {
    # room: rooms of ours it may import
    "errors": set(),
    "crc": set(),
    "durable": set(),
    "tensorheader": set(),
    "shapes": set(),
    "batch": {"shapes", "errors"},
    "masking": {"shapes", "errors"},
    "model": {"shapes", "batch", "errors"},
    "data": {"crc", "shapes", "batch", "masking", "errors"},
    "dist": {"crc", "durable", "tensorheader", "errors"},
    "train": {"model", "data", "dist", "batch", "shapes", "errors"},
    "interop": {"model", "data.tokenizers", "durable", "tensorheader", "shapes", "errors"},
    "evals": {"model", "data", "batch", "errors"},
    "api": {"model", "data", "interop", "shapes", "errors"},
    "config": {"model", "data", "train", "masking", "errors", "summary"},  # summary: for the command alone
    "summary": {"config", "model", "dist", "masking"},
    "preprocessing": {
        "crc",
        "data.schema",
        "data.shards",
        "data.shardfile",
        "data.flac",
        "data.pixels",
        "data.tokenizers",
        "shapes",
        "errors",
    },
}
ENTRY_POINTS = {
    "__init__",
    "pretrain",
    "verify",
    "export",
    "probe",
    "demo",
    "provenance",
    "checkpoints",
    "restart",
    "extract",
    "warm_start",
}
"""May import everything of ours, but nothing may import them except another entry point."""

ONLY_IN = {
    "deepspeed": {"dist"},
    "mpi4py": {"preprocessing"},
    "pyarrow": {"data", "preprocessing"},
    "transformers": {"interop.hub_files"},
    "onnx": {"interop"},
    "onnxscript": {"interop"},
    "onnxruntime": {"interop"},
}
"""Outside packages that stay in certain rooms, or in a part of one."""
NEVER = {"preprocessing": {"torch", "deepspeed"}, "model": {"numpy", "pyarrow", "deepspeed"}, "masking": {"torch"}}


def sources() -> list[Path]:
    return [*(ROOT / "d2v2ds").rglob("*.py"), *(ROOT / "preprocessing").rglob("*.py")]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "preprocessing" if parts[0] == "preprocessing" else parts[1]


def part_of(path: Path) -> str:
    """The room, and the folder or module within it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:3])


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the room"
            if node.module == "d2v2ds":
                yield from ((node.lineno, f"d2v2ds.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def faults_in(path: Path) -> list[str]:
    room, faults = room_of(path), []
    for line, module in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        top, *rest = module.split(".")
        if top == "d2v2ds" and rest and rest[0] not in (room, "__version__") and room not in ENTRY_POINTS:
            allowed = ALLOWED[room]
            if rest[0] not in allowed and ".".join(rest[:2]) not in allowed:
                faults.append(f"{where}: {room} must not import {'.'.join(rest[:2])}; it may: {sorted(allowed)}")
        if top == "preprocessing" and room != "preprocessing":
            faults.append(f"{where}: {room} must not import preprocessing")
        if top in ONLY_IN and not {room, part_of(path)} & ONLY_IN[top]:
            faults.append(f"{where}: {top} belongs in {sorted(ONLY_IN[top])}, not in {room}")
        if top in NEVER.get(room, set()):
            faults.append(f"{where}: {room} must not import {top}")
    return faults


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    assert not faults_in(path)


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(path) for path in sources()}
    assert rooms <= set(ALLOWED) | ENTRY_POINTS


def test_a_wrong_edge_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "d2v2ds" / "model" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import deepspeed\nfrom d2v2ds.data.shards import AudioShards\nfrom d2v2ds import config\nimport transformers\n"
    )
    faults = faults_in(file)
    assert [fault.split(": ", 1)[1][:32] for fault in faults] == [
        "deepspeed belongs in ['dist'], n",
        "model must not import deepspeed",
        "model must not import data.shard",
        "model must not import config; it",
        "transformers belongs in ['intero",
    ]
