"""Every command of the documentation names a program that exists, options that it has and settings that there are."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v2ds.config.load import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RESULTS.md")),
    *(ROOT / room / "README.md" for room in ("preprocessing", "slurm", "ds_configs")),
]
MODULES = [path for room in ("d2v2ds", "preprocessing") for path in sorted((ROOT / room).rglob("*.py"))]
RUNS = ("pretrain", "config")
"""Programs of `d2v2ds` that take settings of a run."""


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, its arguments) of every `python -m`, and of launchers, in blocks and within lines."""
    text = re.sub(r"\\\n\s*", " ", text)
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text)]
    for line in [*text.splitlines(), *inline]:
        found = re.search(r"(?:python|deepspeed|torchrun|mpirun|srun)\b[^`]*? (?:-m|--module) (\w[\w.]*)([^`]*)$", line)
        if found and found[1].split(".")[0] in ("d2v2ds", "preprocessing", "tests"):
            yield found[1], re.sub(r"[][]", " ", re.split(r"\s#", found[2])[0]).split()


def found_in(path: Path) -> list[tuple[str, list[str]]]:
    """Those of a document, or of a module's docstring."""
    text = path.read_text(encoding="utf-8")
    return list(commands(text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""))


CASES = [(path.relative_to(ROOT), *command) for path in [*DOCUMENTS, *MODULES] for command in found_in(path)]


def test_commands_are_found() -> None:
    text = "    deepspeed --module d2v2ds.pretrain --config x \\\n     a.b=1  # why\nor `python -m tests.a [--x]`"
    assert list(commands(text)) == [("d2v2ds.pretrain", ["--config", "x", "a.b=1"]), ("tests.a", ["--x"])]
    assert len(CASES) > 60


def test_results_name_their_revisions() -> None:
    """\"This commit\" is found by nobody who has the file alone."""
    assert "this commit" not in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "RESULTS.md", "examples/sensors/README.md"])
def test_documented_paths_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"\b(?:d2v2ds|preprocessing|tests|ds_configs|slurm|examples)/[\w/.]*\w/?", text)
    assert len(named) > 3
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("document", "module", "arguments"), CASES, ids=lambda value: str(value)[:60])
def test_a_documented_command_is_one_that_there_is(
    document: Path, module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(module)
    if module.startswith("tests."):
        return  # `tests/benchmarks/test_commands.py` runs these
    if hasattr(program, "__path__"):  # `python -m` runs the package's `__main__`
        program = importlib.import_module(f"{module}.__main__")
    words = [word.partition("|")[0] for word in arguments if not word.startswith("-") and "..." not in word]
    with pytest.raises(SystemExit) as ended:
        program.main([*(word for word in words[:1] if not word.isupper()), "--help"])  # a subcommand, no placeholder
    assert ended.value.code == 0, f"{module} {words[:1]}"
    said = capsys.readouterr().out
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert re.search(rf"{option}\b", said), f"{document}: {module} has no option {option}"
    if module in [f"d2v2ds.{name}" for name in RUNS]:
        named = arguments[arguments.index("--config") + 1] if "--config" in arguments else (words or ["audio_base"])[0]
        load_config("audio_base" if named == "NAME" else named, [word for word in words if "=" in word])
