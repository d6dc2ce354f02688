"""Files of a checkpoint whose header a stranger has written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2v2ds.distributed.checkpoint.format import _pieces_of
from d2v2ds.errors import CheckpointError


@pytest.mark.parametrize("offsets", ["[" * 100_000, '{"a": Infinity}', '{"a": [0]}', "[0]"])
def test_offsets_of_a_stranger_are_a_damaged_checkpoint(offsets: str, tmp_path: Path) -> None:
    file = tmp_path / "master.rank00000.safetensors"
    save_file({"a": torch.zeros(2)}, file, {"offsets": offsets})
    with pytest.raises(CheckpointError, match="damaged, no flat pieces with their offsets"):
        _pieces_of(file)
