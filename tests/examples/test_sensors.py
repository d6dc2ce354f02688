"""`examples/sensors`: a modality in a package of its own, as its parts and, installed with pip, as a whole run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.order import MicroBatch
from d2v2ds.distributed.comm import free_port
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.inference import InputOptions
from d2v2ds.model.block import BlockConfig
from sensors.inference import SensorsInference
from sensors.modality import SENSORS
from sensors.network import SensorNetwork
from sensors.pack import main as pack
from sensors.reader import SensorDataConfig, SensorReader
from sensors.shards import SensorShards
from tests.runs.launching import deterministic, environment, weights

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sensors"
CONFIG = EXAMPLE / "sensors_tiny.yaml"
RATE = 50.0
CHANNELS = ["x", "y", "z"]
STEPS = 6
SMALL = [
    "model.block.width=32",
    "model.block.mlp_dropout=0.1",  # dropout draws must survive a resume too
    "model.shared_depth=3",
    "model.layer_drop=0.2",
    f"model.modalities.sensors.num_channels={len(CHANNELS)}",
    f"model.modalities.sensors.sample_rate_hz={RATE}",
    "model.modalities.sensors.conv_layers=[[16,4,2],[16,4,2]]",
    "model.modalities.sensors.prenet_depth=1",
    "objective.modalities.sensors.decoder.width=16",
    "objective.modalities.sensors.target.num_layers=2",
    "objective.ema.anneal_steps=6",
    "data.sensors.global_batch_seconds=24",
    "data.sensors.micro_batch_seconds=8",  # three micro-batches on two ranks: one of them gets a filler
    "data.sensors.max_seconds=4",
    "lr.warmup_steps=2",
    f"run.total_steps={STEPS}",
    "run.save_every_steps=2",
    "run.log_every_steps=1",
    "run.health_every_steps=3",
]
NETWORK = SensorNetwork(num_channels=3, sample_rate_hz=RATE, conv_layers=((16, 4, 2), (16, 4, 2)))
BLOCK = BlockConfig(width=32, num_heads=4)
MASK = MaskConfig(masked_fraction=0.5, num_masks=2, block_length=2)


def recording(seconds: float, seed: int) -> np.ndarray:
    """(C, S) float32, channels of different level and scale."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 1, (len(CHANNELS), int(seconds * RATE))) * [[1], [10], [1e-6]] + [[0], [500], [0]]
    return samples.astype(np.float32)


