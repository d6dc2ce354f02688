"""Whole runs of images, of text, and of all three together, as a user starts them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v2ds import FeatureExtractor
from d2v2ds.config.load import load_config
from d2v2ds.errors import CheckpointError, ConfigError
from d2v2ds.probe import main as probe_main
from d2v2ds.run.describe import describe
from d2v2ds.run.export import export
from d2v2ds.run.prepare import prepare
from d2v2ds.train.metrics import read_metrics
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.runs.launching import Processes, deterministic, rank_variables, weights

STEPS = 6
RUN = [
    f"run.total_steps={STEPS}",
    "run.save_every_steps=2",
    "run.log_every_steps=1",
    "run.health_every_steps=3",
    "run.keep_checkpoints=0",
    "lr.warmup_steps=2",
    "objective.ema.anneal_steps=6",
    "model.block.width=32",
    "model.block.mlp_dropout=0.1",  # draws must survive a resume too
    "model.shared_depth=2",
    "health.warm_up_steps=1000",
    "optim.clip_norm=1",  # of the joint and the single recipes alike
]
OF = {
    "audio": [
        "model.modalities.audio.conv_layers=[[16,10,5],[16,8,8],[16,4,4],[16,2,2]]",
        "objective.modalities.audio.decoder.width=16",
        "objective.modalities.audio.target.num_layers=2",
        "data.audio.global_batch_seconds=3",
        "data.audio.micro_batch_seconds=1",
        "data.audio.max_seconds=1",
        "data.audio.min_seconds=0.5",
        "objective.modalities.audio.mask.num_masks=2",
    ],
    "image": [
        "objective.modalities.image.decoder.width=16",
        "objective.modalities.image.target.num_layers=2",
        "data.image.global_batch_images=6",
        "data.image.micro_batch_images=3",
        "objective.modalities.image.mask.num_masks=2",
    ],
    "text": [
        "objective.modalities.text.decoder.width=16",
        "objective.modalities.text.target.num_layers=2",
        "model.modalities.text.vocab_size=320",
        "model.modalities.text.max_tokens=32",
        "data.text.global_batch_tokens=256",
        "data.text.micro_batch_tokens=128",
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed folder of each modality, and of labelled texts."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("audio", "image/a", "image/b"):
        (root / name).mkdir(parents=True)
    for i in range(12):
        soundfile.write(root / "audio" / f"{i:02d}.wav", 0.1 * rng.standard_normal(20_000), 16_000)
    for i in range(24):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "image" / "ab"[i % 2] / f"{i:02d}.jpg")
    words = [f"word{i}" for i in range(60)]
    with (root / "text.jsonl").open("w") as file:
        for i in range(200):
            text = " ".join(rng.choice(words[(i % 2) * 20 : 40 + (i % 2) * 20], 30))
            file.write(json.dumps({"text": text, "label": "xy"[i % 2]}) + "\n")
    packed = {name: root / f"{name}-shards" for name in ("audio", "image", "text", "documents")}
    common = ["--workers", "1"]
    assert pack_audio(["--input", str(root / "audio"), "--output", str(packed["audio"]), *common]) == 0
    assert pack_images(["--input", str(root / "image"), "--output", str(packed["image"]), *common]) == 0
    text = ["--input", str(root / "text.jsonl"), "--block-tokens", "32", *common]
    trained = ["--train-tokenizer", "--vocab-size", "320"]
    assert pack_text([*text, "--output", str(packed["text"]), *trained]) == 0
    tokenizer = str(packed["text"] / "tokenizer.model")
    rows = ["--tokenizer", tokenizer, "--one-row-per-document"]
    assert pack_text([*text, "--output", str(packed["documents"]), *rows]) == 0
    return packed


def settings(folders: dict[str, Path], modalities: Sequence[str]) -> list[str]:
    """Overrides of a run over some modalities."""
    of_data = [f"data.{name}.shards={folders[name]}" for name in modalities]
    return [*RUN, *of_data, *(override for name in modalities for override in OF[name])]


def without(*modalities: str) -> list[str]:
    return [f"{section}.{name}=null" for name in modalities for section in ("data", "model.modalities")]


def train(config: str, run_dir: Path, overrides: Sequence[str], ranks: int = 2) -> str:
    """Run to the end on forked ranks; returns what they printed."""
    arguments = ["--config", config, f"run.dir={run_dir}", *overrides]
    logs = run_dir.parent / f"{run_dir.name}-logs"
    with Processes("d2v2ds.pretrain", arguments, rank_variables(ranks), logs) as started:
        assert started.wait() == [0] * ranks, started.printed(0)[-5000:]
        return "".join(started.printed(rank) for rank in range(ranks))


@pytest.fixture(scope="module")
def joint(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three on two ranks with ZeRO-3 and bf16."""
    run_dir = tmp_path_factory.mktemp("joint") / "run"
    said = train("multimodal_tiny", run_dir, settings(folders, ("audio", "image", "text")))
    assert f"step {STEPS}/{STEPS}" in said
    return run_dir


