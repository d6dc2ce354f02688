"""A whole run as a user starts it: launchers, checkpoints, SIGKILL and resume, another number of ranks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2v2ds import FeatureExtractor
from d2v2ds.config.load import load_config
from d2v2ds.distributed.comm import free_port
from d2v2ds.errors import ConfigError
from d2v2ds.export import main as export_main
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.pretrain import main
from d2v2ds.probe import main as probe_main
from d2v2ds.run.export import export
from d2v2ds.run.folder import checkpoint_folder, objective_tensors, trunk_tensors
from d2v2ds.run.prepare import prepare
from tests.runs.launching import (
    SMALL,
    STEPS,
    Processes,
    arguments_of,
    attempt,
    deterministic,
    environment,
    launch,
    train,
    weights,
)


@pytest.mark.run
def test_run_leaves_what_a_user_needs(unbroken: Path) -> None:
    records = deterministic(unbroken)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for name in (
        "loss/regression",
        "ema/decay",
        "target/effective_rank",
        "local/position_share",
        "ema/student_distance",
    ):
        assert name in records[0], f"{name} must be there from the first step"
    assert records[0]["optim/lr"] == 0.0
    assert records[-1]["loss/regression"] < records[0]["loss/regression"]
    for file in ("config.yaml", "deepspeed.json", "starts.jsonl", "log.txt", "tensorboard", "checkpoints/latest"):
        assert (unbroken / file).exists(), file
    start = json.loads((unbroken / "starts.jsonl").read_text())
    assert "git_revision" in start
    assert start["versions"]["torch"]
    assert start["world_size"] == 2
    assert start["command"][:5] == ["python", "-m", "d2v2ds.pretrain", "--config", "audio_tiny"]
    assert not [word for word in start["command"] if "local_rank" in word]
    kept = sorted(path.name for path in (unbroken / "checkpoints").glob("step*"))
    assert kept == [f"step{step:08d}" for step in (4, 6, 8)], "the newest three are kept"


@pytest.mark.run
@pytest.mark.parametrize("launcher", ["torchrun", "plain"])
def test_other_launchers_and_rank_counts_see_the_same_batches(
    launcher: str, unbroken: Path, shards: Path, tmp_path: Path
) -> None:
    """Resumed from step 4 on one rank, or on three, the run goes on with the same data and close losses."""
    run_dir = tmp_path / launcher
    shutil.copytree(unbroken, run_dir)
    for step in (6, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step{step:08d}")
    (run_dir / "checkpoints" / "latest").write_text("step00000004")
    printed = launch(launcher, 3 if launcher == "torchrun" else 1, shards, run_dir)
    assert "resumed at step 4" in printed
    expected, found = deterministic(unbroken), deterministic(run_dir)
    for a, b in zip(expected, found, strict=True):
        assert (a["step"], a["data/hours"], a["mask/fraction"]) == (b["step"], b["data/hours"], b["mask/fraction"])
        assert b["loss/regression"] == pytest.approx(a["loss/regression"], rel=2e-3)  # bf16 sums in another order


@pytest.mark.run
def test_slurms_variables_are_enough_to_start(unbroken: Path, shards: Path, tmp_path: Path) -> None:
    """What `srun` sets for each task, with the rendezvous that a batch script exports."""
    common = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [common | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
    run_dir = tmp_path / "slurm"
    arguments = arguments_of(shards, run_dir, "run.save_every_steps=8")
    with Processes("d2v2ds.pretrain", arguments, tasks, logs=tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
    assert deterministic(run_dir)[-1]["loss/regression"] == deterministic(unbroken)[-1]["loss/regression"]


@pytest.mark.run
def test_more_ranks_than_micro_batches_give_the_same_losses(unbroken: Path, shards: Path, tmp_path: Path) -> None:
    """On four ranks one has nothing but a filler in every step; it must reduce as many numbers as the others."""
    run_dir = tmp_path / "four"
    train(4, shards, run_dir, "run.save_every_steps=8")
    for a, b in zip(deterministic(unbroken), deterministic(run_dir), strict=True):
        assert a["mask/fraction"] == b["mask/fraction"]
        assert b["loss/regression"] == pytest.approx(a["loss/regression"], rel=2e-3)
        assert b["target/std"] == pytest.approx(a["target/std"], rel=1e-2)


@pytest.mark.run
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "inf"
    extra = ["objective.modalities.audio.loss.scale=3.0e+38", "health.max_nonfinite_steps=3", "run.save_every_steps=1"]
    codes, printed = attempt(2, shards, run_dir, *extra)
    assert codes == [4, 4]
    assert "3 steps in a row had a loss or gradient that is not finite, and it can go back to none of the run's 2 " in (
        printed
    )
    assert "intact" not in printed
    for step in (1, 2, 3):
        assert len(re.findall(rf"step {step} skipped", printed)) == 1, "on one rank, and by one room"
    records = deterministic(run_dir)
    assert [record["optim/skipped_steps"] for record in records] == [1.0, 2.0]
    assert not any("loss/regression" in record for record in records), "a skipped step must not enter an average"
    first, last = weights(run_dir, 1), weights(run_dir, 2)
    assert all((first[name] == last[name]).all() for name in first), "skipped steps leave all weights alone"


@pytest.mark.run
def test_a_run_of_which_no_step_was_applied_is_not_done(shards: Path, tmp_path: Path) -> None:
    few = ["objective.modalities.audio.loss.scale=3.0e+38", "run.total_steps=2", "lr.warmup_steps=1"]
    codes, printed = attempt(1, shards, tmp_path / "run", *few)
    assert codes == [4]
    assert "step 2: 2 steps in a row had a loss or gradient that is not finite, all that the run had" in printed


@pytest.mark.run
def test_run_that_is_not_finite_from_the_start_has_nothing_to_go_back_to(shards: Path, tmp_path: Path) -> None:
    extra = ["objective.modalities.audio.loss.scale=3.0e+38", "health.max_nonfinite_steps=2", "run.save_every_steps=8"]
    codes, printed = attempt(1, shards, tmp_path / "inf", *extra)
    assert codes == [4]
    last = printed.strip().splitlines()[-1]
    assert "2 steps in a row had a loss or gradient that is not finite, and no checkpoint was saved before them" in last
    assert "damaged" not in last
    assert "intact" not in last


@pytest.mark.run
def test_collapse_stops_the_run_with_its_own_exit_code(shards: Path, tmp_path: Path) -> None:
    stop = ["health.min_effective_rank=1000", "health.warm_up_steps=0", "health.stop_on_collapse=true"]
    codes, printed = attempt(1, shards, tmp_path / "run", "data.num_workers=0", *stop)
    assert codes == [3], printed[-3000:]
    assert "target/effective_rank is" in printed
    assert "floor 1e+03" in printed
    assert len(deterministic(tmp_path / "run")) == 1, "the record that rang the alarm is kept"


@pytest.mark.run
def test_settings_that_a_resumed_run_has_otherwise_are_said(unbroken: Path, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "changed"
    shutil.copytree(unbroken, run_dir)
    mask = "objective.modalities.audio.mask.masked_fraction"
    said = train(1, shards, run_dir, "lr.peak=0.5", f"{mask}=0.6")
    changes = {line.partition("changed since the last start: ")[2] for line in said.splitlines()} - {""}
    assert changes == {"lr.peak: 0.001 -> 0.5", f"{mask}: 0.5 -> 0.6"}
    assert "changed since" not in train(1, shards, run_dir, "lr.peak=0.5", f"{mask}=0.6")


@pytest.mark.run
@pytest.mark.parametrize(
    ("override", "difference"),
    [("block.mlp_dropout=0.3", "block.mlp_dropout: 0.1 -> 0.3"), ("shared_depth=4", "shared_depth: 3 -> 4")],
)
def test_other_model_is_refused_and_leaves_the_run_alone(
    override: str, difference: str, unbroken: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "refused"
    shutil.copytree(unbroken, run_dir)
    before = (run_dir / "config.yaml").read_text()
    codes, printed = attempt(1, shards, run_dir, f"model.{override}")
    assert difference in printed
    assert "choose another run.dir" in printed
    assert codes == [2]
    assert (run_dir / "config.yaml").read_text() == before


@pytest.mark.run
def test_an_export_is_the_checkpoint_and_tells_where_it_comes_from(unbroken: Path, tmp_path: Path) -> None:
    to = tmp_path / "model"
    export(unbroken, to, teacher=True)
    folder, checkpoint = ModelFolder(to), checkpoint_folder(unbroken)
    for part, tensors in (
        ("model", trunk_tensors(checkpoint)),
        ("objective", objective_tensors(checkpoint)),
        ("teacher", trunk_tensors(checkpoint, teacher=True)),
    ):
        found = dict(folder.tensors(part))  # type: ignore[arg-type]
        expected = dict(tensors)
        assert found.keys() == expected.keys()
        assert all((found[name] == expected[name]).all() for name in found)
    origin = folder.description.origin
    assert origin["step"] == STEPS
    assert origin["data"]["audio"]["rows"] > 0
    assert origin["final_metrics"]["loss/regression"] > 0
    card = (to / "README.md").read_text()
    assert "![curves](curves.png)" in card
    assert "- command: `python -m d2v2ds.pretrain --config audio_tiny data.shards=" in card
    assert "- world size: 2\n- started: 20" in card
    assert load_config(str(to / "run.yaml")) == load_config(str(unbroken / "config.yaml"))
    features = FeatureExtractor(to)(np.random.default_rng(0).normal(size=16000).astype(np.float32), sample_rate=16000)
    assert features.layers[4].shape == (1, 49, 32)


@pytest.mark.run
def test_one_file_has_the_student_or_the_average_and_loads_without_anything_beside_it(
    unbroken: Path, tmp_path: Path
) -> None:
    export(unbroken, tmp_path / "model", teacher=True)
    samples = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    for kind in ("student", "teacher"):
        file = tmp_path / f"{kind}.safetensors"
        for _ in range(2):  # the second time it is replaced
            assert export_main([str(unbroken), "--to", str(file), *["--teacher"][: kind == "teacher"]]) == 0
        found = FeatureExtractor(file)(samples, sample_rate=16000).layers
        expected = FeatureExtractor(tmp_path / "model", weights=kind)(samples, sample_rate=16000).layers
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        assert ModelFolder(file).description.origin["weights"] == kind
    student, teacher = (load_file(tmp_path / f"{name}.safetensors") for name in ("student", "teacher"))
    assert student.keys() - teacher.keys() == {name for name in student if name.startswith("objective.decoders.")}
    assert any(not torch.equal(student[name], tensor) for name, tensor in teacher.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "student.safetensors", "teacher.safetensors"]


@pytest.mark.run
def test_exporting_starts_no_deepspeed(unbroken: Path, tmp_path: Path) -> None:
    code = f"import sys; from d2v2ds.export import main; assert main([{str(unbroken)!r}, '--to', "
    code += f"{str(tmp_path / 'model')!r}]) == 0; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not ModelFolder(tmp_path / "model").has("teacher")


@pytest.mark.run
def test_probe_scores_a_run(unbroken: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(unbroken), "--shards", str(shards), "--leave-out", "speaker", "--all-blocks"]
    assert probe_main([*arguments, "--label", "label"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "learn" in last
    assert "points" in last
    result = json.loads((unbroken / "probe.json").read_text())
    assert sorted(result["student"]["2"]["folds"]) == ["a", "b"]
    assert len(result["student"]) == 5
    assert probe_main([*arguments, "--label", "accent"]) == 2


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "d2v2ds.demo", *arguments],
        env=environment(), capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


@pytest.mark.run
def test_demo_goes_from_recordings_to_a_verdict(shards: Path, tmp_path: Path) -> None:
    arguments = ["--runs", str(tmp_path / "demo"), "--data", str(shards.parent / "manifest.tsv"), "--", *SMALL]
    done = demo(*arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "at random init" in done.stdout
    for line in ("curves ", "checkpoint ", "TensorBoard ", "export "):
        assert f"\n{line}" in done.stdout
    assert (tmp_path / "demo" / "run" / "curves.png").stat().st_size > 10_000
    packed = {index: index.stat().st_mtime_ns for index in tmp_path.rglob("index.json")}
    assert packed
    stopped = demo(*arguments, "run.no_such_setting=1")
    assert stopped.returncode == 1
    assert "run.no_such_setting: unknown key" in stopped.stderr
    assert {index: index.stat().st_mtime_ns for index in packed} == packed, "the second time the packing is kept"


@pytest.mark.run
def test_demo_of_classes_ends_with_an_accuracy_of_both_starts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, name, count in (("train", "a", 8), ("train", "b", 8), ("valid", "a", 4), ("valid", "b", 4)):
        (tmp_path / "pictures" / part / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / f"{number}.png")
    short = ["run.total_steps=2", "run.save_every_steps=2", "lr.warmup_steps=1", "objective.ema.anneal_steps=2"]
    arguments = ["--modality", "image", "--data", str(tmp_path / "pictures"), "--fine-tuning-steps", "2", "--", *short]
    done = demo("--runs", str(tmp_path / "demo"), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = done.stdout.splitlines()[-5:]
    (last,) = [line for line in done.stdout.splitlines() if line.startswith("accuracy (%) on held-out pictures: ")]
    assert " pretrained, " in last and last.endswith(" random, after 2 steps each"), said
    runs = [tmp_path / "demo" / f"finetune-{name}" for name in ("pretrained", "random")]
    starts = ["init.weights" in (run / "log.txt").read_text() for run in runs]
    assert starts == [True, False]


@pytest.mark.run
def test_demo_without_data_says_so(tmp_path: Path) -> None:
    stopped = demo("--runs", str(tmp_path / "no"), "--data", str(tmp_path / "nowhere"))
    assert stopped.returncode == 1
    assert "found nothing there" in stopped.stderr


# ------------------------------------------------------------------ refusals, before any process group


def _prepare(shards: Path, *overrides: str) -> None:
    run_dir = f"run.dir={shards.parent / 'never_run'}"
    prepare("audio_tiny", [f"data.shards={shards}", run_dir, *SMALL, *overrides], world=2)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.audio.sample_rate_hz=8000", "sample_rate_hz is 16000, data.audio.sample_rate_hz is 8000"),
        ("data.audio.min_seconds=0.02", "0.02: 320 samples make 0 tokens, expected 2 or more"),
        (
            "objective.modalities.audio.mask.block_length=300",
            "objective.modalities.audio.mask, for clips of data.audio.min_seconds",
        ),
        ("model.block.attention_path=flex", "no backward pass on a CPU"),
        ("model.modalities.audio=null", "modalities: none is configured"),
        ("data.shards=???", "data.audio.shards: required, give data.shards="),
        ("engine.deepspeed=zero4", "give a path or one of"),
        (
            "objective.modalities.audio.mask.kind=block_2d",
            "objective.modalities.audio.mask.kind is 'block_2d', speech needs 'block_1d'",
        ),
        ("run.dir=/dev/null/run", "run.dir /dev/null/run: cannot be made"),
        ("data.num_workers=-1", "data.num_workers: Input should be greater than or equal to 0, found -1"),
        ("model.block.num_heads=0", "block.num_heads: Input should be greater than or equal to 1, found 0"),
        (
            "objective.modalities.audio.decoder.groups=0",
            "decoder.groups: Input should be greater than or equal to 1, found 0",
        ),
        (
            "model.modalities.audio.conv_layers=[[8,10,0]]",
            "conv_layers.0.2: Input should be greater than or equal to 1, found 0",
        ),
        (
            "model.modalities.audio.position_depth=0",
            "position_depth: Input should be greater than or equal to 1, found 0",
        ),
        ("lr.warmup_steps=-5", "lr.warmup_steps: Input should be greater than or equal to 0, found -5"),
    ],
)
def test_impossible_run_is_refused_with_both_values(shards: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _prepare(shards, override)


def test_faults_of_config_data_and_json_appear_together(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "gradient_clipping": 5}))
    with pytest.raises(ConfigError) as caught:
        _prepare(
            shards, "lr.pek=1", "objective.ema.end_decay=7", "data.audio.sample_rate_hz=8000",
            "objective.modalities.audio.mask.block_length=300", "optim.eps=small", f"engine.deepspeed={path}",
        )  # fmt: skip
    text = str(caught.value)
    assert "6 problem(s)" in text
    for part in (
        "lr.pek: unknown key; did you mean lr.peak?",
        "optim.eps: Input should be a valid number",
        "objective.ema.end_decay: Input should be less than or equal to 1, found 7",
        "data.audio.sample_rate_hz is 8000",
        "objective.modalities.audio.mask, for clips",
        "mine.json says gradient_clipping = 5, the run says 1.0",
    ):
        assert part in text


def test_clips_that_are_all_too_short_are_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"the longest clip has 2\.\d+ s, shorter than data.audio.min_seconds 5.0"):
        _prepare(shards, "data.audio.min_seconds=5", "data.audio.max_seconds=6", "data.audio.micro_batch_seconds=6")


def test_unfinished_folder_is_refused_and_the_exit_code_is_2(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ConfigError, match=r"found no index.json"):
        _prepare(tmp_path / "unfinished")
    assert main(["--config", "audio_tiny", f"data.shards={tmp_path / 'unfinished'}"]) == 2
