"""A run that waits for data notices signals, dead workers, lost batches and full shared memory."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from d2v2ds.batch import Batch
from d2v2ds.data import loader as loader_module
from d2v2ds.data import workers
from d2v2ds.data.loader import DataStream, LoaderConfig, StepLoader, WaitEndedError, build_loader
from d2v2ds.data.order import SamplerState
from d2v2ds.errors import MachineError
from tests.data.fake_audio import FakeAudio, fake_reader
from tests.data.test_loader import MASK, NUM_ROWS, assert_same, make_plan, steps
from tests.environment.shim import can_mount


class NeverAudio(FakeAudio):
    """A file system that hangs: reading takes for ever, or ends the process."""

    def __init__(self, action: str) -> None:
        super().__init__(NUM_ROWS)
        self.action = action

    def read_audio(self, index, start=0, stop=None):
        if self.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def waiting(action: str, *, max_wait_s: float = 60.0, is_stopping=lambda: False) -> StepLoader:
    source = NeverAudio(action)
    return build_loader(
        {"audio": DataStream(fake_reader(source, MASK), make_plan(source))},
        state={"audio": SamplerState()},
        rank=0,
        world=1,
        config=LoaderConfig(num_workers=1, max_wait_s=max_wait_s),
        is_stopping=is_stopping,
    )


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(loader_module, "POLL_S", 0.2)


@pytest.mark.run
def test_a_hanging_file_system_ends_the_wait_at_its_limit(monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "WARN_S", 0.3)
    with (
        closing(waiting("hang", max_wait_s=1.0)) as loader,
        pytest.raises(MachineError, match="no data came .* for 1 s"),
    ):
        next(loader)
    assert caplog.text.count("waiting for the data workers up to 1 s") == 1


@pytest.mark.run
def test_a_signal_ends_the_wait():
    asked = iter([False, False, True])
    with closing(waiting("hang", is_stopping=lambda: next(asked))) as loader, pytest.raises(WaitEndedError):
        next(loader)


@pytest.mark.run
def test_a_dead_worker_ends_the_wait():
    with closing(waiting("die")) as loader, pytest.raises(MachineError, match="exited unexpectedly.*memory runs out"):
        next(loader)


def test_without_shared_memory_batches_go_by_value(monkeypatch, caplog):
    batch = Batch(modality="audio", source=torch.ones(2, 3), ids=torch.zeros(2, dtype=torch.int64))
    before = dict(ForkingPickler._extra_reducers)

    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    try:
        assert workers.shared(batch).source.is_shared()
        monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
        fresh = Batch(modality="audio", source=torch.ones(2, 3), ids=torch.zeros(2, dtype=torch.int64))
        sent = ForkingPickler.dumps(workers.shared(fresh))
        assert not fresh.source.is_shared()
        assert torch.equal(ForkingPickler.loads(sent).source, torch.ones(2, 3))
        assert "batches go through pipes" in caplog.text
    finally:
        ForkingPickler._extra_reducers.clear()
        ForkingPickler._extra_reducers.update(before)


def test_another_error_of_sharing_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(RuntimeError, match="something else"):
        workers.shared(Batch(modality="audio", source=torch.ones(2, 3), ids=torch.zeros(2, dtype=torch.int64)))


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import d2v2ds.data.loader
from tests.data.test_loader import steps, assert_same
import os
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 98304
if __name__ == "__main__":
    assert_same(steps(4, num_workers=2), steps(4, num_workers=0))
    print("the same")
"""


@pytest.mark.run
@pytest.mark.skipif(not can_mount(), reason="no right to mount a small /dev/shm")
def test_a_small_dev_shm_changes_no_batch(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(CODE)
    root = str(Path(__file__).parents[2])
    mount = 'mount -t tmpfs -o size=96k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, str(script), root],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert done.stdout == "the same\n", done.stderr[-3000:]
    assert "batches go through pipes" in done.stderr


@pytest.mark.run
def test_polling_changes_nothing():
    assert_same(steps(5, num_workers=2), steps(5))
