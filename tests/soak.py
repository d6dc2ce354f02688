"""Train 500 steps with saves, validations and rollbacks, and see that nothing grows.

    make soak        (or python -m tests.soak [--steps 500])

Resident memory, open files, threads, child processes, files in /dev/shm and the size of the run's folder, less the logs
that grow by design, are read while the run goes on. After step 100 the highest value of the last fifth may be at most
2 % above the highest of the first two.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTLED_STEP = 100
TOLERANCE = 0.02
POISON_EVERY, POISONED = 90, 3
GROWING = ("metrics.jsonl", "log.txt", "tensorboard", "rollbacks.jsonl", "bad_batches.jsonl")
"""What a run writes line by line."""


def child(arguments: list[str]) -> int:
    """Run pretraining of which every `POISON_EVERY` steps a few have infinite inputs."""
    import torch

    import d2v2ds.pretrain
    from d2v2ds.train import loop

    inner, calls = loop.train_step, 0

    def poisoned(engine: Any, objective: Any, micro: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % POISON_EVERY < POISONED and calls >= POISON_EVERY:
            for batch in micro:
                batch.source.fill_(torch.inf)
        return inner(engine, objective, micro, **kwargs)

    loop.train_step = poisoned
    return d2v2ds.pretrain.main(arguments)


def usage(process: int, run_dir: Path) -> dict[str, int]:
    """What a process and its children hold now."""
    tree = [process, *children(process)]
    found = dict.fromkeys(("resident KiB", "open files", "threads"), 0)
    for one in tree:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
            found["open files"] += len(list(Path(f"/proc/{one}/fd").iterdir()))
            found["resident KiB"] += int(status.get("VmRSS", "0 kB").split()[0])
            found["threads"] += int(status.get("Threads", "0"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    found["processes"] = len(tree)
    found["in /dev/shm"] = len(list(Path("/dev/shm").iterdir()))
    kept = [file for file in run_dir.rglob("*") if not set(file.relative_to(run_dir).parts) & set(GROWING)]
    found["disk KiB"] = sum(file.stat().st_size for file in kept if file.is_file()) >> 10
    return found


def children(process: int) -> list[int]:
    """Descendants of a process."""
    try:
        own = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for one in own for found in (int(one), *children(int(one)))]


def grown(samples: list[tuple[int, Mapping[str, int]]]) -> list[str]:
    """Compare the last fifth of the samples after `SETTLED_STEP` with the first two; return what grew."""
    settled = [found for step, found in samples if step >= SETTLED_STEP]
    part = max(1, len(settled) // 5)
    faults = []
    for name in settled[0]:
        first, last = (max(found[name] for found in group) for group in (settled[: 2 * part], settled[-part:]))
        line = f"{name}: {first:,} after step {SETTLED_STEP}, {last:,} at the end"
        print(line)
        if last > first * (1 + TOLERANCE):
            faults.append(f"{line}, more than {TOLERANCE:.0%} above")
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Run and compare; returns 1 if something grew."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["child"]:
        return child(words[1:])
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args(words).steps
    from tests.runs.launching import arguments_of, environment, pack_clips, records

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shards, held_out, run_dir = pack_clips(work / "clips"), pack_clips(work / "more"), work / "run"
        run = [
            f"run.total_steps={steps}", "run.save_every_steps=10", "run.keep_checkpoints=2", f"valid.audio={held_out}",
            "valid.every_steps=20", "valid.micro_batches=2", f"health.max_nonfinite_steps={POISONED}",
            "health.max_rollbacks=9", "run.health_every_steps=20", "data.num_workers=2",
        ]  # fmt: skip
        samples: list[tuple[int, Mapping[str, int]]] = []
        with (work / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak", "child", *arguments_of(shards, run_dir, *run)],
                env=environment(), stdout=said, stderr=said,
            )  # fmt: skip
            while process.poll() is None:
                time.sleep(0.25)
                samples.append((records(run_dir), usage(process.pid, run_dir)))
        printed = (work / "said").read_text()
        if process.returncode != 0:
            print(printed[-3000:])
            return 1
        live = [sample for sample in samples if sample[1]["processes"] > 1]
        print(f"{steps} steps, {printed.count('went back from step')} rollbacks, {len(live)} samples")
        faults = grown(live)
    for fault in faults:
        print(f"GROWN: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
