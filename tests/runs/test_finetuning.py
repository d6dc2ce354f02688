"""Whole fine-tuning runs: every ZeRO stage, any number of ranks, a frozen phase, stop and resume, faults."""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v2ds.decoding.beam import BeamConfig
from d2v2ds.decoding.ngram import train_ngram
from d2v2ds.distributed.checkpoint.format import iterate_student, named_tag, read_manifest
from d2v2ds.run.decoder_choice import DecoderChoice, read_choice, write_choice
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.export import export
from preprocessing.pack_audio import main as pack
from preprocessing.pack_images import main as pack_images
from tests.data.fake_images import photo
from tests.runs.launching import RATE, Processes, deterministic, fp32, rank_variables, records

pytestmark = pytest.mark.run

SMALL = (
    "model.block.width=32",
    "model.block.num_heads=2",
    "model.block.mlp_dropout=0.1",
    "model.shared_depth=2",
    "model.layer_drop=0.2",
    "model.modalities.audio.prenet_depth=1",
    "model.modalities.audio.conv_layers=[[16,10,5],[16,8,8],[16,4,4],[16,2,2]]",
    "data.audio.micro_batch_seconds=4",
    "data.audio.global_batch_seconds=16",
    "data.audio.max_seconds=4",
    "run.log_every_steps=1",
    "lr.warmup_steps=2",
    "lr.hold_steps=4",
    "objective.mask.channels.length=4",
    "objective.layer_decay=0.7",
)
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Recordings with transcripts to train on, and others."""
    folder = tmp_path_factory.mktemp("spoken")
    rng, words = np.random.default_rng(0), ("one", "two", "seven", "on")
    made = []
    for name, count in (("train", 24), ("other", 6)):
        lines = ["path\ttext"]
        for number in range(count):
            said = [words[int(i)] for i in rng.integers(len(words), size=rng.integers(1, 4))]
            tones = [np.sin(np.arange(RATE // 2) * (0.05 + 0.03 * words.index(word))) for word in said]
            sound = 0.3 * np.concatenate([*tones, np.zeros(int(rng.integers(1000, 9000)))])
            soundfile.write(folder / f"{name}{number}.wav", sound + 0.02 * rng.standard_normal(len(sound)), RATE)
            lines.append(f"{name}{number}.wav\t{' '.join(said)}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        made.append(folder / f"packed-{name}")
        given = ["--input", str(folder / f"{name}.tsv"), "--output", str(made[-1]), "--workers", "1"]
        assert pack(given) == 0
    return made[0], made[1]


def ranks_of(world: int, folders: Sequence[Path], run_dir: Path, *extra: str) -> Processes:
    """Start the ranks of a run. With a `fault=` among the extra arguments, `tests.runs.faulty` runs them."""
    words = ["--config", "finetune/ctc_tiny", f"data.shards={folders[0]}", f"valid.audio={folders[1]}"]
    words += [f"run.dir={run_dir}", f"run.total_steps={STEPS}", "run.save_every_steps=3", "valid.every_steps=3"]
    words += [*SMALL, *extra]
    module = "tests.runs.faulty" if any(one.startswith("fault=") for one in extra) else "d2v2ds.finetune"
    return Processes(module, words, rank_variables(world), run_dir.parent / f"{run_dir.name}-logs")


def finetune(world: int, folders: Sequence[Path], run_dir: Path, *extra: str) -> str:
    """Run to the end on forked ranks; returns what they printed."""
    with ranks_of(world, folders, run_dir, *extra) as ranks:
        codes = ranks.wait()
        printed = "".join(ranks.printed(rank) for rank in range(world))
    assert codes == [0] * world, printed[-5000:]
    return printed


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(iterate_student(run_dir / "checkpoints" / f"step{step:08d}"))


def losses(run_dir: Path) -> list[float]:
    return [record["loss/ctc"] for record in deterministic(run_dir)]


@pytest.fixture(scope="module")
def plain(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank at stage 0, frozen for two steps."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    finetune(1, folders, run_dir, fp32(0, run_dir.parent), "objective.freeze_steps=2")
    return run_dir


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (4, 2), (2, 3), (1, 3)])
def test_stages_and_ranks_give_the_same_losses(
    folders: tuple[Path, Path], plain: Path, tmp_path: Path, world: int, stage: int
) -> None:
    """Four micro-batches a step: accumulation is 4 on one rank and 1 on four."""
    printed = finetune(world, folders, tmp_path / "run", fp32(stage, tmp_path), "objective.freeze_steps=2")
    assert f"accumulation {4 // world}" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4)
    expected, found = weights(plain, STEPS), weights(tmp_path / "run", STEPS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)


def test_the_encoder_waits_and_the_head_learns(plain: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    finetune(1, folders, tmp_path / "run", fp32(0, tmp_path), "objective.freeze_steps=3")
    early, late, first = weights(tmp_path / "run", 3), weights(tmp_path / "run", STEPS), weights(plain, 3)
    assert torch.equal(early["trunk.encoders.audio.prenet.norm.weight"], torch.ones(32))
    assert not torch.equal(first["trunk.encoders.audio.prenet.norm.weight"], torch.ones(32)), (
        "one step after two frozen ones"
    )
    moved = {name for name in early if not torch.equal(early[name], late[name])}
    assert all("fixed" in name for name in early.keys() - moved)


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 2, 3), (2, 1, 1)])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    folders: tuple[Path, Path], tmp_path: Path, before: int, after: int, stage: int
) -> None:
    """The stop lies behind the frozen phase, so that the groups of the optimizer have counted different steps."""
    common = (fp32(stage, tmp_path), "objective.freeze_steps=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(before, folders, whole, *common)
    finetune(before, folders, parts, *common)
    for folder in (parts / "checkpoints").iterdir():
        if folder.name.startswith("step") and not folder.name.endswith("3"):
            for file in folder.rglob("*"):
                file.unlink()
            folder.rmdir()
    (parts / "checkpoints" / "latest").unlink(missing_ok=True)
    printed = finetune(after, folders, parts, *common)
    assert "resumed at step 3" in printed
    if before == after:
        assert deterministic(parts) == deterministic(whole)
        expected, found = weights(whole, STEPS), weights(parts, STEPS)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    else:
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_metrics_and_outputs_are_there(plain: Path) -> None:
    records = deterministic(plain)
    assert {"valid/ctc/wer", "valid/ctc/cer", "valid/loss/ctc"} <= records[2].keys()
    assert {"ctc/blank", "ctc/infeasible", "ctc/loss_per_letter"} <= records[0].keys()
    assert records[0]["ctc/infeasible"] == 0.0
    assert '"n"' in (plain / "outputs.json").read_text()
    assert '"sample_rate_hz": 16000' in (plain / "preprocessing.json").read_text()


def test_a_second_validation_set_has_metrics_of_its_own_and_chooses_the_best(
    folders: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    """The same folder twice gives the same numbers; training does not notice."""
    sets = [f"valid.more.again.audio={folders[1]}", "objective.select=[again/wer]"]
    printed = finetune(2, folders, tmp_path / "run", fp32(1, tmp_path), "objective.freeze_steps=2", *sets)
    records = deterministic(tmp_path / "run")
    first = {name[6:]: v for name, v in records[2].items() if name.startswith("valid/") and "again" not in name}
    again = {name[12:]: v for name, v in records[2].items() if name.startswith("valid/again/")}
    assert first == again and {"ctc/wer", "ctc/cer", "loss/ctc", "loss/total"} <= first.keys()
    assert "validation of again loss" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4)
    kept = read_manifest(tmp_path / "run" / "checkpoints" / f"step{STEPS:08d}")
    assert kept.validation_loss == records[-1]["valid/again/ctc/wer"]


def test_a_run_is_validated_with_a_language_model_and_evaluated_to_the_same_rate(
    folders: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    train_ngram(["one two", "seven on", "one", "two seven one"], tmp_path / "lm.arpa", order=2)
    choice = DecoderChoice(lm=tmp_path / "lm.arpa", beam=BeamConfig(lm_weight=0.5, word_score=3.0, beam=20))
    write_choice(tmp_path / "decoder.json", choice, {})
    more = [f"valid.decoder={tmp_path / 'decoder.json'}", "objective.select=[lm_wer]"]
    finetune(2, folders, tmp_path / "run", fp32(1, tmp_path), "objective.freeze_steps=2", *more)
    last = deterministic(tmp_path / "run")[-1]
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4), "training does not notice"
    assert last["valid/ctc/lm_decoded"] == 1.0 and last["valid/ctc/lm_seconds"] > 0
    assert last["valid/ctc/lm_wer"] != last["valid/ctc/wer"]
    tag = f"step{STEPS:08d}"
    assert read_manifest(tmp_path / "run" / "checkpoints" / tag).validation_loss == last["valid/ctc/lm_wer"]
    decoder = read_choice(tmp_path / "decoder.json")
    options = EvaluationOptions(shards=(folders[1],), to=tmp_path / "a", tag=tag, draws=10, decoder=decoder)
    found = evaluate(tmp_path / "run", options)
    assert found["beam"]["wer"]["value"] == pytest.approx(last["valid/ctc/lm_wer"])


def test_a_run_with_units_goes_on_is_exported_and_evaluated(folders: tuple[Path, Path], tmp_path: Path) -> None:
    common = (fp32(1, tmp_path), "objective.units=10")
    finetune(2, folders, tmp_path / "run", *common)
    kept = (tmp_path / "run" / "units.model").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step{STEPS:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").unlink(missing_ok=True)
    assert "resumed at step 3" in finetune(1, folders, tmp_path / "run", *common)
    assert (tmp_path / "run" / "units.model").read_bytes() == kept
    records = deterministic(tmp_path / "run")
    assert records[0]["ctc/unknown"] == 0.0 and {"valid/ctc/wer", "valid/ctc/cer"} <= records[2].keys()
    export(tmp_path / "run", tmp_path / "model", tag=f"step{STEPS:08d}")
    assert (tmp_path / "model" / "units.model").read_bytes() == kept
    results = [
        evaluate(source, EvaluationOptions(shards=(folders[1],), to=tmp_path / name, tag=tag, draws=10))
        for name, source, tag in (("a", tmp_path / "run", f"step{STEPS:08d}"), ("b", tmp_path / "model", None))
    ]
    assert results[0]["greedy"] == results[1]["greedy"]
    assert results[0]["greedy"]["wer"]["value"] == pytest.approx(records[-1]["valid/ctc/wer"])


@pytest.mark.parametrize("freeze", [r"trunk\.encoders\..*", r"trunk\.(encoders|blocks\.0)\..*"])
def test_parts_that_are_never_trained_hold_no_stage_up(folders: tuple[Path, Path], tmp_path: Path, freeze: str) -> None:
    """ZeRO-3 needs an input with gradient of the first block that trains."""
    for name, world, stage in (("whole", 1, 0), ("sharded", 2, 3)):
        finetune(world, folders, tmp_path / name, fp32(stage, tmp_path), f"objective.freeze=['{freeze}']")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    before, after = weights(tmp_path / "sharded", 3), weights(tmp_path / "sharded", STEPS)
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    assert "trunk.encoders.audio.prenet.norm.weight" in fixed
    assert "trunk.blocks.1.norm1.weight" not in fixed
    assert ("trunk.blocks.0.norm1.weight" in fixed) == ("blocks" in freeze)


def test_a_run_in_bf16_that_stops_inside_the_frozen_phase_goes_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    common = ("engine.deepspeed=zero3_bf16", "objective.freeze_steps=4")
    finetune(2, folders, tmp_path / "whole", *common)
    finetune(2, folders, tmp_path / "parts", *common)
    for folder in (tmp_path / "parts" / "checkpoints").glob(f"step{STEPS:08d}"):
        shutil.rmtree(folder)
    (tmp_path / "parts" / "checkpoints" / "latest").unlink(missing_ok=True)
    assert "resumed at step 3" in finetune(2, folders, tmp_path / "parts", *common)
    assert deterministic(tmp_path / "parts") == deterministic(tmp_path / "whole")


# ------------------------------------------------------------------ faults


BROKEN = ("engine.deepspeed=zero3_bf16", "objective.freeze_steps=3", "run.save_every_steps=2", "valid.every_steps=2")


@pytest.fixture(scope="module")
def unbroken(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks at stage 3 in bf16, frozen for three steps; a checkpoint lies inside that phase, others behind it."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finetune(2, folders, run_dir, *BROKEN)
    return run_dir


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Bit for bit: every record, validations too, and every weight."""
    assert deterministic(run_dir) == deterministic(unbroken)
    expected, found = weights(unbroken, STEPS), weights(run_dir, STEPS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "fault", ["kill_in_save,1,4", "kill_in_step,0,5", pytest.param("kill_in_save,0,4", marks=pytest.mark.slow)]
)
def test_one_rank_killed_resumes_to_the_unbroken_run(
    fault: str, folders: tuple[Path, Path], unbroken: Path, tmp_path: Path
) -> None:
    """Most resume inside the frozen phase."""
    run_dir, victim = tmp_path / "run", int(fault.split(",")[1])
    with ranks_of(2, folders, run_dir, *BROKEN, f"fault={fault}") as ranks:
        codes = ranks.wait()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, 75), "the survivor must notice"
    assert "resumed at step" in finetune(2, folders, run_dir, *BROKEN)
    assert_same_run(run_dir, unbroken)
    assert named_tag(run_dir / "checkpoints", "best") == named_tag(unbroken / "checkpoints", "best")


