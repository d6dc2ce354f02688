"""The export folder: whole or not there, read back as written, and clear about what is wrong with it."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v2ds.data.schema import FileEntry, read_beside
from d2v2ds.errors import CheckpointError, MachineError, ShardError
from d2v2ds.interop import export_folder
from d2v2ds.interop.card import card
from d2v2ds.interop.export_folder import OBJECTIVE_PREFIX, Kind, ModelFolder, load_trunk
from d2v2ds.interop.export_write import new_folder, write_file, write_tensors
from d2v2ds.io.crc import crc32
from tests.interop.folders import drawn, tiny_config, write_folder
from tests.io.test_output import another_writer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("piece_bytes", [1 << 30, 20_000])
def test_tensors_come_back_as_they_were_written(tmp_path: Path, piece_bytes: int) -> None:
    parts = write_folder(tmp_path / "model", tiny_config(), piece_bytes=piece_bytes)
    folder, trunk = ModelFolder(tmp_path / "model"), parts["model"]
    assert parts.keys() == {"model", "objective"}
    for part, tensors in parts.items():
        assert same(dict(folder.tensors(part)), tensors)
        assert folder.layout(part) == {name: Kind.of(tensor) for name, tensor in tensors.items()}
    assert folder.description.model == tiny_config()
    assert folder.description.objective is not None
    assert folder.description.objective["modalities"].keys() == tiny_config().modalities.keys()
    assert not folder.has("teacher")
    files = sorted((tmp_path / "model").glob("model*.safetensors"))
    assert (len(files) > 3) == (piece_bytes < 1 << 30)
    assert same({name: tensor for file in files for name, tensor in load_file(file).items()}, trunk), "the library's"
    assert all(file.stat().st_size < piece_bytes + 40_000 for file in files)


def test_types_are_kept_and_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3).half(), "b": torch.randn(5, 2), "c": torch.randn(1).bfloat16(), "d": torch.ones(())}
    layout = {name: Kind.of(tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path, "model", layout, reversed(tensors.items()))
    assert same(load_file(tmp_path / "model.safetensors"), tensors)


def test_tensors_that_are_not_those_of_the_layout_are_refused(tmp_path: Path) -> None:
    layout = {"a": Kind((2,), torch.float32)}
    for tensors, said in ([], "did not come: a"), ([("b", torch.ones(2))], "did not expect b"), (
        [("a", torch.ones(2).half())], "did not expect a"
    ), ([("a", torch.ones(2)), ("a", torch.ones(2))], "did not expect a"):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            write_tensors(tmp_path, "model", layout, tensors)


def test_a_failed_export_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model"
    trunk = write_folder(path, tiny_config("audio"))["model"]
    with pytest.raises(OSError, match="full"), new_folder(path) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")
    assert same(dict(ModelFolder(path).tensors("model")), trunk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", tiny_config("audio"))
    write_folder(tmp_path / "model", tiny_config("text"))
    assert list(ModelFolder(tmp_path / "model").description.model.modalities) == ["text"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="expected no file, or the folder of an earlier export"):
        write_folder(tmp_path / "mine", tiny_config("text"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_a_folder_of_another_program_with_a_config_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "my application"}')
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="expected no file, or the folder of an earlier export"):
        write_folder(tmp_path, tiny_config("text"))
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_users_own_backup_beside_an_export_is_left_alone(tmp_path: Path) -> None:
    for name in ("model.old", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    write_folder(tmp_path / "model", tiny_config("text"))
    write_folder(tmp_path / "model", tiny_config("text"))
    assert sorted(entry.name for entry in tmp_path.rglob("mine")) == ["mine", "mine"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_an_export_is_replaced_the_earlier_one_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """The process ends at a rename; then another export fails before it is whole."""
    path = tmp_path / "model"
    trunk = write_folder(path, tiny_config("audio"))["model"]
    process = os.fork()
    if process == 0:
        done = []
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda *names: os._exit(9) if len(done) == renames else done.append(rename(*names))
        )
        with new_folder(path) as folder:
            (folder / "model.safetensors").write_bytes(b"new")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert path.exists() == (renames == 0)
    with pytest.raises(OSError, match="full"), new_folder(path):
        raise OSError("disk full")
    assert same(dict(ModelFolder(path).tensors("model")), trunk)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_puts_the_earlier_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    trunk = write_folder(path, tiny_config("audio"))["model"]
    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise OSError("stale file handle")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="stale"):
        write_folder(path, tiny_config("text"))
    assert same(dict(ModelFolder(path).tensors("model")), trunk)


def test_links_and_relative_names_mean_the_folder_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        write_folder(tmp_path / "link", tiny_config("text"))
    assert (tmp_path / "link").is_symlink()
    assert ModelFolder(tmp_path / "real").has("model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(CheckpointError, match="is the current folder"):
        write_folder(Path(), tiny_config("text"))
    assert ModelFolder(tmp_path / "real").has("model")


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, tiny_config("text"), piece_bytes=4000)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shutil.copy(path / weight_map["blocks.0.norm1.weight"], tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), 7):
        index.write_text(json.dumps({"weight_map": weight_map | {"blocks.0.norm1.weight": name}}))
        with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
            load_trunk(ModelFolder(path))
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="expected a weight_map"):
        load_trunk(ModelFolder(path))
    config = json.loads((path / "config.json").read_text())
    config["preprocessing"]["text"]["file"] = "../../tokenizer.model"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected the name of a file beside it"):
        ModelFolder(path)
    (path / "config.json").write_text(json.dumps(config | {"preprocessing": {}}))
    with pytest.raises(CheckpointError, match="expected the preprocessing of text"):
        ModelFolder(path)


def test_the_trunk_is_the_students_without_decoders(tmp_path: Path) -> None:
    parts = write_folder(tmp_path / "model", tiny_config())
    assert all(name.startswith("decoders.") for name in parts["objective"])
    trunk = load_trunk(ModelFolder(tmp_path / "model"))
    assert same(trunk.state_dict(), parts["model"])
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_the_teachers_trunk_borrows_what_the_teacher_lacks(tmp_path: Path) -> None:
    config = tiny_config("audio")
    student = write_folder(tmp_path / "model", config, teacher=True)["model"]
    found = load_trunk(ModelFolder(tmp_path / "model"), "teacher").state_dict()
    other = drawn(config, seed=4)["model"]
    local = [name for name in found if ".local." in name]
    assert local
    assert all(torch.equal(found[name], (student if name in local else other)[name]) for name in found)
    write_folder(tmp_path / "alone", config)
    with pytest.raises(CheckpointError, match="has no teacher; export with --teacher"):
        load_trunk(ModelFolder(tmp_path / "alone"), "teacher")


def test_half_precision_weights_are_loaded_in_fp32(tmp_path: Path) -> None:
    path = tmp_path / "model"
    trunk = write_folder(path, tiny_config("audio"))["model"]
    half = {name: tensor.half() for name, tensor in trunk.items()}
    save_file(half, path / "model.safetensors")
    found = load_trunk(ModelFolder(path)).state_dict()
    assert all(torch.equal(found[name], half[name].float()) for name in found)


def test_a_single_file_has_trunk_and_objective_apart(tmp_path: Path) -> None:
    parts = write_folder(tmp_path / "model", tiny_config("audio"))
    together = parts["model"] | {OBJECTIVE_PREFIX + name: tensor for name, tensor in parts["objective"].items()}
    file = tmp_path / "model.safetensors"
    description = ModelFolder(tmp_path / "model").description
    write_file(file, description, {n: Kind.of(t) for n, t in together.items()}, together.items())
    folder = ModelFolder(file)
    for part in ("model", "objective"):
        assert same(dict(folder.tensors(part)), parts[part])
        assert all(torch.equal(folder.tensor(part, name), tensor) for name, tensor in parts[part].items())
    assert (folder.has("objective"), folder.has("teacher")) == (True, False)
    assert same(load_trunk(folder).state_dict(), parts["model"])


@pytest.mark.parametrize("metadata", [{"format": "d2v2ds-model-2", "model": "{}"}, {"format": "pt"}, None])
def test_a_file_without_our_description_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "old.safetensors"
    save_file(write_folder(tmp_path / "model", tiny_config("audio"))["model"], file, metadata=metadata)
    with pytest.raises(CheckpointError, match="expected a file of d2v2ds.export, .* export it again with"):
        ModelFolder(file)


def test_a_single_file_replaces_only_what_is_ours_and_is_whole_or_not_there(tmp_path: Path) -> None:
    trunk = write_folder(tmp_path / "model", tiny_config("audio"))["model"]
    description, layout = ModelFolder(tmp_path / "model").description, {n: Kind.of(t) for n, t in trunk.items()}
    file = tmp_path / "of" / "model.safetensors"
    write_file(file, description, layout, trunk.items())
    assert same(load_file(file), trunk), "the library's"
    assert ModelFolder(file).description == description
    with pytest.raises(ValueError, match="did not come"):
        write_file(file, description, layout, [])
    assert same(dict(ModelFolder(file).tensors("model")), trunk)
    assert [entry.name for entry in file.parent.iterdir()] == ["model.safetensors"]
    save_file(trunk, file, metadata={"d2v2ds": json.dumps(description.to_dict() | {"schema_version": 4})})
    with pytest.raises(CheckpointError, match="expected schema version 1, found 4; export the run again"):
        ModelFolder(file)
    for other in (b"notes", b""):
        file.write_bytes(other)
        with pytest.raises(CheckpointError, match="expected no file, or the file of an earlier export"):
            write_file(file, description, layout, trunk.items())
        assert file.read_bytes() == other
    with pytest.raises(CheckpointError, match="expected no file, or the file of an earlier export"):
        write_file(tmp_path / "model", description, layout, trunk.items())


def _change(config: dict[str, object], key: str, value: object) -> str:
    return json.dumps(config | {key: value})


def test_what_is_wrong_is_said_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    trunk = write_folder(path, tiny_config("audio"))["model"]
    config = json.loads((path / "config.json").read_text())
    for text, said in (
        (_change(config, "schema_version", 4), "expected schema version 1, found 4; export the run again"),
        (_change(config, "format", "bert"), "expected format d2v2ds-model, found 'bert'"),
        (_change(config, "model", {"block": 1}), "config.json: model: expected the settings of a trunk"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ("{", "config.json: expected JSON"),
    ):
        (path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            ModelFolder(path)
    (path / "config.json").write_text(json.dumps(config))
    name = "blocks.0.norm1.weight"
    save_file(trunk | {name: torch.ones(3), "extra": torch.ones(1)}, path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_trunk(ModelFolder(path))
    assert f"{name}: expected (16,), found (3,)" in str(caught.value)
    assert "extra: not a tensor of this network" in str(caught.value)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="model.safetensors: expected a whole safetensors file"):
        load_trunk(ModelFolder(path))
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing, expected"):
        load_trunk(ModelFolder(path))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="the folder of a run; python -m d2v2ds.export"):
        ModelFolder(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        ModelFolder(tmp_path / "nowhere")


def test_reading_does_not_draw_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", tiny_config("audio"))
    before = torch.get_rng_state()
    load_trunk(ModelFolder(tmp_path / "model"))
    assert torch.equal(before, torch.get_rng_state())


def changed(values: Any, place: str, value: Any) -> Any:
    """Plain values with another value at `a.b.c`."""
    key, _, rest = place.partition(".")
    return values | {key: changed(values.get(key, {}), rest, value) if rest else value}


STRANGE: dict[str, tuple[Any, str]] = {
    "model.shared_depth": (10**9, "shared_depth: Input should be less than or equal to 1000"),
    "model.modalities.audio.prenet_depth": (5000, "prenet_depth: Input should be less than or equal to 1000"),
    "model.modalities.audio.position_depth": (5_000_000, "at most 1000 position convolutions"),
    "model.modalities.audio.position_total_kernel": (10**40, "expected numbers up to 10,000,000"),
    "model.modalities.audio.position_groups": (3, "position_groups 3 does not divide"),
    "model.modalities.audio.conv_layers": ([[10**7, 10**7, 1]] * 2, "describe no network"),
    "model.modalities.image.image_size": (10**9, "expected numbers up to 10,000,000"),
    "model.modalities.image.patch_width": (0, "greater than or equal to 1"),
    "model.modalities.text.vocab_size": (10**9, "expected numbers up to 10,000,000"),
    "model.modalities.text": ([], "modalities.text: expected the fields of TextNetwork"),
    "model.modalities.smell": ({}, "modality 'smell' is not known here"),
    "model.modalities": ([1], "expected the settings of a trunk"),
    "model.block.width": (1 << 20, "less than or equal to 65536"),
    "model.block.num_heads": (5, "not divisible by num_heads 5"),
    "model.block.mlp_ratio": (1e300, "less than or equal to 1000"),
    "model.block.norm_eps": ("1e-5", "norm_eps: Input should be a valid number"),
    "model.block.depth": (4, "unknown keys block.depth"),
    "model.block": (None, "block: Input should be an object"),
    "model.layer_dorp": (0.1, "unknown keys layer_dorp"),
    "model.junk": ("x" * 200_000, "at most 100,000 characters"),
    "model": ("x", "model: Input should be"),
    "preprocessing": ([], "preprocessing: Input should be"),
    "preprocessing.audio": ({}, "preprocessing.audio: expected sample_rate_hz, variance_eps, found none"),
    "preprocessing.audio.sample_rate_hz": (10**12, "expected a number such as 16000, found 1000000000000"),
    "preprocessing.audio.variance_eps": ("small", "expected a number such as 1e-05, found 'small'"),
    "preprocessing.image.shorter_side": (10**6, "expected a number such as"),
    "preprocessing.image.side": (True, "expected a number such as"),
    "preprocessing.image.mean": ([0.5, "x"], "expected a number such as"),
    "preprocessing.text.file": (7, "expected text, found 7"),
    "origin": ("x", "origin: Input should be"),
    "objective": (3, "objective: Input should be"),
}
"""Place in a description -> value, and what is said about it."""


@pytest.mark.parametrize("place", STRANGE)
def test_a_description_of_what_no_model_has_is_refused_by_name(place: str, tmp_path: Path) -> None:
    path, file = tmp_path / "model", tmp_path / "model.safetensors"
    parts = write_folder(path, tiny_config())
    value, said = STRANGE[place]
    config = json.loads((path / "config.json").read_text())
    text = json.dumps(changed(config, place, value))
    (path / "config.json").write_text(text)
    save_file(parts["model"], file, metadata={"d2v2ds": text})
    for one in (path, file):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_trunk(ModelFolder(one))
        assert str(one) in str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xff{}", "expected UTF-8, found byte 0xff at 0"),
        (b"[" * 100_000, "expected JSON, found values nested too deeply"),
        (b'{"format": NaN}', "expected JSON, found"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "expected JSON"),
        (b"", "expected JSON"),
    ],
)
def test_a_description_that_is_no_json_is_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, tiny_config("audio"))
    (path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: {said}"):
        ModelFolder(path)
    (path / "config.json").write_bytes(content)
    head = json.dumps({"__metadata__": {"d2v2ds": content.decode("latin-1")}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        ModelFolder(tmp_path / "x.safetensors")


def test_files_of_a_model_that_are_no_files_are_refused_at_once(tmp_path: Path) -> None:
    config = tiny_config("text")
    for name in ("config.json", "model.safetensors", "tokenizer.model", "model.safetensors.index.json"):
        path = tmp_path / name.replace(".", "_")
        write_folder(path, config, tokenizer=("sentencepiece", "tokenizer.model", b"x"))
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match=f"{name}: expected a file, found a FIFO"):
            load_trunk(ModelFolder(path))
    with pytest.raises(CheckpointError, match="expected a file, found a FIFO"):
        ModelFolder(tmp_path / "config_json" / "config.json")
    with pytest.raises(CheckpointError, match="expected a file, found a device"):
        ModelFolder(Path("/dev/zero"))


@pytest.mark.parametrize("length", [0, 9, 1 << 20, 1 << 62])
def test_a_header_beyond_its_file_is_refused(length: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        ModelFolder(file)


def test_a_folder_whose_files_are_links_of_its_owner_is_read(tmp_path: Path) -> None:
    parts = write_folder(tmp_path / "blobs", tiny_config("audio"))
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert same(load_trunk(ModelFolder(tmp_path / "snapshot")).state_dict(), parts["model"])


def test_files_that_no_export_wrote_keep_an_export_from_being_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, tiny_config("audio"))
    (path / "notes.txt").write_text("mine")
    (path / ".git").mkdir()
    with pytest.raises(CheckpointError, match=r"found \.git, notes\.txt, which no export wrote"):
        write_folder(path, tiny_config("text"))
    assert list(ModelFolder(path).description.model.modalities) == ["audio"]
    assert (path / "notes.txt").read_text() == "mine"
    (path / ".git").rmdir()
    (path / "notes.txt").unlink()
    (path / "config.json").write_text(_change(json.loads((path / "config.json").read_text()), "files", None))
    write_folder(path, tiny_config("text"))  # an export of before there was a list
    (path / "model.onnx").write_text("mine")
    with pytest.raises(CheckpointError, match=r"found model\.onnx, which no export wrote"):
        write_folder(path, tiny_config("text"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_links_and_files_of_others_beside_an_export_lose_nothing(kind: str, tmp_path: Path) -> None:
    path, mine = tmp_path / "model", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    (tmp_path / f".model.{kind}").symlink_to(mine)
    for _ in range(2):
        write_folder(path, tiny_config("text"))
    assert (mine / "thesis.tex").read_text() == "x"
    shutil.copytree(mine, tmp_path / f".model.{kind}")
    with pytest.raises(CheckpointError, match=f".model.{kind}: expected nothing, or .* files of somebody else"):
        write_folder(path, tiny_config("audio"))
    assert (tmp_path / f".model.{kind}" / "thesis.tex").read_text() == "x"
    assert list(ModelFolder(path).description.model.modalities) == ["text"]


def test_links_inside_of_an_export_are_removed_and_not_followed(tmp_path: Path) -> None:
    path, disk = tmp_path / "model", tmp_path / "disk.safetensors"
    write_folder(path, tiny_config("text"))
    (path / "model.safetensors").rename(disk)
    (path / "model.safetensors").symlink_to(disk)
    write_folder(path, tiny_config("audio"))
    assert not (path / "model.safetensors").is_symlink()
    assert disk.is_file()


def test_a_link_beside_a_single_file_is_not_written_through(tmp_path: Path) -> None:
    trunk = write_folder(tmp_path / "model", tiny_config("audio"))["model"]
    description, layout = ModelFolder(tmp_path / "model").description, {n: Kind.of(t) for n, t in trunk.items()}
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.safetensors.partial").symlink_to("mine")
    for _ in range(2):
        write_file(tmp_path / "x.safetensors", description, layout, trunk.items())
    assert (tmp_path / "mine").read_text() == "mine"
    assert same(load_file(tmp_path / "x.safetensors"), trunk)


def test_two_exports_to_one_name_do_not_mix(tmp_path: Path) -> None:
    trunk = write_folder(tmp_path / "model", tiny_config("audio"))["model"]
    description, layout = ModelFolder(tmp_path / "model").description, {n: Kind.of(t) for n, t in trunk.items()}
    for name in ("model", "x.safetensors"):
        said = f"{name}: another process is at work on it"
        with another_writer(tmp_path / name), pytest.raises(CheckpointError, match=said):
            if name == "model":
                write_folder(tmp_path / name, tiny_config("text"))
            else:
                write_file(tmp_path / name, description, layout, trunk.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert same(load_trunk(ModelFolder(tmp_path / "model")).state_dict(), trunk)


def test_a_file_is_copied_from_its_own_folder_alone(tmp_path: Path) -> None:
    packed, key = tmp_path / "packed", tmp_path / "id_rsa"
    packed.mkdir()
    key.write_text("secret")
    (packed / "real.json").write_text("{}")
    (packed / "inner.json").symlink_to("real.json")
    (packed / "tokenizer.json").symlink_to(key)
    os.mkfifo(packed / "fifo.json")
    (tmp_path / "moved").symlink_to(packed)
    assert read_beside(tmp_path / "moved", FileEntry(file="inner.json", bytes=2, crc32=f"{crc32(b'{}'):08x}")) == b"{}"
    for name, said in {
        "tokenizer.json": "a link out of it",
        "../id_rsa": "a link out of it",
        str(key): "a link out of it",
        "fifo.json": "found a FIFO",
        "none.json": "No such file",
        "real.json": "its checksum differs",
    }.items():
        with pytest.raises(ShardError, match=said):
            read_beside(packed, FileEntry(file=name, bytes=6, crc32="00000000"))


@pytest.mark.parametrize("modalities", [("text",), ("audio",), ("audio", "image", "text")])
def test_a_card_says_whom_to_trust_beside_code_that_runs_code(modalities: tuple[str, ...], tmp_path: Path) -> None:
    write_folder(tmp_path / "model", tiny_config(*modalities))
    text = card(ModelFolder(tmp_path / "model").description, "model", 7, has_curves=False)
    assert 'AutoModel.from_pretrained("model", trust_remote_code=True)' in text
    assert "runs the Python files of this folder with all your rights" in text
    assert ('AutoImageProcessor.from_pretrained("model"' in text) == ("image" in modalities)
    assert ("`AutoProcessor` gives one alone" in text) == (len(modalities) > 1)


def test_a_description_with_any_byte_changed_is_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, tiny_config("audio"))
    whole, refused = (path / "config.json").read_bytes(), 0
    rng = np.random.default_rng(0)
    for place in range(0, len(whole), 11):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        (path / "config.json").write_bytes(changed)
        try:
            ModelFolder(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_weights_with_any_byte_of_their_header_changed_are_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_folder(path, tiny_config("audio"))
    file, refused = path / "model.safetensors", 0
    whole = file.read_bytes()
    folder, rng = ModelFolder(path), np.random.default_rng(0)
    for place in range(0, 8 + int.from_bytes(whole[:8], "little"), 37):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        file.write_bytes(changed)
        try:
            load_trunk(folder)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 80


def test_a_flipped_bit_of_a_weight_is_named(tmp_path: Path) -> None:
    """safetensors has no checksums of its own: a model that lost a bit on its way would be another one."""
    write_folder(tmp_path / "model", tiny_config())
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is damaged, its checksum differs"):
        load_trunk(ModelFolder(tmp_path / "model"))
    save_file(load_file(file), file)  # another program writes no checksums, and its file is read
    load_trunk(ModelFolder(tmp_path / "model"))


def test_a_machine_that_cannot_read_an_export_does_not_call_it_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    write_folder(tmp_path / "model", tiny_config())
    folder = ModelFolder(tmp_path / "model")
    monkeypatch.setattr(export_folder, "safe_open", fail)
    with pytest.raises(MachineError, match="Too many open files; .*ulimit -n"):
        dict(folder.tensors("model"))
