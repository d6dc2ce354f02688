"""Steps of batches: the same for any number of workers, resumable, dealt out to ranks, and hard to kill."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.loader import DataStream, LoaderConfig, build_loader
from d2v2ds.data.order import BatchPlan, SamplerState
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.audio.reader import AudioReader
from tests.data.fake_audio import FakeAudio, FakeNetwork, fake_config, fake_reader

MASK = MaskConfig(masked_fraction=0.5, adjust=0.05, block_length=3, num_masks=2)
NUM_ROWS = 40


def make_plan(source):
    return BatchPlan(source.sizes, config=fake_reader(source, MASK).plan_config(), seed=5)


def open_loader(num_workers=0, rank=0, world=1, state=None, source=None):
    source = source or FakeAudio(NUM_ROWS)
    return build_loader(
        {"audio": DataStream(fake_reader(source, MASK), make_plan(source))},
        state=state or {"audio": SamplerState()},
        rank=rank,
        world=world,
        config=LoaderConfig(num_workers=num_workers, prefetch_factor=2),
    )


def steps(count, **options):
    with closing(open_loader(**options)) as loader:
        return list(islice(loader, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.state_after == b.state_after
        assert [x.loss_weight for x in a.micro] == [x.loss_weight for x in b.micro]
        for x, y in zip(a.micro, b.micro, strict=True):
            assert torch.equal(x.ids, y.ids) and x.faults == y.faults
            assert torch.equal(x.source, y.source)
            assert torch.equal(x.masks.keep, y.masks.keep) and torch.equal(x.masks.masked, y.masks.masked)


def test_steps_follow_the_plan():
    source = FakeAudio(NUM_ROWS)
    for step, expected in zip(steps(30), make_plan(source).iter_from(SamplerState()), strict=False):
        assert step.state_after == {"audio": expected.state_after}
        assert [m.ids.tolist() for m in step.micro] == [m.rows.tolist() for m in expected.micro]
        assert [m.source.shape[1] for m in step.micro] == [m.size for m in expected.micro]
    assert step.state_after["audio"].epoch >= 2, "epochs follow each other without a seam"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    assert_same(steps(8, num_workers=num_workers), steps(8))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 1)])
def test_resume_continues_although_workers_read_ahead(before, after):
    unbroken = steps(9)
    first = steps(4, num_workers=before)
    assert_same([*first, *steps(5, num_workers=after, state=first[-1].state_after)], unbroken)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_together_see_what_one_rank_sees(world):
    alone = steps(4)
    ranks = [steps(4, rank=rank, world=world) for rank in range(world)]
    for i, step in enumerate(alone):
        assert {rank[i].state_after["audio"] for rank in ranks} == {step.state_after["audio"]}
        assert {len(rank[i].micro) for rank in ranks} == {make_plan(FakeAudio(1)).config.accumulation(world)}
        together = [m for rank in ranks for m in rank[i].micro if m.loss_weight > 0]
        assert sum(m.num_masked for m in together) == sum(m.num_masked for m in step.micro)
        drawn = {tuple(m.ids.tolist()): m for m in together}
        for micro in step.micro:
            assert torch.equal(micro.source, drawn[tuple(micro.ids.tolist())].source)
            assert torch.equal(micro.masks.masked, drawn[tuple(micro.ids.tolist())].masks.masked)


def test_a_loader_leaves_the_generator_of_the_model_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(2)
    assert torch.equal(torch.get_rng_state(), before)


class DamagedAudio(FakeAudio):
    def read_audio(self, index, start=0, stop=None):
        raise ShardError(f"shard audio-00000.arrow row {index}: does not decode")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_type_and_message(num_workers):
    with pytest.raises(ShardError, match="audio-00000.arrow row"):
        steps(1, num_workers=num_workers, source=DamagedAudio(NUM_ROWS))


class SpottedAudio(FakeAudio):
    def read_audio(self, index, start=0, stop=None):
        if index % 5 == 0:
            raise ShardError(f"shard audio-00000.arrow row {index}: changed")
        return super().read_audio(index, start, stop)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_left_out_are_reported_through_workers(num_workers):
    source = SpottedAudio(NUM_ROWS)
    found = steps(6, num_workers=num_workers, source=source)
    assert_same(found, steps(6, source=source))
    for step, expected in zip(found, make_plan(source).iter_from(SamplerState()), strict=False):
        for batch, micro in zip(step.micro, expected.micro, strict=True):
            bad = [row for row in micro.rows.tolist() if row % 5 == 0]
            assert batch.faults == tuple(f"shard audio-00000.arrow row {row}: changed" for row in bad)
            left = [row for row in micro.rows.tolist() if row % 5]
            assert batch.ids.tolist() == left if left else batch.loss_weight == 0.0
    assert any(batch.faults for step in found for batch in step.micro)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_every_row_left_out_is_reported_by_one_rank(world):
    source = SpottedAudio(NUM_ROWS)
    alone = steps(3, source=source)
    ranks = [steps(3, rank=rank, world=world, source=source) for rank in range(world)]
    for i, step in enumerate(alone):
        expected = sorted(fault for batch in step.micro for fault in batch.faults)
        assert sorted(fault for rank in ranks for batch in rank[i].micro for fault in batch.faults) == expected


def test_a_closed_loader_says_so():
    loader = open_loader()
    next(loader)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2)])
def test_a_rank_outside_the_world_is_refused(rank, world):
    with pytest.raises(ValueError, match="rank must lie in"):
        open_loader(rank=rank, world=world)


@pytest.mark.parametrize("fields", [{"num_workers": -1}, {"prefetch_factor": 0}])
def test_worker_counts_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LoaderConfig(**fields).check()


# ---- processes ----


def run_script(tmp_path, body, timeout_s=60):
    """Run a program that reads with two workers, as a training job would: exit code, stdout, stderr."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from itertools import islice
        from pathlib import Path
        from d2v2ds.data.workers import JOB_SIGNALS
        from tests.data.test_loader import DamagedAudio, descendants, open_loader

        def main():
        {body}

        if __name__ == "__main__":
            main()
        """
    ).replace("{body}", textwrap.indent(textwrap.dedent(body), "    "))
    root = Path(__file__).parents[2]
    with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:  # a pipe would wait for orphans
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=out,
            stderr=err,
            timeout=timeout_s,
        )
        out.seek(0), err.seek(0)
        return result.returncode, out.read(), err.read()


@pytest.mark.run
def test_workers_do_not_import_the_program_that_starts_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "print('imported as', __name__, flush=True)\n"
        "from tests.data.test_loader import steps\n"
        "if __name__ == '__main__':\n"
        "    assert steps(1, num_workers=2)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["imported as __main__"]


def descendants(process):
    """Process numbers of all children and their children."""
    children = [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(d for child in children for d in descendants(child))]


@pytest.mark.run
def test_workers_outlive_the_signals_of_a_job(tmp_path):
    """Every process below the training process gets every signal; then it reads on."""
    code, out, err = run_script(
        tmp_path,
        """
        loader = open_loader(num_workers=2)
        next(loader)
        below = descendants(os.getpid())
        assert len(below) >= 3, below
        for number in JOB_SIGNALS:
            for process in below:
                os.kill(process, number)
        time.sleep(6)  # longer than the interval in which workers look for their parent
        states = [Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] for process in below]
        assert "Z" not in states, f"one of them was ended: {states}"
        for _ in range(20):
            next(loader)
        assert set(below) <= set(descendants(os.getpid())), "all of them live"
        loader.close()
        print("read on")
        """,
    )
    assert (code, out) == (0, "read on\n"), err


@pytest.mark.run
@pytest.mark.parametrize(
    ("ending", "expected"),
    [("raise SystemExit(3)", 3), ("next(open_loader(num_workers=1, source=DamagedAudio(40)))", 1)],
    ids=["loader left open", "error while reading"],
)
def test_a_program_that_does_not_close_its_loaders_ends(tmp_path, ending, expected):
    code, _, err = run_script(
        tmp_path,
        f"""
        global loader
        loader = open_loader(num_workers=2)
        next(loader)
        {ending}
        """,
    )
    assert code == expected, err
    assert ("does not decode" in err) == (expected == 1)


@pytest.mark.run
def test_workers_end_with_a_killed_training_process(tmp_path):
    code, out, err = run_script(
        tmp_path,
        """
        loader = open_loader(num_workers=2)
        next(loader)
        print(*descendants(os.getpid()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert code == -signal.SIGKILL, err
    processes = [int(n) for n in out.split()]
    assert len(processes) >= 3
    deadline = time.monotonic() + 20
    while (alive := [n for n in processes if is_alive(n)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        os.kill(process, signal.SIGKILL)
    assert not alive, f"processes left behind: {alive}"


def is_alive(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---- several modalities ----


class OtherReader(AudioReader):
    modality = "other"


def joint_streams():
    """Two modalities with global batches of different sizes."""
    streams = {}
    for name, kind, seconds in (("audio", AudioReader, 20.0), ("other", OtherReader, 8.0)):
        source = FakeAudio(NUM_ROWS, seed=len(name))
        reader = kind(JoinedShards([source]), fake_config(global_batch_seconds=seconds), FakeNetwork(), MASK)
        streams[name] = DataStream(reader, BatchPlan(reader.sizes, config=reader.plan_config(), seed=5))
    return streams


def joint_steps(count, streams, rank=0, world=1, state=None):
    state = state or {name: SamplerState() for name in streams}
    config = LoaderConfig(num_workers=0)
    with closing(build_loader(streams, state=state, rank=rank, world=world, config=config)) as loader:
        return list(islice(loader, count))


def test_modalities_come_in_one_order_and_each_as_if_it_were_alone():
    streams = joint_streams()
    together = joint_steps(6, streams)
    assert {tuple(m.modality for m in step.micro) for step in together} == {("audio",) * 5 + ("other",) * 2}
    for name in streams:
        alone = joint_steps(6, {name: streams[name]})
        for both, one in zip(together, alone, strict=True):
            assert both.state_after[name] == one.state_after[name]
            own = [m for m in both.micro if m.modality == name]
            assert all(torch.equal(a.source, b.source) for a, b in zip(own, one.micro, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_runs_the_same_modalities_in_the_same_places(world):
    orders = {tuple(m.modality for m in joint_steps(1, joint_streams(), rank, world)[0].micro) for rank in range(world)}
    assert len(orders) == 1


def test_each_modality_resumes_at_its_own_position():
    streams = joint_streams()
    unbroken = joint_steps(7, streams)
    assert_same(joint_steps(3, streams, state=unbroken[3].state_after), unbroken[4:])