@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGTERM, [0, 1]), pytest.param(signal.SIGUSR1, [1], marks=pytest.mark.slow)]
)
def test_signalled_run_saves_within_a_step_and_goes_on(
    number: signal.Signals, whom: list[int], folders: tuple[Path, Path], unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with ranks_of(2, folders, run_dir, *BROKEN, "run.save_every_steps=100") as ranks:
        ranks.until(lambda: records(run_dir) >= 2)
        for rank in whom:
            ranks.processes[rank].send_signal(number)
        at_signal = records(run_dir)
        assert ranks.wait() == [75, 75], ranks.printed(0)[-3000:]
        said = ranks.printed(0)
    stopped_at = records(run_dir)
    assert stopped_at <= at_signal + 1, "at most the step under way is finished"
    assert f"step {stopped_at}: stopped by" in said and f"{number.name} to rank 1" in said
    assert named_tag(run_dir / "checkpoints", "latest") == f"step{stopped_at:08d}"
    finetune(2, folders, run_dir, *BROKEN)
    assert_same_run(run_dir, unbroken)


@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 1)), pytest.param((1, 0), (4, 2), marks=pytest.mark.slow)])
def test_signalled_run_goes_on_with_other_ranks_and_stages(
    before: tuple[int, int], after: tuple[int, int], folders: tuple[Path, Path], plain: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (world, stage), (other_world, other_stage) = before, after
    with ranks_of(world, folders, run_dir, fp32(stage, tmp_path), "objective.freeze_steps=2") as ranks:
        ranks.until(lambda: records(run_dir) >= 2)
        ranks.processes[-1].send_signal(signal.SIGTERM)
        assert ranks.wait() == [75] * world, ranks.printed(0)[-3000:]
    finetune(other_world, folders, run_dir, fp32(other_stage, tmp_path), "objective.freeze_steps=2")
    assert losses(run_dir) == pytest.approx(losses(plain), rel=1e-4)
    expected, found = weights(plain, STEPS), weights(run_dir, STEPS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)


def test_run_that_goes_back_into_the_frozen_phase_is_the_run_that_resumes_there(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Moments and step counts that the encoder had gained after that phase are gone, as in a fresh process."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = ("engine.deepspeed=zero3_bf16", "objective.freeze_steps=4", "health.max_nonfinite_steps=4")
    extra += ("run.total_steps=9", "health.warm_up_steps=0", "objective.vocabulary=['|',o,n,e,t,w,v]")
    with ranks_of(2, folders, whole, *extra, "fault=poison,1,6") as ranks:
        assert ranks.wait() == [0, 0], ranks.printed(0)[-3000:]
        assert "went back from step 9 to step 3" in ranks.printed(0)
        for shared in ("vocabulary lacks", "letters are not in the vocabulary", "skipped: gradient is not finite (1"):
            assert [ranks.printed(rank).count(shared) for rank in (0, 1)] == [1, 0], "all ranks see it, one logs it"
    with ranks_of(2, folders, killed, *extra, "fault=kill_in_return,1,6") as ranks:
        assert ranks.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    assert "resumed at step 3" in finetune(2, folders, killed, *extra)
    assert deterministic(killed) == deterministic(whole)
    expected, found = weights(whole, 9), weights(killed, 9)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        kind = folder / "in" / "ab"[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(40, 36, number)).save(kind / f"{number}.png")
    assert pack_images(["--input", str(folder / "in"), "--output", str(folder / "packed"), "--workers", "1"]) == 0
    return folder / "packed"


def test_augmented_images_are_the_same_after_a_resume_and_on_other_ranks(pictures: Path, tmp_path: Path) -> None:
    """RandAugment, erasing and mixing; the first stop lies inside an epoch."""
    words = ["--config", "finetune/image_classify_tiny", f"data.shards={pictures}", "lr.warmup_steps=2"]
    words += ["model.block.width=32", "model.block.num_heads=2", "model.shared_depth=2", "data.num_workers=1"]
    words += ["data.image.global_batch_images=8", "data.image.micro_batch_images=4", "data.image.rand_augment={}"]
    words += ["objective.erasing={}", "run.log_every_steps=1", "run.save_every_steps=2"]

    def run(world: int, name: str, steps: int) -> list[dict[str, float]]:
        given = [*words, f"run.dir={tmp_path / name}", f"run.total_steps={steps}", fp32(0, tmp_path)]
        with Processes("d2v2ds.finetune", given, rank_variables(world), tmp_path / f"{name}-logs") as ranks:
            assert ranks.wait() == [0] * world, ranks.printed(0)[-5000:]
        return deterministic(tmp_path / name)

    whole = run(2, "whole", 5)
    run(2, "parts", 5)
    for step in (4, 5):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step{step:08d}", ignore_errors=True)
    (tmp_path / "parts" / "checkpoints" / "latest").unlink(missing_ok=True)
    assert run(2, "parts", 5) == whole
    expected, found = weights(tmp_path / "whole", 5), weights(tmp_path / "parts", 5)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    alone = [record["loss/cross_entropy"] for record in run(1, "alone", 5)]
    assert alone == pytest.approx([record["loss/cross_entropy"] for record in whole], rel=1e-4)
