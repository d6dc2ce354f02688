"""Stop and resume, damage, other numbers of ranks, and reading checkpoints without DeepSpeed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v2ds.distributed import comm, zero
from d2v2ds.distributed.checkpoint import load as checkpoint
from d2v2ds.distributed.checkpoint.format import (
    finished_tags,
    iterate_student,
    iterate_teacher,
    named_tag,
    read_manifest,
    read_plain,
)
from d2v2ds.distributed.checkpoint.keep import KEEP_ALL, Keep
from d2v2ds.distributed.checkpoint.save import Saver
from d2v2ds.distributed.engine import optimizer_step
from d2v2ds.distributed.teacher import Teacher
from d2v2ds.errors import CheckpointError
from d2v2ds.io import durable
from d2v2ds.io import tensor_file as tensorfile
from tests.distributed import toy
from tests.distributed.engine_state import whole_masters
from tests.ranks import RankError, run_distributed

pytestmark = pytest.mark.distributed

CONFIGS = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")]


def start(stage: int, dtype: str) -> tuple[Any, Teacher]:
    engine = toy.build(stage, dtype, accumulation=2)
    return engine, Teacher(toy.Encoder(), engine)


def train(engine: Any, teacher: Teacher, first: int, last: int) -> list[float]:
    """Steps `first` to `last - 1`; a random number and the teacher's output enter each loss."""
    losses = []
    for step in range(first, last):
        for micro in range(2):
            inputs, target = toy.micro_batch(step, micro, comm.rank())
            target = target + 0.1 * random.random() + 0.1 * torch.randn(()) + 0.01 * engine.module.shift.sum()
            hint = teacher(torch.ones(4, toy.WIDTH, dtype=zero.compute_dtype(engine))).float().mean()
            losses.append(toy.backward(engine, inputs, target + hint, 16))
            optimizer_step(engine)
        engine.module.shift.add_(0.125)
        teacher.update(0.9)
    return losses


def everything(engine: Any, teacher: Teacher) -> list[torch.Tensor]:
    """Every number of this rank that training goes on from."""
    tensors = [shard.data.clone() for shard in zero.parameter_shards(engine).values()]
    tensors += [shard.data.clone() for shard in teacher.shards().values()]
    keys, scalars = zero.optimizer_layout(engine)
    for key in keys:
        tensors += [moment.clone() for moment in zero.optimizer_tensors(engine, key).values()]
    tensors += [torch.tensor(scalar["value"]) for scalar in scalars.values()]
    tensors.append(torch.tensor([engine.global_steps, engine.micro_steps, teacher.num_updates]))
    return tensors


def save(
    engine: Any,
    teacher: Teacher,
    folder: Path,
    tag: str,
    state: dict[str, Any] | None = None,
    keep: Keep = KEEP_ALL,
    needed: Collection[str] = (),
) -> None:
    """Write one checkpoint and wait for it."""
    outcome = Saver(engine, teacher, folder, keep, False, lambda: needed).save(tag, state or {})
    assert outcome is not None
    if outcome.fault:
        raise CheckpointError(outcome.fault)


