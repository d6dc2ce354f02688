"""The head of a safetensors file, for those who write the tensors themselves: piece by piece, or with a checksum.

The library's format: 8 bytes length of the header, the header (JSON, padded to a multiple of 8), the tensors one after
another.
"""

import json
import math
import struct
from collections.abc import Mapping

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""Types by the names that stand in headers."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def make_header(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the first tensor, and where in the file each tensor begins, in that order.

    Args:
        layout: type and shape of every tensor by its name; wide types come first, which keeps all of them aligned.
        metadata: stored beside them.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begins[name], end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + begin for name, begin in begins.items()}
