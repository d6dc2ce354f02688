"""Step, loop, validation and checkpoints know nothing of data2vec 2.0: an objective without masks and teacher runs."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from d2v2ds.distributed import comm
from d2v2ds.distributed.checkpoint.format import iterate_student, iterate_teacher
from d2v2ds.errors import CheckpointError, PreemptedError
from d2v2ds.io.lock import FolderLock
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.protocol import Objective
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.prepare import open_held_out, open_streams, prepare
from d2v2ds.run.pretraining import start, train
from tests.objectives.plain import WANTED, Plain
from tests.ranks import run_distributed
from tests.runs.launching import SMALL, deterministic, pack_clips

pytestmark = pytest.mark.distributed

STEPS, STOP_AFTER = 4, 2
JSON = {0: "zero0_fp32_debug", 3: "zero3_bf16"}


class Stopping(Plain):
    """Asks the run to stop, as a signal would, after some updates."""

    def __init__(self, trunk: TrunkConfig, stop: StopRequest) -> None:
        super().__init__(trunk)
        self._stop = stop

    def after_step(self, step_number: int) -> None:
        super().after_step(step_number)
        if step_number == STOP_AFTER:
            self._stop.received = signal.SIGUSR1


def run(overrides: list[str], run_dir: Path, *, is_stopped: bool = False) -> list[int]:
    """Start the run, or go on with it; returns the updates after which the objective was called."""
    prepared = prepare("audio_tiny", [*overrides, f"run.dir={run_dir}"], world=comm.world())
    config = prepared.config
    with StopRequest() as stop:
        plain = Stopping(config.model, stop) if is_stopped else Plain(config.model)
        objective: Objective = plain
        streams, faults = open_streams(config, objective)
        held_out, more_faults = open_held_out(config, objective)
        assert faults + more_faults == []
        prepared = replace(prepared, objective=objective, streams=streams, held_out=held_out)
        checkpoints = start(prepared, "audio_tiny", allow_grown=False, lock=FolderLock(run_dir / "lock"))
        assert checkpoints.teacher is None
        train(prepared, checkpoints, stop)
    return plain.updates


def whole_and_resumed(overrides: list[str], folder: Path) -> tuple[list[int], list[int]]:
    """The same run without a break, and stopped and taken up again."""
    whole = run(overrides, folder / "whole")
    with pytest.raises(PreemptedError, match=f"step {STOP_AFTER}: stopped by SIGUSR1"):
        run(overrides, folder / "resumed", is_stopped=True)
    return whole, run(overrides, folder / "resumed")


@pytest.fixture(scope="module", params=[0, 3])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole` and `resumed` of one rank at a ZeRO stage."""
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    overrides = [
        *SMALL, f"data.shards={pack_clips(folder / 'clips')}", f"valid.audio={pack_clips(folder / 'others')}",
        f"engine.deepspeed={JSON[request.param]}", "data.num_workers=0", f"run.total_steps={STEPS}", "lr.peak=0.02",
        "lr.warmup_steps=1", "valid.every_steps=2", "valid.micro_batches=3",
    ]  # fmt: skip
    ((whole, resumed),) = run_distributed(whole_and_resumed, 1, overrides, folder)
    assert whole == list(range(1, STEPS + 1)), "once after each applied step"
    assert resumed == list(range(STOP_AFTER + 1, STEPS + 1))
    return folder


def test_it_trains_and_is_validated(runs: Path) -> None:
    records = deterministic(runs / "whole")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["loss/square"] < records[0]["loss/square"]
    assert records[0]["output/mean"] < records[-1]["output/mean"] < WANTED
    parts = [value**2 for name, value in records[0].items() if name.startswith("optim/grad_norm/")]
    assert sum(parts) == pytest.approx(records[0]["optim/grad_norm"] ** 2, rel=1e-5)
    assert records[0]["optim/grad_norm/head"] > 0
    validated = {record["step"]: record for record in records if "valid/loss/total" in record}
    assert list(validated) == [2, 4]
    assert all(record["valid/loss/square"] == record["valid/loss/total"] for record in validated.values())
    assert validated[4]["valid/loss/square"] < validated[2]["valid/loss/square"]


def test_it_has_no_metric_of_data2vec(runs: Path) -> None:
    names = {name.removeprefix("valid/") for record in deterministic(runs / "whole") for name in record}
    rooms = {name.partition("/")[0] for name in names}
    assert rooms == {"step", "loss", "output", "optim", "data"}


def test_its_checkpoints_hold_a_trunk_and_a_head_and_no_teacher(runs: Path) -> None:
    folder = runs / "whole" / "checkpoints" / f"step{STEPS:08d}"
    assert {name.partition(".")[0] for name, _ in iterate_student(folder)} == {"trunk", "head"}
    with pytest.raises(CheckpointError, match="this checkpoint has no teacher"):
        next(iterate_teacher(folder))


def test_it_resumes_bit_for_bit(runs: Path) -> None:
    whole, resumed = deterministic(runs / "whole"), deterministic(runs / "resumed")
    assert resumed == whole
    expected, found = (
        dict(iterate_student(runs / name / "checkpoints" / f"step{STEPS:08d}")) for name in ("whole", "resumed")
    )
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
