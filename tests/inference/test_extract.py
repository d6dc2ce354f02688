"""Features of a folder: those of each row alone, in the order of the folder, whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v2ds.api import FeatureExtractor
from d2v2ds.extract import main
from d2v2ds.inference import extraction
from d2v2ds.inference.extraction import Extraction, part_bounds
from d2v2ds.inference.extraction_options import Options
from d2v2ds.io import output
from d2v2ds.modalities.known import known_modalities, open_reader
from d2v2ds.model.trunk import TrunkConfig
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.interop.folders import tiny_config, write_folder
from tests.io.test_output import another_writer
from tests.preprocessing.pictures import class_folders
from tests.preprocessing.texts import write_stories
from tests.runs.launching import ROOT, environment, pack_clips

MANY_PARTS = ["--part-tokens", "400", "--batch-tokens", "400"]


def changed(config: TrunkConfig, modality: str, **settings: object) -> TrunkConfig:
    """Other settings of one modality."""
    own = replace(config.modalities[modality], **settings)
    return replace(config, modalities={**config.modalities, modality: own})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    layers = ((16, 10, 5), (16, 8, 8), (16, 4, 4), (16, 2, 2))
    write_folder(folder, changed(tiny_config("audio", "image"), "audio", conv_layers=layers), teacher=True)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_clips(tmp_path_factory.mktemp("speech"), "--label-column", "label")


def read(path: Path) -> pa.Table:
    return pa.ipc.open_file(str(path)).read_all()


def matrix(table: pa.Table, layer: int) -> np.ndarray:
    """As the module's docstring says."""
    return table[f"layer_{layer}"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def arguments(model: Path, shards: Path, out: Path, *extra: str) -> list[str]:
    return ["--model", str(model), "--shards", str(shards), "--out", str(out), "--workers", "1", *extra]


@pytest.fixture(scope="module")
def whole(model: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that every other way must give."""
    out = tmp_path_factory.mktemp("whole") / "features.arrow"
    assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 0
    return out.read_bytes()


def test_rows_are_the_features_of_each_recording_alone(model: Path, shards: Path, whole: bytes) -> None:
    table = pa.ipc.open_file(whole).read_all()
    assert table.column_names == ["row", "id", "label", "speaker", "text", "tokens", "layer_1", "layer_3"]
    assert table["row"].to_pylist() == list(range(40))
    assert table["label"].to_pylist()[:5] == ["0", "1", "2", "3", "0"]
    assert json.loads(table.schema.metadata[b"d2v2ds"])["pool"] == "mean"
    extractor = FeatureExtractor(model)
    network = extractor.folder.description.model.modalities["audio"]
    data = known_modalities()["audio"].whole_inputs(shards, {"sample_rate_hz": 16000})
    reader = open_reader("audio", data, network, None)
    for row in (0, 7, 39):
        source = reader.read_whole(row)
        with torch.no_grad():
            expected = extractor.model.layers("audio", source[None])
        assert table["tokens"][row].as_py() == expected[0].shape[1] == network.num_tokens(len(source))
        for layer in (1, 3):
            np.testing.assert_allclose(matrix(table, layer)[row], expected[layer][0].mean(0), atol=1e-5)


def test_without_pooling_there_is_a_vector_for_every_token(
    model: Path, shards: Path, tmp_path: Path, whole: bytes
) -> None:
    out = tmp_path / "tokens.arrow"
    assert main(arguments(model, shards, out, "--layers", "3", "--pool", "none", *MANY_PARTS)) == 0
    table, pooled = read(out), pa.ipc.open_file(whole).read_all()
    lists = table["layer_3"].combine_chunks()
    for row in (0, 39):
        tokens = np.array(lists[row].as_py(), dtype=np.float32)
        assert tokens.shape == (table["tokens"][row].as_py(), 16)
        np.testing.assert_allclose(tokens.mean(0), matrix(pooled, 3)[row], atol=1e-5)


@pytest.mark.run
def test_several_processes_write_the_same_rows(model: Path, shards: Path, tmp_path: Path, whole: bytes) -> None:
    out = tmp_path / "features.arrow"
    assert main([*arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS), "--workers", "2"]) == 0
    found, expected = read(out), pa.ipc.open_file(whole).read_all()
    assert found.drop_columns(["layer_1", "layer_3"]) == expected.drop_columns(["layer_1", "layer_3"])
    for layer in (1, 3):  # other numbers of threads sum in another order
        np.testing.assert_allclose(matrix(found, layer), matrix(expected, layer), atol=1e-5)


@pytest.mark.run
def test_killed_and_started_again_it_keeps_what_was_done(
    model: Path, shards: Path, tmp_path: Path, whole: bytes
) -> None:
    out = tmp_path / "features.arrow"
    command = [sys.executable, "-m", "d2v2ds.extract", *arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    parts, deadline = tmp_path / "features.arrow.parts", time.monotonic() + 120
    while len(list(parts.glob("*.arrow"))) < 2:
        assert process.poll() is None, "it must be killed before its end"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.arrow")}
    shutil.copytree(parts, tmp_path / "copy.arrow.parts")
    assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 0
    assert out.read_bytes() == whole
    assert not parts.exists()
    assert len(kept) >= 2

    parts = tmp_path / "copy.arrow.parts"
    assert main(arguments(model, shards, tmp_path / "copy.arrow", "--layers", "2", *MANY_PARTS)) == 2
    assert len(list(parts.glob("*.arrow"))) == len(kept), "parts of another extraction are left alone"


def test_finished_parts_are_not_computed_again(
    model: Path, shards: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features.arrow"
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "join_files", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 2
    assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(Extraction, "write_part", lambda *args: pytest.fail("computed again"))
        assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 0
    assert out.read_bytes() == whole


def test_a_kill_while_finished_parts_are_removed_mixes_nothing(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan may be removed first: parts without one are of some extraction, not of this one."""
    out, parts = tmp_path / "features.arrow", tmp_path / "features.arrow.parts"
    monkeypatch.setattr(extraction, "_remove_parts", lambda folder, _: (folder / "plan.json").unlink())
    assert main(arguments(model, shards, out, "--weights", "teacher", *MANY_PARTS)) == 0
    assert list(parts.glob("*.arrow"))
    assert main(arguments(model, shards, out, *MANY_PARTS)) == 0
    assert main(arguments(model, shards, tmp_path / "alone.arrow", *MANY_PARTS)) == 0
    assert read(out) == read(tmp_path / "alone.arrow")


def test_models_that_differ_in_matrices_alone_do_not_share_parts(model: Path, shards: Path, tmp_path: Path) -> None:
    """As two networks do that were drawn and not trained."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    next(x for name, x in weights.items() if name.startswith("blocks.") and x.dim() == 2)[0, 0] += 1
    save_file(weights, other / "model.safetensors")
    plans = [
        Extraction(
            Options(
                model=str(folder),
                shards=str(shards),
                layers=None,
                pool="mean",
                weights="student",
                dtype="float32",
                batch_tokens=400,
                part_tokens=400,
            )
        ).fingerprint()
        for folder in (model, other)
    ]
    assert plans[0].pop("model") != plans[1].pop("model")
    assert plans[0] == plans[1]


@pytest.mark.run
def test_an_error_of_a_process_ends_the_extraction_without_the_other_parts(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, parts = tmp_path / "features.arrow", tmp_path / "features.arrow.parts"
    many = ["--part-tokens", "1"]
    for number in (0, 1):
        (parts / f".part-{number:06d}.arrow.partial").mkdir(parents=True)  # cannot be opened for writing
    options = Options(
        model=str(model), shards=str(shards), layers=None, pool="mean", weights="student", dtype="float32",
        batch_tokens=None, part_tokens=1,
    )  # fmt: skip
    fingerprint = Extraction(options).fingerprint()
    (parts / "plan.json").write_text(json.dumps(fingerprint, sort_keys=True))
    assert main([*arguments(model, shards, out, *many), "--workers", "2"]) == 2
    assert "part-00000" in caplog.text
    assert "cannot be written" in caplog.text
    total = len(fingerprint["bounds"]) - 1
    assert len(list(parts.glob("*.arrow"))) < total - 4, "parts that nobody waits for"


def test_what_could_not_be_written_does_not_fill_the_disk(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features.arrow"
    sync = output.sync
    monkeypatch.setattr(
        output, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "full")) if "part-" in path.name else sync(path)
    )
    assert main(arguments(model, shards, out, *MANY_PARTS)) == 2
    assert [path.name for path in (tmp_path / "features.arrow.parts").iterdir()] == ["plan.json"]


def interrupted(model: Path, shards: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parts of an extraction that ended before they were joined."""
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "join_files", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 2
    return out.with_name(out.name + ".parts")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("plan.json", lambda path: path.write_text('{"layers": [1'), "plan.json: expected JSON"),
        ("plan.json", lambda path: path.write_bytes(b"\xff"), "plan.json: expected UTF-8"),
        ("plan.json", lambda path: path.write_text("[]"), "plan.json: expected a JSON object"),
        ("plan.json", os.mkfifo, "plan.json: expected a file, found a FIFO"),
        ("part-000001.arrow", lambda path: path.write_bytes(b"x" * 100), "part-000001.arrow: damaged"),
        ("part-000001.arrow", lambda path: path.write_bytes(b""), "part-000001.arrow: damaged"),
        ("part-000001.arrow", os.mkfifo, "part-000001.arrow: expected a file, found a FIFO"),
        (
            "part-000001.arrow",
            lambda path: shutil.copy(path.with_name("part-000002.arrow"), path),
            "damaged: expected the rows",
        ),
    ],
)
def test_damaged_leftovers_are_named(
    name: str, damage: Callable[[Path], object], said: str, model: Path, shards: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    parts = interrupted(model, shards, tmp_path / "features.arrow", monkeypatch)
    (parts / name).unlink()
    damage(parts / name)
    caplog.clear()
    assert main(arguments(model, shards, tmp_path / "features.arrow", "--layers", "1,-1", *MANY_PARTS)) == 2
    assert said in caplog.text
    assert not (tmp_path / "features.arrow").exists()


def test_parts_and_output_may_be_links_of_their_owner(
    model: Path, shards: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, disk = tmp_path / "features.arrow", tmp_path / "disk"
    parts = interrupted(model, shards, out, monkeypatch)
    shutil.move(parts, disk)
    parts.symlink_to(disk)
    (disk / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere.arrow").write_bytes(b"earlier")
    out.symlink_to(tmp_path / "elsewhere.arrow")
    (tmp_path / ".elsewhere.arrow.partial").symlink_to(disk / "notes.txt")
    assert main(arguments(model, shards, out, "--layers", "1,-1", *MANY_PARTS)) == 0
    assert out.is_symlink()
    assert (tmp_path / "elsewhere.arrow").read_bytes() == whole
    assert [path.name for path in disk.iterdir()] == ["notes.txt"]
    assert (disk / "notes.txt").read_text() == "mine"


def test_a_folder_of_somebody_else_is_no_folder_of_parts(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tmp_path / "features.arrow.parts"
    parts.mkdir()
    (parts / "part-list.txt").write_text("mine")
    assert main(arguments(model, shards, tmp_path / "features.arrow", *MANY_PARTS)) == 2
    assert "expected parts of an extraction, found part-list.txt" in caplog.text
    assert (parts / "part-list.txt").read_text() == "mine"


def test_two_extractions_on_one_output_do_not_mix(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "features.arrow"
    with another_writer(out):
        assert main(arguments(model, shards, out, *MANY_PARTS)) == 2
    assert "features.arrow: another process is at work on it (process" in caplog.text
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_no_traceback(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Extraction, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments(model, shards, tmp_path / "features.arrow")) == 130
    assert "the same command goes on" in caplog.text


def test_a_layer_named_twice_is_one_column(model: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.arrow"
    assert main(arguments(model, shards, out, "--layers=3,-1")) == 0
    assert [name for name in read(out).column_names if name.startswith("layer_")] == ["layer_3"]


def test_images_and_texts(model: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", count=12)
    assert (
        pack_images(["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "images"), "--workers", "1"]) == 0
    )
    assert main(arguments(model, tmp_path / "images", tmp_path / "images.arrow", "--layers", "3")) == 0
    table = read(tmp_path / "images.arrow")
    assert table["tokens"].to_pylist() == [16] * 12
    assert set(table["label"].to_pylist()) == {"ape", "bee", "cow"}
    packed = ["--input", str(write_stories(tmp_path / "books")), "--output", str(tmp_path / "text"), "--workers", "1"]
    assert pack_text([*packed, "--train-tokenizer", "--vocab-size", "420", "--block-tokens", "24"]) == 0
    assert main(arguments(model, tmp_path / "text", tmp_path / "text.arrow")) == 2, "a model of other modalities"
    write_folder(tmp_path / "writer", changed(tiny_config("text"), "text", vocab_size=420))
    assert main(arguments(tmp_path / "writer", tmp_path / "text", tmp_path / "text.arrow", "--layers", "0,3")) == 0
    assert max(read(tmp_path / "text.arrow")["tokens"].to_pylist()) == 24


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = ["--input", str(write_stories(tmp_path / "books")), "--output", str(tmp_path / "text"), "--workers", "1"]
    assert pack_text([*packed, "--train-tokenizer", "--vocab-size", "420", "--block-tokens", "24"]) == 0
    config = changed(tiny_config("text"), "text", vocab_size=420)
    own = (tmp_path / "text" / "tokenizer.model").read_bytes()
    for data, code in ((own, 0), (own + b"\x00", 2)):
        write_folder(tmp_path / "model", config, tokenizer=("sentencepiece", "tokenizer.model", data))
        assert main(arguments(tmp_path / "model", tmp_path / "text", tmp_path / "out.arrow", "--layers", "1")) == code
    assert "was packed with another tokenizer" in caplog.text


def test_parts_of_unpooled_features_fit_into_memory(model: Path, shards: Path) -> None:
    common = {
        "model": str(model),
        "shards": str(shards),
        "weights": "student",
        "dtype": "float32",
        "batch_tokens": None,
    }
    sizes = {}
    for pool in ("mean", "none"):
        options = Options(**common, layers=(1, 3), pool=pool, part_tokens=None)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(extraction, "PART_BYTES", 4 * 16 * 2 * 500)
            sizes[pool] = len(Extraction(options).bounds) - 1
    assert sizes["mean"] == 1
    assert sizes["none"] > 5


def test_what_is_wrong_is_said(
    model: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    out = tmp_path / "features.arrow"
    assert main(arguments(model, shards, out, "--layers", "9")) == 2
    assert "--layers: layers [9]: audio has layers 0 (input of the first block) to 3" in caplog.text
    assert main(arguments(model, tmp_path / "nothing", out)) == 2
    assert "expected a finished shard folder" in caplog.text
    assert main(arguments(tmp_path / "nothing", shards, out)) == 2
    assert "no such file or folder" in caplog.text
    for folder in (tmp_path, Path()):
        assert main(arguments(model, shards, folder)) == 2
        assert f"--out {folder}: expected the name of a file to write" in caplog.text
    for wrong in (["--layers", "six"], ["--part-tokens", "0"], ["--batch-tokens", "-1"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            main(arguments(model, shards, out, *wrong))
    assert not out.exists()


@pytest.mark.parametrize(
    ("tokens", "size", "bounds"),
    [([5, 5, 5, 5], 10, [0, 2, 4]), ([30, 1, 1], 10, [0, 1, 3]), ([1], 10, [0, 1]), ([], 10, [0, 0])],
)
def test_parts_have_about_the_same_tokens(tokens: list[int], size: int, bounds: list[int]) -> None:
    assert part_bounds(np.array(tokens, dtype=np.int64), size) == bounds
