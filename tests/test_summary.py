"""What a configuration amounts to, in words that can be read at every size."""

import re

import pytest

from d2v2ds.config import load_config, main
from d2v2ds.summary import summary


def line_of(name: str, beginning: str, *overrides: str, world: int = 1) -> str:
    (line,) = [line for line in summary(load_config(name, overrides), world) if line.startswith(beginning)]
    return line


def test_offload_names_everything_that_leaves_the_device() -> None:
    """The average lies where the master does (`dist/teacher.py`), accumulated gradients where Adam is (DeepSpeed)."""
    offload = "engine.deepspeed=zero3_bf16_offload"
    said = line_of("audio_large", "of it", offload)
    assert said.startswith("of it master, optimizer, gradients and teacher_average, ")
    held = line_of("audio_large", "memory", offload)
    parts = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", held.split("(stage 3): ")[1])}
    on_host = sum(parts[name] for name in ("master", "optimizer", "gradients", "teacher_average"))
    assert float(re.findall(r"([\d.]+) GiB", said)[0]) == pytest.approx(on_host, abs=0.02)
    assert not [line for line in summary(load_config("audio_large"), 1) if "host" in line]


def test_masks_that_cannot_be_drawn_are_named_by_their_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image_tiny", "data.image.mask.block_length=99"]) == 2
    said = capsys.readouterr().err
    assert "data.image.mask" in said
    assert "cannot hold a block of length 99" in said
