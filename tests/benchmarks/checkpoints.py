"""What checkpoints cost: the stall of training, and saving and loading against the disk itself, in one run.

    torchrun --nproc_per_node=2 tests/benchmarks/checkpoints.py --config audio_large --seconds 5 --folder DIR

The yardsticks are measured in the same run on the same disk: a training step (median), and every rank writing (and
syncing) or reading (from a cold cache) as many files of as many bytes with plain system calls. `first` is the first
asynchronous save, which allocates its host memory; later ones reuse it. `meanwhile` is a step during which the files
are written.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.config.load import load_config
from d2v2ds.distributed import comm
from d2v2ds.distributed.checkpoint import load as checkpoint
from d2v2ds.distributed.checkpoint.format import read_manifest
from d2v2ds.distributed.checkpoint.save import Saver
from d2v2ds.distributed.ds_config import load_ds_config
from d2v2ds.distributed.engine import gradient_sum_factor, optimizer_step, set_lr
from d2v2ds.run.machine import tune_cpu
from d2v2ds.train.step import total_loss
from tests.benchmarks.zero import build, make_batch

BLOCK = 4 << 20


def timed(action: Callable[[], object]) -> float:
    """Seconds until every rank is done."""
    comm.barrier()
    start = time.perf_counter()
    action()
    comm.barrier()
    return time.perf_counter() - start


def raw_write(path: Path, num_files: int, num_bytes: int) -> None:
    """This rank's share of a checkpoint, from memory, in equal files, synced."""
    block = memoryview(os.urandom(BLOCK))
    for number in range(num_files):
        descriptor = os.open(path / f"{comm.rank()}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        left = num_bytes // num_files
        while left:
            left -= os.write(descriptor, block[: min(left, BLOCK)])
        os.fsync(descriptor)
        os.close(descriptor)


def raw_read(path: Path) -> None:
    """The same files, into one buffer."""
    buffer = bytearray(BLOCK)
    for file in sorted(path.glob(f"{comm.rank()}.*")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def drop_from_cache(path: Path) -> None:
    """So that reading means the disk."""
    if comm.rank() == 0:
        for file in path.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    """Print the table on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="audio_large")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the clip on each rank")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; emptied")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config, folder = load_config(options.config, options.overrides), options.folder
    with comm.process_group():
        if comm.device().type == "cpu":
            tune_cpu(comm.world())
        objective, student, teacher, _ = build(config, load_ds_config(config.engine.deepspeed))
        batch = make_batch(config, options.seconds).to(comm.device())
        factor = gradient_sum_factor(student) / comm.all_reduce_sum([batch.num_masked])[0]

        def step() -> None:
            set_lr(student, lambda scale: 1e-5)
            student.backward(total_loss(objective.losses(student, batch, 0)) * factor)
            optimizer_step(student)
            teacher.update(0.999)

        def say(text: str) -> None:
            if comm.rank() == 0:
                print(text, flush=True)

        step()
        step_s = statistics.median(timed(step) for _ in range(options.repeats))
        say(f"{options.config}, {comm.world()} ranks on {comm.device().type}, {config.engine.deepspeed}: "
            f"step {step_s:.2f} s")  # fmt: skip

        saver = Saver(student, teacher, folder / "async")
        for number in range(options.repeats):
            stall = timed(lambda: saver.save(f"step{number}", {}))  # noqa: B023
            meanwhile = timed(step)
            waited = timed(saver.finish)
            name = "first" if number == 0 else "later"
            say(f"save, {name}: stall {stall:.3f} s = {stall / step_s:.1%} of a step; next step {meanwhile:.2f} s "
                f"({meanwhile / step_s:.2f} x), then {waited:.2f} s more until it was on disk")  # fmt: skip

        saving = Saver(student, teacher, folder / "sync", asynchronous=False)
        saves, writes, loads, reads = [], [], [], []
        for number in range(options.repeats):
            saves.append(timed(lambda: saving.save(f"step{number}", {})))  # noqa: B023
            path = folder / "sync" / f"step{number}"
            manifest = read_manifest(path)
            mine = [r["bytes"] for n, r in manifest.files.items() if f"rank{comm.rank():05d}" in n]
            raw = folder / f"raw{number}"
            raw.mkdir(parents=True, exist_ok=True)
            writes.append(timed(lambda: raw_write(raw, len(mine), sum(mine))))  # noqa: B023
            drop_from_cache(path)
            loads.append(timed(lambda: checkpoint.load(student, teacher, folder / "sync")))
            drop_from_cache(raw)
            reads.append(timed(lambda: raw_read(raw)))  # noqa: B023
            comm.barrier()
            if comm.rank() == 0:
                shutil.rmtree(raw)
                shutil.rmtree(path)
        gb = comm.all_reduce_sum([sum(mine)])[0] / 1e9
        for name, ours, plain in (("save", saves, writes), ("load", loads, reads)):
            own_s, raw_s = statistics.median(ours), statistics.median(plain)
            say(f"{name}: {gb:.2f} GB in {own_s:.2f} s, {gb / own_s:.2f} GB/s; plain {raw_s:.2f} s, "
                f"{gb / raw_s:.2f} GB/s; ratio {raw_s / own_s:.2f}")  # fmt: skip
        if comm.rank() == 0:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
