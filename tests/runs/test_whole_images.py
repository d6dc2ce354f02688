"""Whole runs of data2vec 1.0 for images: layer scale, query and value biases, and relative positions under ZeRO-3."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.pack_images import main as pack_images
from tests.runs.launching import deterministic, fp32, weights
from tests.runs.test_modalities import train

pytestmark = pytest.mark.run

STEPS = 4
SMALL = [
    f"run.total_steps={STEPS}", "run.save_every_steps=2", "run.log_every_steps=1", "run.health_every_steps=2",
    "lr.warmup_steps=1", "lr.peak=0.01", "objective.ema.anneal_steps=4", "objective.ema.start_decay=0.5",
    "model.block.width=32", "model.block.num_heads=2", "model.block.layer_scale=0.1",
    "model.block.attention_dropout=0.1", "model.shared_depth=2", "objective.drop_path=0.3",
    "objective.modalities.image.target.num_layers=2", "objective.modalities.image.loss.scale=0.03125",
    "data.image.global_batch_images=8", "data.image.micro_batch_images=4", "health.warm_up_steps=1000",
    "data.image.colour_jitter={brightness: 0.4, contrast: 0.4, saturation: 0.4}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    packed = folder / "packed"
    assert pack_images(["--input", str(folder), "--output", str(packed), "--workers", "1"]) == 0
    return packed


@pytest.fixture(scope="module")
def sharded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, ZeRO-3, fp32."""
    folder = tmp_path_factory.mktemp("sharded")
    train("data2vec1/image_tiny", folder / "run", [*SMALL, f"data.shards={shards}", fp32(3, folder)])
    return folder / "run"


def test_two_ranks_of_zero3_train_as_one_process(shards: Path, sharded: Path, tmp_path: Path) -> None:
    train("data2vec1/image_tiny", tmp_path / "one", [*SMALL, f"data.shards={shards}", fp32(0, tmp_path)], ranks=1)
    found, wanted = deterministic(sharded), deterministic(tmp_path / "one")
    assert len(found) == STEPS
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss/regression", "optim/grad_norm", "target/std", "mask/fraction", "optim/grad_norm/other"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert found[-1]["loss/regression"] < found[0]["loss/regression"]
    ours, theirs = weights(sharded, STEPS), weights(tmp_path / "one", STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=2e-4, err_msg=name)
    moved = ("relative.table", "attn.bias.queries", "attn.bias.values", "attention_scale.factors", "mask_vectors")
    before = weights(sharded, 2)
    for part in moved:
        names = [name for name in ours if part in name and name.startswith("student")]
        assert names and all((ours[name] != before[name]).any() for name in names), part


def test_a_resumed_run_goes_on_bit_for_bit(shards: Path, sharded: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(sharded, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step{STEPS:08d}")
    (run_dir / "checkpoints" / "latest").write_text("step00000002")
    said = train("data2vec1/image_tiny", run_dir, [*SMALL, f"data.shards={shards}", fp32(3, tmp_path)])
    assert "resumed at step 2" in said
    assert deterministic(run_dir) == deterministic(sharded)
    before, after = weights(sharded, STEPS), weights(run_dir, STEPS)
    assert all((before[name] == after[name]).all() for name in before)