def resume(stage: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Six steps at once; then three, stop, load into a new engine, three more."""
    torch.manual_seed(50 + comm.rank())
    random.seed(50 + comm.rank())
    engine, teacher = start(stage, dtype)
    train(engine, teacher, 0, 3)
    save(engine, teacher, folder, "step3", {"position": 3})
    random_state = torch.get_rng_state(), random.getstate()
    averages, masters = teacher.full_state_dict(), whole_masters(engine)
    unbroken = train(engine, teacher, 3, 6)
    end = everything(engine, teacher)
    engine.destroy()
    torch.manual_seed(0)
    random.seed(0)
    engine, teacher = start(stage, dtype)
    train(engine, teacher, 0, 1)  # what was there before must not shine through
    restored = checkpoint.load(engine, teacher, folder)
    torch.set_rng_state(random_state[0])
    random.setstate(random_state[1])
    resumed = train(engine, teacher, 3, 6)
    same = [torch.equal(a, b) for a, b in zip(end, everything(engine, teacher), strict=True)]
    engine.destroy()
    return {
        "losses_equal": all(comm.gather_objects(unbroken == resumed and len(set(resumed)) > 1)),
        "state_equal": all(comm.gather_objects(all(same))),
        "tensors": len(same),
        "client": restored.client_state,
        "averages": averages,
        "masters": masters,
    }


def refusals(folder: Path) -> dict[str, str]:
    """What save and load say to wrong use; all ranks raise, none hangs."""
    seen = {}
    engine, teacher = start(3, "bf16")
    with pytest.raises(CheckpointError) as nothing:
        checkpoint.load(engine, teacher, folder / "nowhere")
    seen["nothing"] = str(nothing.value)
    with pytest.raises(ValueError, match="plain containers"):
        save(engine, teacher, folder / "odd", "x", {"path": Path("/")})
    train(engine, teacher, 0, 1)
    for step in (1, 2, 3):
        save(engine, teacher, folder / "pruned", f"step{step}", keep=Keep(last=2))
        save(engine, teacher, folder / "needed", f"step{step}", keep=Keep(last=1), needed=["step1"])
        train(engine, teacher, step, step + 1)
    with pytest.raises(CheckpointError) as declined:
        checkpoint.load(engine, teacher, folder / "pruned", accept=lambda state: False)
    seen["declined"] = str(declined.value)
    seen["other format"] = of_another_format(engine, teacher, folder / "pruned" / "step3" / "manifest.json")
    if comm.rank() == 1:  # a disk that fills up on one rank
        tensorfile._write_and_sync = _full_disk
    with pytest.raises(CheckpointError) as full:
        save(engine, teacher, folder / "pruned", "step4")
    seen["full disk"] = str(full.value)
    with pytest.raises(CheckpointError, match="rank 0: "):  # the folder's name is taken by a file
        save(engine, teacher, folder / "pruned" / "latest", "step4")
    toy.backward(engine, *toy.micro_batch(0, 0, comm.rank()), 16)
    optimizer_step(engine)
    with pytest.raises(ValueError, match="between the micro-batches"):
        save(engine, teacher, folder / "odd", "x")
    engine.destroy()
    return seen


def of_another_format(engine: Any, teacher: Teacher, manifest: Path) -> str:
    """The newest checkpoint is one of a later version; the one before it could be read."""
    text = manifest.read_text()
    comm.barrier()
    if comm.rank() == 0:
        manifest.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    comm.barrier()
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(engine, teacher, manifest.parents[1])
    comm.barrier()
    if comm.rank() == 0:
        manifest.write_text(text)
    return str(refused.value)


def _full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def save_all(folder: Path) -> dict[Any, Any]:
    seen: dict[Any, Any] = {c: resume(*c, folder / f"{c[0]}-{c[1]}") for c in CONFIGS}
    seen["refusals"] = refusals(folder)
    return seen


def killed_in_save(folder: Path, moment: str) -> None:
    """Save once, train on, and lose rank 1 in the middle of the second save."""
    engine, teacher = start(3, "bf16")
    train(engine, teacher, 0, 1)
    save(engine, teacher, folder, "step1")
    train(engine, teacher, 1, 2)
    victim = 1 if moment == "shards" else 0

    def die(*args: Any, **kwargs: Any) -> None:
        if comm.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "shards":
        tensorfile._write_and_sync = die
    else:
        durable.replace_text = die  # all files are there, only `latest` is not moved
    save(engine, teacher, folder, "step2")


def read_on_one_rank(folder: Path, damaged: Path, killed: Path) -> dict[str, Any]:
    """Loads that need no second rank: another world size, another stage, damage, a killed save."""
    seen: dict[str, Any] = {}
    for stage, dtype in [(3, "bf16"), (1, "bf16"), (0, "fp32")]:
        engine, teacher = start(stage, dtype)
        checkpoint.load(engine, teacher, folder / "3-bf16")
        moments = zero.optimizer_tensors(engine, "exp_avg")["blocks.1.up.weight"].clone()
        seen["resharded", stage] = {
            "masters": whole_masters(engine),
            "averages": teacher.full_state_dict(),
            "moment": moments,
            "step": zero.optimizer_layout(engine)[1]["step"]["value"],
            "loss": train(engine, teacher, 3, 4)[0],
        }
        engine.destroy()
    engine, teacher = start(3, "bf16")
    warnings = warnings_of_loading()
    seen["damaged"] = checkpoint.load(engine, teacher, damaged).tag
    seen["warnings"] = list(warnings)
    seen["killed"] = {name: checkpoint.load(engine, teacher, killed / name).tag for name in KILLS}
    engine.destroy()
    torch.manual_seed(7)
    model = toy.Student(depth=2)
    model.head = torch.nn.Linear(toy.WIDTH, 6, bias=False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    other = checkpoint_engine(model, optimizer)
    with pytest.raises(CheckpointError) as model_error:
        checkpoint.load(other, None, folder / "3-bf16")
    seen["other model"] = str(model_error.value)
    return seen


def warnings_of_loading() -> list[str]:
    """A list that the warnings of `load` in this process go to."""
    messages: list[str] = []
    checkpoint.logger.warning = lambda text, *values: messages.append(text % values)  # type: ignore[method-assign]
    return messages


def checkpoint_engine(model: Any, optimizer: Any) -> Any:
    from d2v2ds.distributed.engine import build_student_engine

    return build_student_engine(model, optimizer, toy.ds_config(3, "bf16"))


KILLS = ("shards", "latest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[Any, Any]:
    return run_distributed(save_all, 2, folder)[0]


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, str]:
    errors = {}
    for moment in KILLS:
        with pytest.raises(RankError) as error:
            run_distributed(killed_in_save, 2, folder / "killed" / moment, moment)
        errors[moment] = str(error.value)
    return errors


@pytest.fixture(scope="module")
def read(folder: Path, saved: dict[Any, Any], killed: dict[str, str]) -> dict[str, Any]:
    """A second, newer checkpoint whose teacher file lost a byte in the middle, then everything on one rank."""
    damaged = folder / "damaged"
    shutil.copytree(folder / "3-bf16" / "step3", damaged / "step3")
    shutil.copytree(folder / "3-bf16" / "step3", damaged / "step9")
    file = damaged / "step9" / "teacher.rank00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    manifest = read_manifest(damaged / "step9")
    newer = replace(manifest, counters=manifest.counters | {"global_steps": 9})
    (damaged / "step9" / "manifest.json").write_text(newer.to_json())
    (damaged / "latest").write_text("step9")
    return run_distributed(read_on_one_rank, 1, folder, damaged, folder / "killed")[0]


each_config = pytest.mark.parametrize("config", CONFIGS, ids=[f"stage{s}-{d}" for s, d in CONFIGS])


@each_config
def test_resume_matches_uninterrupted_run_bit_for_bit(saved: dict, config: tuple[int, str]) -> None:
    seen = saved[config]
    assert seen["losses_equal"] and seen["state_equal"]
    assert seen["tensors"] > 60
    assert seen["client"] == {"position": 3}


@each_config
def test_whole_tensors_are_read_without_a_process_group(saved: dict, folder: Path, config: tuple[int, str]) -> None:
    path = folder / f"{config[0]}-{config[1]}" / "step3"
    student, teacher = dict(iterate_student(path)), dict(iterate_teacher(path))
    masters, averages = saved[config]["masters"], saved[config]["averages"]
    assert student.keys() == masters.keys() | {"shift"}
    assert all(torch.equal(student[name], masters[name].float()) for name in masters)
    assert teacher.keys() == averages.keys()
    assert all(torch.equal(teacher[name], averages[name].float()) for name in averages)


def test_reading_needs_no_deepspeed(saved: dict, folder: Path) -> None:
    program = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path; from d2v2ds.distributed.checkpoint.format import iterate_teacher\n"
        "print(sum(1 for _ in iterate_teacher(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(folder / "3-bf16" / "step3")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == len(saved[3, "bf16"]["averages"])


@pytest.mark.parametrize("stage", [3, 1, 0])
def test_two_ranks_of_stage_3_load_on_one_rank_of_any_stage(saved: dict, read: dict, stage: int) -> None:
    before, after = saved[3, "bf16"], read["resharded", stage]
    names = [name for name in before["masters"] if name != "frozen"]
    assert all(torch.equal(before["masters"][name], after["masters"][name]) for name in names)
    assert all(torch.equal(before["averages"][name], after["averages"][name]) for name in before["averages"])
    assert torch.equal(after["moment"].view(-1), read["resharded", 0]["moment"].view(-1))
    assert after["moment"].abs().max() > 0
    assert after["step"] == 3


def test_damaged_checkpoint_falls_back_to_the_one_before(read: dict) -> None:
    assert read["damaged"] == "step3"
    (warning,) = read["warnings"]
    assert (
        "step9 is damaged, trying the one before: " in warning and "teacher.rank00001.safetensors: damaged" in warning
    )


def damaged_while_read_ahead(folder: Path) -> dict[str, Any]:
    """Two checkpoints, a byte of the newer one changed, then as a run starts again."""
    engine, teacher = start(3, "bf16")
    for step in (1, 2):
        train(engine, teacher, step, step + 1)
        save(engine, teacher, folder, f"step{step}")
        if step == 1:
            before = everything(engine, teacher)
    engine.destroy()
    file = folder / "step2" / "optimizer.exp_avg_sq.rank00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    messages = warnings_of_loading()
    with checkpoint.reading_ahead(folder):
        engine, teacher = start(3, "bf16")
    tag = checkpoint.load(engine, teacher, folder).tag
    same = [torch.equal(a, b) for a, b in zip(before, everything(engine, teacher), strict=True)]
    return {"tag": tag, "messages": messages, "same": all(same)}


def test_damage_in_what_was_read_ahead_is_named_and_the_checkpoint_before_taken(tmp_path: Path) -> None:
    seen = run_distributed(damaged_while_read_ahead, 1, tmp_path)[0]
    assert seen["tag"] == "step1" and seen["same"]
    (message,) = seen["messages"]
    assert "step2 is damaged" in message and "optimizer.exp_avg_sq.rank00000.safetensors: damaged" in message


def test_this_ranks_files_of_the_newest_checkpoint_are_read_ahead_in_the_order_of_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimizer.exp_avg.rank00001", "student.rank00001", "student.rank00000", "teacher.rank00001"):
        for tag in ("step1", "step2"):
            (tmp_path / tag).mkdir(exist_ok=True)
            (tmp_path / tag / f"{name}.safetensors").write_bytes(b"content")
    (tmp_path / "latest").write_text("step2")
    opened: list[Path] = []
    reading = Path.open

    def noted(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            opened.append(path)
        return reading(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noted)
    monkeypatch.setattr(comm, "rank", lambda: 1)
    checkpoint._read_and_forget(tmp_path, threading.Event())
    names = ["student", "teacher", "optimizer.exp_avg"]
    assert opened == [tmp_path / "step2" / f"{name}.rank00001.safetensors" for name in names]


@pytest.mark.parametrize("latest", [None, b"step1", b"\xff\xfe", b"a\0b"])
def test_reading_ahead_leaves_what_is_wrong_to_the_reading(tmp_path: Path, latest: bytes | None) -> None:
    if latest is not None:
        (tmp_path / "latest").write_bytes(latest)
    checkpoint._read_and_forget(tmp_path, threading.Event())
    checkpoint._read_and_forget(tmp_path / "nowhere", threading.Event())


def test_reading_ahead_ends_with_what_it_runs_beside(tmp_path: Path) -> None:
    (tmp_path / "step1").mkdir()
    (tmp_path / "latest").write_text("step1")
    with (tmp_path / "step1" / "student.rank00000.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # without end, as far as this test goes; takes no room
    with checkpoint.reading_ahead(tmp_path):
        pass
    assert "read ahead" not in [thread.name for thread in threading.enumerate()]


def test_rank_killed_while_saving_leaves_the_old_checkpoint(folder: Path, killed: dict, read: dict) -> None:
    assert "SIGKILL" in killed["shards"]
    assert named_tag(folder / "killed" / "shards", "latest") == "step1"
    assert finished_tags(folder / "killed" / "shards") == ["step1"]
    assert named_tag(folder / "killed" / "latest", "latest") == "step1"
    assert read["killed"] == {"shards": "step1", "latest": "step1"}


def test_other_model_is_refused_with_names(read: dict) -> None:
    assert "blocks.2.norm.weight: only in the checkpoint" in read["other model"]
    assert "head.weight: checkpoint [5, 13], this model [6, 13]" in read["other model"]


def test_missing_checkpoint_and_full_disk_are_errors_on_every_rank(saved: dict) -> None:
    assert "no usable checkpoint" in saved["refusals"]["nothing"]
    assert "rank 1: [Errno 28] No space left" in saved["refusals"]["full disk"]


def test_checkpoints_that_were_not_accepted_are_not_called_damaged(saved: dict) -> None:
    assert "no usable checkpoint (0 damaged, 2 not accepted)" in saved["refusals"]["declined"]


def test_newest_checkpoint_of_another_format_is_refused_and_no_older_one_taken(saved: dict) -> None:
    assert "step3/manifest.json: expected checkpoint format 1, found 2" in saved["refusals"]["other format"]


def test_only_the_newest_are_kept(saved: dict, folder: Path) -> None:
    assert finished_tags(folder / "pruned") == ["step3", "step2"]
    assert finished_tags(folder / "needed") == ["step3", "step1"]
    assert read_manifest(folder / "pruned" / "step3").counters["global_steps"] == 3


class _Evil:
    """Unpickling it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_checkpoint_from_others_is_not_run(tmp_path: Path) -> None:
    torch.save({"step": _Evil(tmp_path / "trace")}, tmp_path / "client.pt")
    with pytest.raises(CheckpointError, match="expected plain values, refused to read anything else"):
        read_plain(tmp_path / "client.pt")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "client.pt", weights_only=False)
    assert (tmp_path / "trace").exists(), "the file was harmless, this proves nothing"
