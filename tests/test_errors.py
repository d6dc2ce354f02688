"""What messages of missing packages tell to do can be done, and the exceptions travel between processes."""

import copy
import re
import subprocess
import tomllib
from pathlib import Path

from d2v2ds.errors import MissingExtraError

ROOT = Path(__file__).parents[1]


def test_a_missing_extra_is_installed_from_the_checkout() -> None:
    error = MissingExtraError("figures need matplotlib", "eval")
    assert str(error) == "figures need matplotlib: in the checkout of d2v2ds, pip install '.[eval]'"
    again = copy.copy(error)  # rebuilds it as unpickling does
    assert (type(again), str(again)) == (MissingExtraError, str(error))


def test_every_extra_that_is_named_exists_and_none_is_looked_for_on_an_index() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = set()
    for file in files:
        if not file.endswith((".py", ".md")) or file == "CHANGELOG.md":
            continue
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"pip install '?d2v2ds", text), f"{file}: d2v2ds is on no index, install from the checkout"
        named |= set(re.findall(r"MissingExtraError\([^)]*?, \"([\w,]+)\"\s*\)", text))
        named |= set(re.findall(r"pip install '\.\[([\w,]+)\]'", text))
    named = {name for names in named for name in names.split(",")}
    assert named <= set(extras)
    assert {"eval", "audio", "image", "text", "onnx", "mpi", "demo", "hub"} <= named
