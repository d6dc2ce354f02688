"""Begin a run with given weights in place of drawn ones. Each rank reads only what it holds."""

from collections.abc import Callable

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from d2v2ds.distributed import zero
from d2v2ds.distributed.teacher import Teacher

Source = Callable[[str], Tensor | None]
"""Parameter name -> its whole value in any floating type, best mapped from a file; None where there is none."""


@torch.no_grad()
def set_initial_weights(
    engine: DeepSpeedEngine, teacher: Teacher | None, student_source: Source, teacher_source: Source
) -> None:
    """Overwrite the fp32 master of the student and the averages of the teacher. Collective.

    What a source does not have stays as it is in the student; in the teacher it becomes a copy of the student.

    Args:
        engine: before its first step, at any ZeRO stage.
        teacher: of the same; None without one.
        student_source: weights of the student.
        teacher_source: weights of the teacher.

    Raises:
        ValueError: if a source has another shape than the parameter.
    """
    _fill(zero.parameter_shards(engine), student_source)
    zero.refresh_compute_copies(engine)
    if teacher is None:
        return
    teacher.reset()
    _fill(teacher.shards(), teacher_source)
    teacher.after_restore(num_updates=0)


def _fill(shards: dict[str, zero.Shard], source: Source) -> None:
    for name, shard in shards.items():
        whole = source(name)
        if whole is None:
            continue
        if tuple(whole.shape) != shard.shape:
            raise ValueError(f"{name}: expected shape {shard.shape}, found {tuple(whole.shape)}")
        shard.data.copy_(whole.reshape(-1)[shard.offset : shard.offset + shard.numel])
