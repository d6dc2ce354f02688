"""Memory of weights, optimizer and teacher that a rank really holds; `dist.memory` says what it should be."""

from deepspeed import DeepSpeedEngine
from torch import Tensor

from d2v2ds.distributed import zero
from d2v2ds.distributed.teacher import Teacher


def held_bytes(engine: DeepSpeedEngine, teacher: Teacher | None) -> dict[str, int]:
    """Bytes of the tensors that this rank holds now, by the same purposes; memory seen twice is counted once."""
    tensors = zero.held_tensors(engine) | ({} if teacher is None else teacher.held_tensors())
    seen: set[int] = set()
    return {purpose: sum(_new_bytes(t, seen) for t in held) for purpose, held in tensors.items()}


def _new_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