def write_recordings(folder: Path) -> Path:
    """Sixteen recordings of four subjects and two classes, with a manifest."""
    (folder / "raw").mkdir(parents=True)
    lines = ["path\tlabel\tsubject"]
    for number in range(16):
        np.save(folder / "raw" / f"{number:02d}.npy", recording(3 + number / 4, number))
        lines.append(f"raw/{number:02d}.npy\t{'ab'[number % 2]}\ts{number // 4}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def pack_folder(source: Path, output: Path, *options: str) -> int:
    arguments = ["--input", str(source), "--output", str(output), "--channels", *CHANNELS, "--sample-rate", str(RATE)]
    return pack([*arguments, "--workers", "1", *options])


def reader_of(folder: Path, mask: MaskConfig | None = MASK, network: SensorNetwork = NETWORK) -> SensorReader:
    config = SensorDataConfig(shards=folder, global_batch_seconds=8, micro_batch_seconds=8, max_seconds=4)
    return SensorReader(JoinedShards([SensorShards(folder)], SENSORS.must_be_equal), config, network, mask)


# ------------------------------------------------------------------ parts


def test_all_kinds_of_files_hold_the_same_recording(tmp_path: Path) -> None:
    raw, samples = tmp_path / "raw", recording(4, 0)
    raw.mkdir()
    np.save(raw / "a.npy", samples)
    np.save(raw / "b.npy", samples.T.astype(np.float64))
    columns = {"time": np.arange(samples.shape[1]), "z": samples[2], "x": samples[0], "y": samples[1]}
    pa.parquet.write_table(pa.table(columns), raw / "c.parquet")
    pa.csv.write_csv(pa.table(columns), raw / "d.csv")
    np.savetxt(raw / "e.csv", samples.T, delimiter=",", fmt="%.9g")
    assert pack_folder(raw, tmp_path / "packed") == 0
    shards = SensorShards(tmp_path / "packed")
    assert [shards.read_labels(row).id for row in range(len(shards))] == [
        "a.npy",
        "b.npy",
        "c.parquet",
        "d.csv",
        "e.csv",
    ]
    for row in range(len(shards)):
        assert (shards.read(row).samples == samples).all(), shards.read_labels(row).id


def test_files_that_are_no_recording_are_skipped_with_their_reason(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    np.save(raw / "good.npy", recording(4, 0))
    np.save(raw / "channels.npy", recording(4, 0)[:2])
    np.save(raw / "nan.npy", np.where(recording(4, 0) > 505, np.nan, recording(4, 0)))
    np.save(raw / "short.npy", recording(0.5, 0))
    (raw / "text.npy").write_text("no array")
    (raw / "columns.csv").write_text("x,y,w\n1,2,3\n")
    (raw / "word.csv").write_text("x,y,z\n1,2,three\n")
    (raw / "notes.txt").write_text("not read")
    assert pack_folder(raw, tmp_path / "packed") == 3, "more than one file in a hundred is skipped"
    lines = (tmp_path / "packed" / "skipped.tsv").read_text().splitlines()[1:]
    reasons = dict(line.split("\t") for line in lines)
    assert reasons.keys() == {"channels.npy", "columns.csv", "nan.npy", "short.npy", "text.npy", "word.csv"}
    assert reasons["channels.npy"] == "expected 3 channels as (C, S) or (S, C), found (2, 200)"
    assert reasons["columns.csv"] == "expected columns z, found x, y, w"
    assert reasons["nan.npy"] == "missing, NaN or infinite samples in y"
    assert reasons["short.npy"] == "0.500 s is shorter than --min-seconds 1"
    assert [SensorShards(tmp_path / "packed").read_labels(0).id] == ["good.npy"]


def test_pieces_of_a_long_recording_are_normalised_by_the_whole(tmp_path: Path) -> None:
    whole = recording(10, 0)
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw" / "long.npy", whole)
    assert pack_folder(tmp_path / "raw", tmp_path / "packed", "--max-seconds", "4") == 0
    reader = reader_of(tmp_path / "packed")
    pieces = torch.cat([reader.read_whole(row) for row in range(3)], dim=1)  # (C, S)
    wide = whole.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(pieces.numpy(), expected, atol=1e-4)
    assert abs(reader.read_whole(0)[0].mean()) > 1e-3, "a piece alone has another mean"


def test_a_crop_is_a_part_of_the_whole_row_and_depends_on_nothing_else(tmp_path: Path) -> None:
    assert pack_folder(write_recordings(tmp_path), tmp_path / "packed") == 0
    reader = reader_of(tmp_path / "packed")
    size = 150
    both = reader.read(MicroBatch(epoch=1, rows=np.array([9, 14]), size=size), seed=3).source  # (B, C, S)
    alone = reader.read(MicroBatch(epoch=1, rows=np.array([14]), size=size), seed=3).source
    assert both.shape == (2, 3, size)
    assert torch.equal(both[1], alone[0])
    windows = reader.read_whole(14).unfold(1, size, 1)  # (C, starts, S)
    assert sum(torch.equal(windows[:, start], alone[0]) for start in range(windows.shape[1])) == 1


def test_a_constant_channel_becomes_zero(tmp_path: Path) -> None:
    samples = recording(4, 0)
    samples[1] = 0.1
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw" / "flat.npy", samples)
    assert pack_folder(tmp_path / "raw", tmp_path / "packed") == 0
    found = reader_of(tmp_path / "packed").read_whole(0)
    assert (found[1] == 0).all()
    assert found[2].std() == pytest.approx(1, rel=1e-2), "a scale of 1e-6 is no constant"


def test_arrays_files_and_rows_are_the_same_to_the_model(tmp_path: Path) -> None:
    assert pack_folder(write_recordings(tmp_path), tmp_path / "packed") == 0
    inference = SensorsInference(NETWORK, {"sample_rate_hz": RATE, "channels": CHANNELS})
    options = InputOptions(sample_rate=RATE)
    samples = recording(3, 0)
    expected = reader_of(tmp_path / "packed").read_whole(0)
    given = [tmp_path / "raw" / "00.npy", samples, samples.T, torch.from_numpy(samples)]
    assert all(torch.equal(inference.read(one, options, "input 0"), expected) for one in given)
    doubled = np.repeat(samples, 2, axis=1)
    assert inference.read(doubled, InputOptions(sample_rate=2 * RATE), "input 0").shape == expected.shape


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        (recording(3, 0), InputOptions(), "input 0: expected sample_rate= of the recording"),
        (recording(3, 0)[:2], InputOptions(sample_rate=RATE), "input 0: expected 3 channels"),
        (recording(0.1, 0), InputOptions(sample_rate=RATE), "input 0: 0.100 s, expected 0.25 s or more"),
        (np.full((3, 100), np.nan), InputOptions(sample_rate=RATE), "missing, NaN or infinite samples in x, y, z"),
    ],
)
def test_raw_inputs_that_do_not_fit_are_refused(item: np.ndarray, options: InputOptions, message: str) -> None:
    inference = SensorsInference(NETWORK, {"sample_rate_hz": RATE, "channels": CHANNELS})
    with pytest.raises(ValueError, match=message):
        inference.read(item, options, "input 0")


