"""Files of other programs are read; nothing in them is imported or run."""

import argparse
import collections
import datetime
import enum
import os
import pickle
import struct
import sys
import types
import typing
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq import torch_file
from d2v2ds.interop.fairseq.pickles import Stub, plain
from d2v2ds.interop.fairseq.torch_file import read_pickled


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
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", CALLS)
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


def test_an_unknown_class_of_dictionary_is_no_configuration_and_does_not_stop_the_rest(
    tmp_path: Path, elsewhere: types.ModuleType
) -> None:
    content = read_pickled(write(tmp_path / "x.pt", {"cfg": Items(a=1), "model": {"w": torch.ones(1)}}))
    assert plain(content["cfg"]) == "<fairseq.data2vec.models.Items>"
    assert content["cfg"].items == [("a", 1)]
    assert content["model"]["w"] == 1


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


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("is_new_format", [True, False])
def test_a_file_with_changed_bytes_is_read_or_refused_and_nothing_else(
    is_new_format: bool, protocol: int, tmp_path: Path
) -> None:
    content = {"model": {"w": torch.ones(9)}, "cfg": OmegaConf.create({"a": [1]}), "args": argparse.Namespace(b=2)}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_new_format}
    path = write(tmp_path / "x.pt", content, **options)
    whole, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.choice([1, 3, 10])):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            plain(read_pickled(path))
        except (CheckpointError, ValueError):  # the latter of `plain`, for a value that contains itself
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


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    cases = {
        "none.pt": "No such file",
        "fifo.pt": "expected a file, found a FIFO",
        ".": "expected a file, found a folder",
        "/dev/zero": "expected a file, found a device",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            read_pickled(tmp_path / name)


@pytest.mark.parametrize("is_new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read_and_nothing_harmless_is_accused(
    protocol: int, is_new_format: bool, tmp_path: Path, elsewhere: types.ModuleType
) -> None:
    cfg = OmegaConf.structured(Structured)
    shared = "a string that the pickle refers to"
    content = {
        "model": {"w": torch.arange(4.0), shared: torch.ones(1)},
        "cfg": cfg,
        "extra_state": {
            "history": collections.deque([1, shared], maxlen=4),
            "at": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
            "counts": collections.Counter("aab"),
            "set": {1, 2},
            "frozen": frozenset([shared]),
            "bytes": bytearray(b"x" * 300),
            "path": Path("a"),
            "number": np.arange(3),
            "key": {(1, (2, 3)): 4},
        },
    }
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_new_format}
    path = write(tmp_path / "x.pt", content, **options)
    del sys.modules[elsewhere.__name__]
    found = read_pickled(path)
    assert torch.equal(found["model"]["w"], torch.arange(4.0))
    assert shared in found["model"]
    assert plain(found["cfg"])["decoder"] == {"decoder_dim": 384, "kind": 1}
    assert plain(found["extra_state"]["counts"]) == {"a": 2, "b": 1}
    assert found["extra_state"]["history"].items == [1, shared]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_configuration_of_a_fork_is_read(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("EAT.models.mae")
    for one in (Modality, DecoderConfig, Structured):
        monkeypatch.setattr(one, "__module__", module.__name__)
        setattr(module, one.__name__, one)
    for name in ("EAT", "EAT.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = write(tmp_path / "x.pt", {"cfg": OmegaConf.structured(Structured)}, pickle_protocol=protocol)
    assert plain(read_pickled(path)["cfg"])["depth"] == 12


def test_only_the_model_may_be_asked_for(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    caller = Caller(os.system, f"touch {marker}")
    content = {"model": {"w": torch.ones(1)}, "cfg": {"a": 1}, "extra_state": [caller]}
    path = write(tmp_path / "x.pt", content)
    with pytest.raises(CheckpointError, match=r"posix\.system.*--only-model"):
        read_pickled(path)
    found = read_pickled(path, only_model=True)
    assert (sorted(found), found["cfg"]) == (["cfg", "model"], {"a": 1})
    for place in ("model", "cfg"):
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            read_pickled(write(tmp_path / "y.pt", content | {place: {"x": caller}}), only_model=True)
    assert not marker.exists()


def archive_of(path: Path, pickled: bytes, **entries: bytes) -> Path:
    """A file of the new format, made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled, zipfile.ZIP_DEFLATED)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def test_a_small_archive_of_a_huge_pickle_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.pt", bytes(torch_file.PICKLE_BYTES + 1))
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="a pickle of 33,554,433 bytes"):
        read_pickled(path)


def nested_tuples(depth: int) -> bytes:
    """A tuple of twice the same tuple, and so on."""
    return b"K\x01" + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(depth))


HUGE: dict[str, tuple[bytes, str]] = {
    "opcodes": (b"\x80\x02" + b"N0" * 501_000 + b"}.", "more than 1,000,000 opcodes"),
    "memo": (b"\x80\x02}r\xff\xff\xff\xff.", ""),
    "hashes": (b"\x80\x02}" + nested_tuples(60) + b"Ns.", ""),
    "hashes_of_set": (b"\x80\x04}K\x01(" + nested_tuples(60) + b"\x91s.", ""),
    "hashes_of_ordered": (b"\x80\x02}K\x01ccollections\nOrderedDict\n]" + nested_tuples(60) + b"N\x86a\x85Rs.", ""),
    "collisions": (b"\x80\x02}\x8a\x09" + ((1 << 61) - 1).to_bytes(9, "little") + b"Ns.", "more than 60 bits"),
    "bytes": (b"\x80\x05}K\x01\x96" + (1 << 40).to_bytes(8, "little") + b"s.", "cut off"),
    "name_by_number": (b"\x80\x02}K\x01\x82\x01s.", "does not write"),
    "number": (b"\x80\x02}K\x01\x8b" + (20_000).to_bytes(4, "little") + b"\x01" * 20_000 + b"s.", ""),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_pickle_made_to_take_time_or_memory_is_read_or_refused_at_once(name: str, tmp_path: Path) -> None:
    pickled, message = HUGE[name]
    path = archive_of(tmp_path / "x.pt", pickled)
    if not message:
        read_pickled(path)
        return
    with pytest.raises(CheckpointError, match=message):
        read_pickled(path)


def test_a_configuration_that_multiplies_or_contains_itself_is_an_error(tmp_path: Path) -> None:
    many: list[Any] = []
    for _ in range(12):
        many = [many] * 12
    within: dict[str, Any] = {}
    within["a"] = within
    for value in (many, within):
        with pytest.raises(ValueError, match="more than 200,000 values"):
            plain(read_pickled(write(tmp_path / "x.pt", {"cfg": value}))["cfg"])


@pytest.mark.parametrize("is_new_format", [True, False])
def test_a_tensor_must_lie_inside_of_its_file(is_new_format: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", {"model": {"w": torch.ones(77)}}, _use_new_zipfile_serialization=is_new_format)
    whole = path.read_bytes()
    shape, storage = b"KM\x85", b"KMt" if is_new_format else b"KMNt"
    assert whole.count(shape) == 1
    assert whole.count(storage) == 1
    for old, new in {shape: b"KN\x85", storage: storage.replace(b"M", b"N")}.items():
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="cut off"):
            read_pickled(path)


def test_reading_leaves_torch_as_strict_as_before(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", {"args": argparse.Namespace(a=1)})
    before = set(torch.serialization.get_safe_globals())
    read_pickled(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
