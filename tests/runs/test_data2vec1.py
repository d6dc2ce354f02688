"""data2vec 1.0 of speech and text as whole runs: sharding changes nothing, and an export goes on as fine-tuning."""

import shutil
from pathlib import Path

import pytest

from d2v2ds.run.export import export
from tests.runs.launching import Processes, deterministic, fp32, pack_clips, rank_variables, weights

STEPS = 6
SMALL = [
    "model.block.width=32",
    "model.block.mlp_dropout=0.1",
    "model.shared_depth=3",
    "model.layer_drop=0.2",
    "model.modalities.audio.conv_layers=[[16,10,5],[16,8,8],[16,4,4],[16,2,2]]",
    "objective.modalities.audio.target.num_layers=2",
    "objective.modalities.audio.mask.length=4",
    "objective.modalities.audio.copied=[positions]",
    "objective.ema.anneal_steps=6",
    "objective.ema.start_decay=0.9",
    "data.audio.global_batch_seconds=6",
    "data.audio.micro_batch_seconds=1.5",
    "data.audio.max_seconds=1.5",
    f"run.total_steps={STEPS}",
    "run.save_every_steps=3",
    "run.log_every_steps=1",
    "run.health_every_steps=3",
    "lr.warmup_steps=2",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_clips(tmp_path_factory.mktemp("clips"))


def train(shards: Path, run_dir: Path, ranks: int, *extra: str) -> str:
    """Run to the end on forked ranks; returns what rank 0 printed."""
    arguments = ["--config", "data2vec1/audio_tiny", f"data.shards={shards}", f"run.dir={run_dir}", *SMALL, *extra]
    with Processes("d2v2ds.pretrain", arguments, rank_variables(ranks), run_dir.parent / f"{run_dir.name}-logs") as run:
        assert run.wait() == [0] * ranks, run.printed(0)[-5000:]
        return run.printed(0)


@pytest.mark.run
@pytest.mark.parametrize("per_micro_batch", ["false", "true"])
def test_two_ranks_of_zero3_train_as_one_rank_and_go_on_after_a_break(
    per_micro_batch: str, clips: Path, tmp_path: Path
) -> None:
    """With layer drop, dropout, copied position convolutions and accumulation: of 4 on one rank, of 2 on two."""
    extra = [f"objective.ema_per_micro_batch={per_micro_batch}"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert "accumulation 4" in train(clips, one, 1, fp32(0, tmp_path), *extra)
    fewer = per_micro_batch == "true"  # twice as many updates of the teacher on one rank: another run, as it should be
    assert "accumulation 2" in train(clips, two, 2, fp32(3, tmp_path), *extra)
    for a, b in zip(deterministic(one), deterministic(two), strict=True):
        assert a["mask/fraction"] == b["mask/fraction"]
        if fewer and a["step"] > 1:
            continue
        assert b["loss/regression"] == pytest.approx(a["loss/regression"], rel=1e-5)
        assert b["optim/grad_norm"] == pytest.approx(a["optim/grad_norm"], rel=1e-4)
    expected, found = weights(one, STEPS), weights(two, STEPS)
    assert expected.keys() == found.keys()
    same = all((expected[name] - found[name]).abs().max() < 2e-4 for name in expected)
    assert same != fewer
    copied = [name for name in found if name.startswith("teacher ") and ".positions." in name]
    assert copied
    assert all((found[name] == found[name.replace("teacher ", "student ")]).all() for name in copied)
    again = tmp_path / "again"
    shutil.copytree(two, again)
    shutil.rmtree(again / "checkpoints" / f"step{STEPS:08d}")
    (again / "checkpoints" / "latest").write_text("step00000003")
    assert "resumed at step 3" in train(clips, again, 2, fp32(3, tmp_path), *extra)
    assert deterministic(again) == deterministic(two)
    resumed = weights(again, STEPS)
    assert all((resumed[name] == found[name]).all() for name in found)


@pytest.mark.run
def test_an_export_begins_another_run_and_a_fine_tuning(clips: Path, tmp_path: Path) -> None:
    """A warm start has the exported weights, head and mask vector among them, and its teacher those of the export."""
    first, model, warm = tmp_path / "first", tmp_path / "model", tmp_path / "warm"
    train(clips, first, 1, fp32(0, tmp_path))
    export(first, model, teacher=True)
    assert "data2vec 1.0 encoder (arXiv 2202.03555)" in (model / "README.md").read_text()
    frozen = ["lr.peak=0", "objective.ema.start_decay=1", "objective.ema.end_decay=1", f"init.weights={model}"]
    said = train(clips, warm, 1, fp32(0, tmp_path), *frozen, "run.total_steps=3")
    assert "drawn anew" not in said
    assert "no teacher" not in said
    expected, found = weights(first, STEPS), weights(warm, 3)
    assert expected.keys() == found.keys()
    assert any("mask_vectors.audio" in name for name in found)
    assert all((expected[name] == found[name]).all() for name in expected)