def test_windows_put_together_cover_every_token_once() -> None:
    inference = SensorsInference(NETWORK, {"sample_rate_hz": RATE, "channels": CHANNELS})
    source = torch.randn(3, 1000)
    pieces = inference.cut(0, source, InputOptions(sample_rate=RATE, window_seconds=4))
    places = [place for piece in pieces for place in range(piece.place, piece.place + piece.last - piece.first)]
    assert places == list(range(NETWORK.num_tokens(1000)))
    local = NETWORK.build_encoder(BLOCK, 1, with_local=True).local
    whole = local(source[None])[0]  # (T, D)
    for piece in pieces:
        found = local(piece.source[None])[0, piece.first : piece.last]
        torch.testing.assert_close(found, whole[piece.place : piece.place + len(found)])


def test_shards_and_settings_that_do_not_fit_are_named(tmp_path: Path) -> None:
    assert pack_folder(write_recordings(tmp_path), tmp_path / "packed") == 0
    assert reader_of(tmp_path / "packed").faults() == []
    other = SensorNetwork(num_channels=4, sample_rate_hz=100, conv_layers=((16, 400, 2),))
    faults = "\n".join(reader_of(tmp_path / "packed", network=other).faults())
    assert "3 channels (x, y, z), model.modalities.sensors.num_channels is 4" in faults
    assert "sample_rate_hz is 50, model.modalities.sensors.sample_rate_hz is 100" in faults
    assert "200 samples make 0 tokens, expected 2 or more; the front end needs 402 samples" in faults


def test_packing_loads_no_torch() -> None:
    modules = ", ".join(f"sensors.{name}" for name in ("pack", "packing", "report", "sample"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(EXAMPLE)])
    assert subprocess.run([sys.executable, "-c", code], env=environment() | {"PYTHONPATH": path}).returncode == 0


# ------------------------------------------------------------------ a whole run of the installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which pip has installed the package, into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, folder / "source")  # setuptools writes beside the sources
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder / "source")], check=True, timeout=120)
    return environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "site")])}


