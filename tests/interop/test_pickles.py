"""Files of other programs are read; nothing in them is imported or run."""

import argparse
import collections
import enum
import os
import pickle
import struct
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.pickles import Stub, plain, read_pickled


class Modality(enum.Enum):
    """Stands for an enum of the official program."""

    AUDIO = 1
    IMAGE = 2


@dataclass
class DecoderConfig:
    """Stands for a structured configuration of the official program."""

    decoder_dim: int = 384
    kind: Modality = Modality.AUDIO


@dataclass
class Structured:
    depth: int = 12
    rates: list[float] = field(default_factory=lambda: [0.1, 0.2])
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    by_name: dict[str, int] = field(default_factory=lambda: {"a": 1})
    nothing: typing.Any = None


class Slotted:
    __slots__ = ("a", "b")


class Items(dict):
    """A dictionary of another program."""


class Caller:
    """What a file says when it wants a function to be called while it is read."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> typing.Iterator[types.ModuleType]:
    """The classes above as if they were fairseq's, while a file is written; afterwards the module is gone."""
    module = types.ModuleType("fairseq.data2vec.models")
    with monkeypatch.context() as patch:
        for one in (Modality, DecoderConfig, Structured, Slotted, Items):
            patch.setattr(one, "__module__", module.__name__)
            setattr(module, one.__name__, one)
        patch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
        patch.setitem(sys.modules, "fairseq.data2vec", types.ModuleType("fairseq.data2vec"))
        patch.setitem(sys.modules, module.__name__, module)
        yield module


