"""Seconds from the start of a process to its first step after a resume: the framework's own start-up, and ours.

    torchrun --nproc_per_node=2 tests/benchmarks/resume.py --config audio_large data.shards=DIR run.dir=DIR ...

The run must have a checkpoint and steps left. Framework: importing torch and DeepSpeed, joining the process group, and
`deepspeed.initialize` of student and teacher. Ours is everything else until the first step begins, part by part. What
of ours runs beside the framework (reading ahead) shows in the whole, which counts.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

began = time.perf_counter()
import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the first torch optimizer would import it, or else `deepspeed.initialize`)

imported = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds import pretrain  # noqa: E402
from d2v2ds.distributed import comm  # noqa: E402
from d2v2ds.run import pretraining  # noqa: E402
from d2v2ds.train import loop  # noqa: E402

FRAMEWORK = ("import torch and deepspeed", "process group", "deepspeed.initialize")


class FirstStepError(Exception):
    """The first step is about to begin: nothing more to measure."""


def main() -> None:
    """Wrap the stations of `pretrain`, run to the first step, and print the table on rank 0."""
    spent: dict[str, float] = {FRAMEWORK[0]: imported - began, "import d2v2ds": time.perf_counter() - imported}

    def time_calls(owner: Any, name: str, label: str, less: tuple[str, ...] = ()) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, nested = time.perf_counter(), sum(spent.get(one, 0.0) for one in less)
            result = inner(*args, **kwargs)
            own = time.perf_counter() - start - (sum(spent.get(one, 0.0) for one in less) - nested)
            spent[label] = spent.get(label, 0.0) + own
            return result

        setattr(owner, name, timed)

    def first_step(*args: Any, **kwargs: Any) -> Any:
        raise FirstStepError

    time_calls(deepspeed, "initialize", FRAMEWORK[2])
    time_calls(comm, "initialise", FRAMEWORK[1])
    time_calls(pretraining, "prepare", "configuration and data")
    time_calls(pretraining, "build_engines", "model, first weights, teacher", less=(FRAMEWORK[2],))
    time_calls(pretraining.Checkpoints, "resume", "reading the checkpoint")
    time_calls(pretraining.provenance, "write", "provenance")
    loop.train_step = first_step
    with suppress(FirstStepError):
        pretrain.main(sys.argv[1:])
    total = time.perf_counter() - began
    framework = sum(spent[name] for name in FRAMEWORK)
    if int(os.environ.get("RANK", "0")) == 0:
        spent["loader, first batch and the rest"] = total - sum(spent.values())
        for name, seconds in spent.items():
            print(f"{seconds:7.2f} s  {'framework' if name in FRAMEWORK else 'ours':9}  {name}")
        print(f"{total:7.2f} s in all, {total - framework:.2f} s beyond the framework's own start-up")


if __name__ == "__main__":
    main()