@pytest.fixture(scope="module")
def packed(installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensors")
    options = ["--channels", *CHANNELS, "--sample-rate", str(RATE), "--shard-bytes", "8K", "--workers", "2"]
    source = str(write_recordings(folder))
    python(installed, "-m", "sensors.pack", "--input", source, "--output", str(folder / "packed"), *options)
    return folder / "packed"


@pytest.fixture(scope="module")
def unbroken(installed: dict[str, str], packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others are compared with: two ranks, ZeRO-3, bf16."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    said = pretrain(installed, packed, run_dir)
    assert f"step {STEPS}/{STEPS}" in said
    assert "accumulation 2" in said
    return run_dir


@pytest.fixture(scope="module")
def model(installed: dict[str, str], unbroken: Path) -> Path:
    said = python(installed, "-m", "d2v2ds.export", str(unbroken), "--to", str(unbroken.parent / "model"))
    assert said.count("no files for transformers") == 1
    return unbroken.parent / "model"


def python(env: dict[str, str], *arguments: str) -> str:
    """Run an interpreter; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def command(packed: Path, run_dir: Path) -> list[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    settings = ["--config", str(CONFIG), f"data.shards={packed}", f"run.dir={run_dir}", *SMALL]
    return [*launcher, "--module", "d2v2ds.pretrain", *settings]


def pretrain(env: dict[str, str], packed: Path, run_dir: Path) -> str:
    done = subprocess.run(
        command(packed, run_dir), env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def script(env: dict[str, str], *lines: str) -> dict[str, object]:
    """Run lines of Python that set `found`; returns it."""
    printed = python(env, "-c", "\n".join(["import json", *lines, "print(json.dumps(found))"]))
    found: dict[str, object] = json.loads(printed.splitlines()[-1])
    return found


def test_packed_folder_is_verified_and_inspected(installed: dict[str, str], packed: Path) -> None:
    said = python(installed, "-m", "preprocessing.verify", str(packed))
    assert "16 rows in 6 shards checked, 0 faults" in said
    said = python(installed, "-m", "preprocessing.inspect", str(packed), "--plot", str(packed.parent / "plot.png"))
    for line in ("sensors, 3 channels (x, y, z) at 50 Hz", "subjects  4", "labels    2", "figure:"):
        assert line in said
    damaged = packed.parent / "damaged"
    shutil.copytree(packed, damaged)
    shard = damaged / "sensors-00000.arrow"
    at = shard.read_bytes().index(recording(3, 0)[1].tobytes())
    shard.write_bytes(shard.read_bytes()[:at] + b"\x00\x00\xc0\x7f" + shard.read_bytes()[at + 4 :])  # NaN
    done = subprocess.run(
        [sys.executable, "-m", "preprocessing.verify", str(damaged)], env=installed, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "row 0: samples: expected finite numbers, found NaN or infinity" in done.stdout


def test_without_the_package_its_folders_are_refused(packed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preprocessing.verify", str(packed)], env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "modality 'sensors' is not known here" in done.stderr


@pytest.mark.run
def test_killed_run_resumes_to_the_unbroken_run_bit_for_bit(
    installed: dict[str, str], unbroken: Path, packed: Path, tmp_path: Path
) -> None:
    run_dir, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(packed, run_dir), env=installed, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)  # step 3 is written, the last checkpoint is of step 2
        process.wait()
    assert "resumed at step" in pretrain(installed, packed, run_dir)
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert "student trunk.encoders.sensors.local.convs.0.conv.weight" in expected
    assert "teacher trunk.encoders.sensors.local.convs.0.conv.weight" in expected, "the teacher has a front end"
    assert all((expected[name] == found[name]).all() for name in expected)


@pytest.mark.run
def test_metrics_count_recording_time_and_not_channels(unbroken: Path) -> None:
    last = deterministic(unbroken)[-1]
    assert 0.5 * STEPS * 24 < last["data/sensor_hours"] * 3600 <= STEPS * 24
    assert last["target/effective_rank"] > 1


@pytest.mark.run
def test_probe_leaves_out_subjects(installed: dict[str, str], unbroken: Path, packed: Path) -> None:
    arguments = ["--shards", str(packed), "--leave-out", "subject", "--baseline", "--all-blocks"]
    said = python(installed, "-m", "d2v2ds.probe", str(unbroken), *arguments)
    assert "label of 16 rows, one subject of 4 left out in turn" in said
    assert "without a model, band powers" in said
    assert "at random init" in said.splitlines()[-1]


@pytest.mark.run
def test_exported_model_has_the_same_features_from_files_arrays_and_shards(
    installed: dict[str, str], model: Path, packed: Path, tmp_path: Path
) -> None:
    description = json.loads((model / "config.json").read_text())["preprocessing"]
    assert description == {"sensors": {"sample_rate_hz": RATE, "channels": CHANNELS}}
    out = tmp_path / "features.arrow"
    arguments = ["--model", str(model), "--shards", str(packed), "--out", str(out), "--pool", "mean"]
    python(installed, "-m", "d2v2ds.extract", *arguments)
    with pa.OSFile(str(out)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.column_names == ["row", "id", "label", "subject", "tokens", *(f"layer_{i}" for i in range(5))]
    assert len(table) == 16
    raw = packed.parent / "raw"
    found = script(
        installed,
        "import numpy as np, torch",
        "from d2v2ds import FeatureExtractor, load_model",
        f"names = ['{raw}/00.npy', '{raw}/07.npy']",
        f"extractor = FeatureExtractor('{model}')",
        f"files = extractor(names, sample_rate={RATE})",
        f"arrays = extractor([np.load(name) for name in names], sample_rate={RATE})",
        f"source = extractor.inference('sensors').read(names[0], extractor._options.__class__(sample_rate={RATE}), '')",
        f"bare = load_model('{model}', device='cpu').layers('sensors', source[None])[4][0]",
        f"parts = FeatureExtractor('{model}', window_seconds=2)(names[0], sample_rate={RATE})",
        "found = {",
        "    'pooled': files.mean()[4].tolist(), 'arrays': torch.equal(files.layers[4], arrays.layers[4]),",
        "    'alone': float((bare - files.unpadded(0)[4]).abs().max()), 'windows': parts.windows,",
        "    'tokens': [int((~files.padding[i]).sum()) for i in (0, 1)],",
        "}",
    )
    rows = [table["id"].to_pylist().index(name) for name in ("raw/00.npy", "raw/07.npy")]
    expected = np.array(table["layer_4"].to_pylist())[rows]
    np.testing.assert_allclose(np.array(found["pooled"]), expected, atol=1e-4)
    assert found["tokens"] == [table["tokens"][row].as_py() for row in rows]
    assert found["arrays"] is True
    assert isinstance(found["alone"], float)
    assert found["alone"] < 1e-4, "a recording in a padded batch has the features that it has alone"
    assert found["windows"] == [2]


@pytest.mark.run
def test_shards_of_other_channels_are_no_input_of_the_model(
    installed: dict[str, str], model: Path, packed: Path, tmp_path: Path
) -> None:
    options = ["--channels", *reversed(CHANNELS), "--sample-rate", str(RATE)]
    source = str(packed.parent / "manifest.tsv")
    python(installed, "-m", "sensors.pack", "--input", source, "--output", str(tmp_path / "turned"), *options)
    arguments = ["--model", str(model), "--shards", str(tmp_path / "turned"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "d2v2ds.extract", *arguments], env=installed, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "expected channels x, y, z, found z, y, x" in done.stderr


@pytest.mark.run
def test_exported_model_becomes_a_graph(installed: dict[str, str], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    said = python(installed, "-m", "d2v2ds.interop.onnx", str(model), "--to", str(tmp_path), "--layers", "4")
    assert "of PyTorch's largest feature" in said
    assert (tmp_path / "sensors.onnx").is_file()


def test_configuration_resolves(installed: dict[str, str]) -> None:
    said = python(installed, "-m", "d2v2ds.config", str(CONFIG))
    assert "seconds of recordings per step" in said