def write(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def test_omegaconf_containers_become_plain(tmp_path: Path) -> None:
    values = {
        "model": {"depth": 3, "rate": 0.5, "on": True, "none": None, "list": [1, [2, "x"]], "at": "${model.depth}"},
        "missing": "???",
    }
    content = read_pickled(write(tmp_path / "x.pt", {"cfg": OmegaConf.create(values)}))
    assert isinstance(content["cfg"], Stub)
    assert plain(content["cfg"]) == values


def test_structured_configurations_and_enums_of_modules_that_do_not_exist_here(
    tmp_path: Path, elsewhere: types.ModuleType
) -> None:
    cfg = OmegaConf.structured(Structured)
    cfg._metadata.resolver_cache["now"]["x"] = "y"  # a dictionary with a factory, and not empty
    file = write(tmp_path / "x.pt", {"cfg": cfg, "kind": Modality.IMAGE, "by_kind": {Modality.AUDIO: 5}})
    del sys.modules[elsewhere.__name__]
    content = plain(read_pickled(file))
    assert content == {
        "cfg": {
            "depth": 12,
            "rates": [0.1, 0.2],
            "decoder": {"decoder_dim": 384, "kind": 1},
            "by_name": {"a": 1},
            "nothing": None,
        },
        "kind": 2,
        "by_kind": {1: 5},
    }
    assert elsewhere.__name__ not in sys.modules


def test_namespaces_objects_and_other_leftovers_become_plain(tmp_path: Path, elsewhere: types.ModuleType) -> None:
    slotted = Slotted()
    slotted.a, slotted.b = 1, [2]  # type: ignore[attr-defined]
    content = {
        "args": argparse.Namespace(lr=[0.1], inner=argparse.Namespace(x=None)),
        "object": DecoderConfig(7),
        "slotted": slotted,
        "counts": collections.defaultdict(list, {"a": [1]}),
        "ordered": collections.OrderedDict(b=1, a=2),
        "number": np.float64(1.5),
        "type": DecoderConfig,
        "hint": typing.Optional[int],  # noqa: UP045  (pickled as an index into typing.Optional)
        "tuple": (1, {2}),
    }
    found = plain(read_pickled(write(tmp_path / "x.pt", content)))
    assert found["args"] == {"lr": [0.1], "inner": {"x": None}}
    assert found["object"] == {"decoder_dim": 7, "kind": 1}
    assert (found["slotted"], found["counts"], found["tuple"]) == ({"a": 1, "b": [2]}, {"a": [1]}, [1, [2]])
    assert list(found["ordered"]) == ["b", "a"]
    assert (found["type"], found["number"]) == (
        "<fairseq.data2vec.models.DecoderConfig>",
        f"<{np.float64(1.5).__reduce__()[0].__module__}.scalar>",
    )
    assert found["hint"].startswith("<")


@pytest.mark.parametrize("is_new_format", [True, False])
def test_tensors_keep_type_and_bits(is_new_format: bool, tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(3).bfloat16(),
        "view": torch.arange(12.0).view(3, 4).t()[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    content = {"model": tensors, "cfg": OmegaConf.create({"a": 1}), "args": argparse.Namespace(b=2)}
    path = write(tmp_path / "x.pt", content, _use_new_zipfile_serialization=is_new_format)
    found = read_pickled(path)
    for name, tensor in tensors.items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor)
    assert (plain(found["cfg"]), plain(found["args"])) == ({"a": 1}, {"b": 2})


CALLS: dict[str, tuple[Any, str]] = {
    "shell": (os.system, "posix.system"),
    "eval": (eval, "builtins.eval"),
    "import": (__import__, "builtins.__import__"),
    "attribute": (getattr, "builtins.getattr"),
    "more_pickles": (pickle.loads, "pickle.loads"),
    "torch_itself": (torch.storage._load_from_bytes, "torch.storage._load_from_bytes"),
    "torch_unlisted": (torch.hub.load, "torch.hub.load"),
}


@pytest.mark.parametrize("is_new_format", [True, False])
@pytest.mark.parametrize(
    "name, protocol",
    # torch stops at protocol 4 before it looks at the names that are its own
    [(name, protocol) for name in CALLS for protocol in (2, 4) if protocol == 2 or not name.startswith("torch")],
)
def test_a_file_that_wants_to_run_code_is_refused_by_name(
    name: str, protocol: int, is_new_format: bool, tmp_path: Path
) -> None:
    function, called = CALLS[name]
    marker = tmp_path / "marker"
    caller = Caller(function, f"touch {marker}")
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_new_format}
    path = write(tmp_path / "x.pt", {"model": {"w": torch.ones(1)}, "cfg": caller}, **options)
    with pytest.raises(CheckpointError, match=f"{called}.*nothing was run") as caught:
        read_pickled(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_a_function_of_a_known_module_is_not_called_either(tmp_path: Path, elsewhere: types.ModuleType) -> None:
    calls = []

    def run(*args: Any) -> None:
        calls.append(args)

    run.__module__, run.__qualname__ = elsewhere.__name__, "run"
    elsewhere.run = run  # type: ignore[attr-defined]
    content = read_pickled(write(tmp_path / "x.pt", {"cfg": Caller(run, 1, 2)}))
    assert elsewhere.__name__ in sys.modules  # so it could have been
    assert calls == []
    assert content["cfg"].args == (1, 2)


def test_a_hidden_name_is_no_way_around(tmp_path: Path) -> None:
    # the name looks like one of omegaconf and would lead to os.system if it were looked up
    path, marker = tmp_path / "x.pt", tmp_path / "marker"
    command = f"touch {marker}".encode()
    call = b"comegaconf.os\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R"
    before = [pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {})]
    content = b"\x80\x02}X\x05\x00\x00\x00model" + call + b"s."
    path.write_bytes(b"".join([*before, content, pickle.dumps([], 2)]))
    stub = read_pickled(path)["model"]
    assert (stub.full_name, stub.args) == ("omegaconf.os.system", (command.decode(),))
    assert not marker.exists()


def test_items_in_an_unknown_class_are_an_error_not_a_guess(tmp_path: Path, elsewhere: types.ModuleType) -> None:
    path = write(tmp_path / "x.pt", {"cfg": Items(a=1)})
    with pytest.raises(CheckpointError, match="Can only SETITEMS? for dict"):
        read_pickled(path)


@pytest.mark.parametrize("is_new_format", [True, False])
def test_a_file_cut_anywhere_is_damaged(is_new_format: bool, tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.pt",
        {"model": {"w": torch.ones(50)}, "cfg": OmegaConf.create({"a": 1})},
        _use_new_zipfile_serialization=is_new_format,
    )
    content = path.read_bytes()
    for length in (*range(20, len(content) - 1, len(content) // 25), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.pt: .*(cut off|no file|something else)"):
            read_pickled(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_new_format", [True, False])
def test_a_file_with_changed_bytes_is_read_or_refused_and_nothing_else(is_new_format: bool, tmp_path: Path) -> None:
    content = {"model": {"w": torch.ones(9)}, "cfg": OmegaConf.create({"a": [1]}), "args": argparse.Namespace(b=2)}
    path = write(tmp_path / "x.pt", content, _use_new_zipfile_serialization=is_new_format)
    whole, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.choice([1, 3, 10])):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            plain(read_pickled(path))
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"PK", b"hello, world", pickle.dumps({"model": 1})])
def test_what_torch_did_not_write_is_named_as_such(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected a file of torch\.save, found something else"):
        read_pickled(path)


def test_content_must_be_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a dictionary, found list"):
        read_pickled(write(tmp_path / "x.pt", [1, 2]))


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_pickled(tmp_path / "none.pt")


def test_reading_leaves_torch_as_strict_as_before(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", {"args": argparse.Namespace(a=1)})
    before = set(torch.serialization.get_safe_globals())
    read_pickled(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