@pytest.mark.run
@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_trains_and_is_probed(
    modality: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train(f"{modality}_tiny", run_dir, settings(folders, (modality,)))
    records = list(read_metrics(run_dir / "metrics.jsonl"))
    assert len(records) == STEPS
    unit = {"image": "images", "text": "tokens"}[modality]
    amount = {"image": 6, "text": 256}[modality]
    assert records[-1][f"data/{unit}"] == pytest.approx(STEPS * amount, rel=0.05)
    assert records[-1][f"perf/{unit}_per_s"] > 0
    per_sample = {"image": 1, "text": 32}[modality]
    assert records[-1]["perf/samples_per_s"] * per_sample == pytest.approx(records[-1][f"perf/{unit}_per_s"])
    assert all(np.isfinite(r["loss/regression"]) for r in records)
    assert ("loss/cls" in records[-1]) == (modality == "image")
    assert {"target/exact_position_share", "target/effective_rank"} <= set(records[2])
    labelled = folders["documents" if modality == "text" else modality]
    asked = ["--shards", str(labelled), "--test-shards", str(labelled), "--baseline", "--neighbours", "3"]
    assert probe_main([str(run_dir), *asked]) == 0
    said = capsys.readouterr().out
    assert "without a model" in said
    assert said.splitlines()[-1].count("at random init") == 1
    result = json.loads((run_dir / "probe.json").read_text())
    if modality == "text":
        assert result["baseline"]["logistic"] > 0.95, "two vocabularies are told apart without a model"


@pytest.mark.run
def test_joint_run_writes_every_modality_under_its_name(joint: Path) -> None:
    last = list(read_metrics(joint / "metrics.jsonl"))[-1]
    for name in ("audio", "image", "text"):
        assert {f"{name}/loss/regression", f"{name}/target/std", f"{name}/mask/fraction"} <= set(last)
        assert last[f"{name}/target/effective_rank"] > 1
    assert {"data/hours", "data/images", "data/tokens", "perf/images_per_s", "image/loss/cls"} <= set(last)
    parts = [(1.0, "audio/loss/regression"), (1.0, "image/loss/regression"), (1.0, "image/loss/cls")]
    expected = sum(w * last[name] for w, name in [*parts, (0.0722, "text/loss/regression")])
    assert last["loss/total"] == pytest.approx(expected, rel=1e-6)
    assert last["perf/samples_per_s"] > last["perf/images_per_s"] + last["perf/tokens_per_s"] / 32


@pytest.mark.run
def test_norms_of_the_parts_make_up_that_of_the_gradient(joint: Path) -> None:
    first = list(read_metrics(joint / "metrics.jsonl"))[0]
    parts = {name: value for name, value in first.items() if "optim/grad_norm/" in name}
    of_modalities = [f"{name}/optim/grad_norm/{part}" for name in OF for part in ("local", "decoder")]
    assert {*of_modalities, "optim/grad_norm/blocks", "image/optim/grad_norm/other"} <= set(parts)
    assert sum(value**2 for value in parts.values()) == pytest.approx(first["optim/grad_norm"] ** 2, rel=1e-5)


@pytest.mark.run
def test_joint_run_resumes_bit_for_bit(joint: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "resumed"
    shutil.copytree(joint, run_dir)
    for step in (4, 6):
        shutil.rmtree(run_dir / "checkpoints" / f"step{step:08d}")
    (run_dir / "checkpoints" / "latest").write_text("step00000002")
    said = train("multimodal_tiny", run_dir, settings(folders, ("audio", "image", "text")))
    assert "resumed at step 2" in said
    assert deterministic(run_dir) == deterministic(joint)
    before, after = weights(joint, STEPS), weights(run_dir, STEPS)
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.run
def test_joint_run_without_the_others_is_a_plain_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """Same weights to begin with, same data, same draws: every number is the same."""
    train("multimodal_tiny", tmp_path / "reduced", [*settings(folders, ("audio",)), *without("image", "text")])
    train("audio_tiny", tmp_path / "plain", settings(folders, ("audio",)))
    reduced, plain = (deterministic(tmp_path / name) for name in ("reduced", "plain"))
    assert reduced == plain


@pytest.mark.run
def test_joint_run_on_another_number_of_ranks_sees_the_same(
    joint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    train("multimodal_tiny", tmp_path / "one", settings(folders, ("audio", "image", "text")), ranks=1)
    for a, b in zip(deterministic(joint), deterministic(tmp_path / "one"), strict=True):
        for name in ("audio", "image", "text"):
            assert a[f"{name}/mask/fraction"] == b[f"{name}/mask/fraction"]
            assert b[f"{name}/loss/regression"] == pytest.approx(a[f"{name}/loss/regression"], rel=5e-3)


# ------------------------------------------------------------------ refusals, before any process group


def refusal(config: str, folders: dict[str, Path], modalities: Sequence[str], *overrides: str) -> str:
    run_dir = f"run.dir={folders['text'].parent / 'never'}"
    with pytest.raises(ConfigError) as caught:
        prepare(config, [*settings(folders, modalities), run_dir, *overrides], world=2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("modality", "override", "message"),
    [
        ("image", "objective.modalities.image.mask.kind=block_1d", "mask.kind is 'block_1d'"),
        ("image", "data.image.crop_scale=[0.5, 0.2]", "data.image.crop_scale is [0.5, 0.2]"),
        ("image", "model.modalities.image.patch_size=16", "objective.modalities.image.mask"),
        ("text", "model.modalities.text.vocab_size=300", "has 320 ids, model.modalities.text.vocab_size is 300"),
        ("text", "model.modalities.text.max_tokens=16", "blocks of 32 tokens, model.modalities.text.max_tokens is 16"),
        ("text", "data.text.micro_batch_tokens=16", "cannot hold one block of 32 tokens"),
        ("text", "objective.modalities.text.mask.kind=block_2d", "text needs 'random', 'block_1d' or 'spans'"),
    ],
)
def test_impossible_run_is_refused(modality: str, override: str, message: str, folders: dict[str, Path]) -> None:
    assert message in refusal(f"{modality}_tiny", folders, (modality,), override)


@pytest.mark.parametrize(("vocab_size", "said"), [(320, False), (8000, True)])
def test_ids_that_no_text_has_are_mentioned_at_the_start(
    vocab_size: int, said: bool, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*settings(folders, ("text",)), f"run.dir={tmp_path}", f"model.modalities.text.vocab_size={vocab_size}"]
    prepared = prepare("text_tiny", overrides, world=1)
    with caplog.at_level("INFO", logger="d2v2ds"):
        describe(prepared.config, prepared.streams)
    lines = [record.message for record in caplog.records if "vocab_size" in record.message]
    expected = (
        "data.text.shards: the tokenizer has 320 ids, model.modalities.text.vocab_size is 8000: "
        "7680 rows of the embedding will never be used"
    )
    assert lines == [expected] * said


def test_folder_of_another_modality_is_refused(folders: dict[str, Path]) -> None:
    said = refusal("image_tiny", folders, ("image",), f"data.shards={folders['text']}")
    assert "expected image, found a folder of text" in said


def test_half_a_modality_is_refused(folders: dict[str, Path]) -> None:
    said = refusal("multimodal_tiny", folders, ("audio", "image", "text"), "model.modalities.text=null")
    assert "data.text and objective.modalities.text configured, model.modalities.text not" in said


def test_data_shards_of_a_joint_run_must_name_the_modality() -> None:
    with pytest.raises(ConfigError, match="the run has data for audio, image, text; name one"):
        load_config("multimodal_tiny", ["data.shards=somewhere"])


@pytest.mark.run
def test_export_of_a_joint_run_reads_all_three_and_brings_its_tokenizer(
    joint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    export(joint, tmp_path / "model")
    extractor = FeatureExtractor(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (folders["text"] / "tokenizer.model").read_bytes()
    assert extractor("word7 word8", modality="text").layers[2].shape[2] == 32
    assert extractor(Image.new("RGB", (50, 40)), modality="image").layers[2].shape == (1, 64, 32)
    assert "data/tokens" in extractor.folder.description.origin["final_metrics"]


@pytest.mark.run
def test_export_goes_on_without_shards_and_says_what_is_missing(
    joint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(joint, run_dir)
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("text-shards", "moved-away"))
    export(run_dir, tmp_path / "model")
    assert "files beside the run's shards are not exported" in caplog.text
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        FeatureExtractor(tmp_path / "model")("word7", modality="text")
