"""Who may import whom: arrows between rooms point one way, and packing loads no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.preprocessing.helpers import clean_environment
from tests.sources import ROOT, imports_of, module_of, room_of, source_files

_BELOW_RUN = {
    "errors", "bounds", "shapes", "rng", "io", "batch", "masking", "whole_masks", "labels",
    "model", "data", "objectives", "tasks", "decoding",
    "modalities", "distributed", "train", "inference", "interop", "evals", "config", "api",
}  # fmt: skip

ALLOWED = {
    # room: rooms, or modules of a room, that it may import
    "errors": set(),
    "bounds": set(),
    "shapes": set(),
    "rng": set(),
    "io": {"errors"},
    "batch": {"shapes", "rng", "errors"},
    "masking": {"shapes", "rng", "bounds", "errors"},
    "whole_masks": {"masking", "rng", "bounds", "errors"},
    "labels": {"batch", "masking", "errors"},
    "model": {"shapes", "batch", "bounds", "errors"},
    "data": {"whole_masks", "labels", "shapes", "batch", "masking", "rng", "io", "bounds", "errors"},
    "objectives": {"whole_masks", "labels", "model", "batch", "masking", "rng", "shapes", "bounds", "errors"},
    "tasks": {"labels", "objectives.protocol", "objectives.defaults", "model", "batch", "masking", "rng", "shapes", "bounds", "errors"},  # noqa: E501
    "decoding": {"tasks.vocabulary", "io", "bounds", "errors"},
    "modalities": {"whole_masks", "labels", "model", "data", "masking", "rng", "shapes", "io", "bounds", "errors"},
    "distributed": {"io", "errors"},
    "train": {"objectives.protocol", "data", "distributed", "batch", "io", "bounds", "errors"},
    "inference": {"model", "modalities", "interop", "data", "io", "shapes", "errors"},
    "interop": {"whole_masks", "tasks", "model", "modalities", "objectives", "data.codecs", "masking", "io", "bounds", "shapes", "errors"},  # noqa: E501
    "evals": {"tasks", "model", "data", "batch", "distributed.comm", "errors"},
    "config": {"model", "data", "masking", "objectives", "tasks", "modalities", "distributed", "train", "io", "shapes", "bounds", "errors"},  # noqa: E501
    "api": {"model", "modalities", "data", "inference", "interop", "shapes", "errors"},
    "run": _BELOW_RUN,
    "verify": _BELOW_RUN,
    "commands": _BELOW_RUN | {"run", "verify"},
    "__init__": {"api"},
    "preprocessing": {"data.schema", "data.shards", "data.shardfile", "data.codecs", "modalities", "shapes", "io", "errors"},  # noqa: E501
}  # fmt: skip
"""No room imports a command, not even another command."""

ONLY_IN = {
    "deepspeed": {"distributed"},
    "mpi4py": {"preprocessing"},
    "pyarrow": {"data", "inference", "modalities", "preprocessing"},
    "transformers": {"interop.hub"},
    "onnx": {"interop.onnx"},
    "onnxscript": {"interop.onnx"},
    "onnxruntime": {"interop.onnx"},
}
"""Outside packages that stay in certain rooms, or in a folder of one."""

NEVER = {
    "preprocessing": {"torch", "deepspeed"},
    "model": {"numpy", "pyarrow", "deepspeed"},
    "masking": {"torch"},
    "whole_masks": {"torch"},
    "rng": {"torch"},
    "d2v2ds": {"preprocessing", "examples", "tests"},
}
"""Outside packages, or other top folders, that a room or the whole package leaves alone."""


def faults_in(path: Path, root: Path = ROOT) -> list[str]:
    """One message for each import of a file that the tables forbid."""
    module, faults = module_of(path, root), []
    room, part = room_of(module), ".".join(module.split(".")[1:3])
    for line, name in imports_of(path, root):
        where = f"{path.relative_to(root)}:{line}"
        top, *rest = name.split(".")
        if top == "d2v2ds" and rest and (room_of(name) != room or room == "commands"):  # nor one command another
            allowed = ALLOWED.get(room, set())
            is_own_folder = name.split(".")[:2] == module.split(".")[:2]
            if not {room_of(name), ".".join(rest[:2])} & allowed and not is_own_folder:
                faults.append(f"{where}: {room} must not import {'.'.join(rest[:2])}; it may import {sorted(allowed)}")
        if top in ONLY_IN and not {room, part} & ONLY_IN[top]:
            faults.append(f"{where}: {top} belongs in {sorted(ONLY_IN[top])}, not in {room}")
        if top in NEVER.get(room, set()) | NEVER.get(module.split(".")[0], set()):
            faults.append(f"{where}: {room} must not import {top}")
    return list(dict.fromkeys(faults))  # `from a import b, c` is one


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    if faults := faults_in(path):
        pytest.fail("\n".join(faults), pytrace=False)


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(module_of(path)) for path in source_files()}
    assert rooms <= set(ALLOWED), f"no row for {sorted(rooms - set(ALLOWED))}"
    named = {name.split(".")[0] for allowed in ALLOWED.values() for name in allowed}
    assert named <= set(ALLOWED), f"unknown rooms {sorted(named - set(ALLOWED))}"


def test_the_table_has_no_two_way_pair() -> None:
    below = {room: {name.split(".")[0] for name in allowed} for room, allowed in ALLOWED.items()}
    assert not [(one, other) for one in below for other in below[one] if one in below[other]]


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_wrong_edge_is_found_and_both_rooms_are_named(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "d2v2ds/model/bad.py",
        "import deepspeed\n"
        "from d2v2ds.data.shards import AudioShards\n"
        "from d2v2ds import config\n"
        "from d2v2ds.model.block import Block\n"
        "from d2v2ds.shapes import KEY\n"
        "def later():\n    import transformers\n    from preprocessing import verify\n",
    )
    write(tmp_path, "d2v2ds/config/__init__.py", "")
    faults = faults_in(file, tmp_path)
    assert [fault.split(":", 1)[1] for fault in sorted(faults)] == [
        "1: deepspeed belongs in ['distributed'], not in model",
        "1: model must not import deepspeed",
        "2: model must not import data.shards; it may import ['batch', 'bounds', 'errors', 'shapes']",
        "3: model must not import config; it may import ['batch', 'bounds', 'errors', 'shapes']",
        "7: transformers belongs in ['interop.hub'], not in model",
        "8: model must not import preprocessing",
    ]


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("d2v2ds/train/loop.py", "from d2v2ds.objectives import losses", "train must not import objectives.losses"),
        ("d2v2ds/train/loop.py", "from d2v2ds.objectives import protocol", ""),
        ("d2v2ds/run/build.py", "from d2v2ds.pretrain import main", "run must not import pretrain"),
        ("d2v2ds/probe.py", "from d2v2ds.export import main", "commands must not import export"),
        ("d2v2ds/demo/__main__.py", "from d2v2ds.demo.speech import main", ""),
        ("d2v2ds/demo/__main__.py", "from d2v2ds.probe import main", "commands must not import probe"),
        ("d2v2ds/config/__main__.py", "from d2v2ds.run.describe import describe", ""),
        ("d2v2ds/config/load.py", "from d2v2ds.run.describe import describe", "config must not import run.describe"),
        ("d2v2ds/evals/probes.py", "from d2v2ds.distributed import comm", ""),
        ("d2v2ds/evals/probes.py", "from d2v2ds.distributed import zero", "evals must not import distributed.zero"),
        ("preprocessing/pack_text.py", "import torch.nn", "preprocessing must not import torch"),
        ("preprocessing/pack_text.py", "from d2v2ds.data import loader", "preprocessing must not import data.loader"),
    ],
)
def test_rooms_parts_and_commands_are_told_apart(tmp_path: Path, file: str, line: str, fault: str) -> None:
    for module in ("losses", "protocol"):
        write(tmp_path, f"d2v2ds/objectives/{module}.py", "")
    for module in ("distributed/comm", "distributed/zero", "data/loader"):
        write(tmp_path, f"d2v2ds/{module}.py", "")
    found = faults_in(write(tmp_path, file, line + "\n"), tmp_path)
    assert [text.split(": ", 1)[1].split(";")[0] for text in found] == ([fault] if fault else [])


# ---- what packing loads ----

IMPORT_WITHOUT_TORCH = """
import importlib, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed"):
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            raise ImportError(f"{frame.f_code.co_filename}:{frame.f_lineno} imports {name}")

sys.meta_path.insert(0, Refusing())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {error}")
"""


def torch_loaded_by(modules: list[str], folder: Path = ROOT) -> list[str]:
    """One message for each module that cannot be imported where torch is missing."""
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *modules]
    environment = clean_environment() | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


def test_packing_loads_no_torch() -> None:
    """Every module of `preprocessing`, and every module of `d2v2ds` that one of them imports at any time."""
    paths = [path for path in source_files() if path.is_relative_to(ROOT / "preprocessing")]
    ours = {name for path in paths for _, name in imports_of(path) if name.startswith("d2v2ds")}
    assert len(ours) > 5
    assert not torch_loaded_by([*map(module_of, paths), *sorted(ours)])


def test_a_module_that_loads_torch_is_found(tmp_path: Path) -> None:
    write(tmp_path, "packing/good.py", "import json")
    write(tmp_path, "packing/bad.py", "import packing.good, packing.worse")
    write(tmp_path, "packing/worse.py", "import json\nfrom torch import nn")
    found = torch_loaded_by(["packing.good", "packing.bad"], tmp_path)
    assert found == [f"packing.bad: {tmp_path}/packing/worse.py:2 imports torch"]
