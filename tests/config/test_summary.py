"""What a configuration amounts to, in words that can be read at every size."""

import re

import pytest

from d2v2ds.config.__main__ import main
from d2v2ds.config.load import load_config
from d2v2ds.config.summary import summary


def line_of(name: str, beginning: str, *overrides: str, world: int = 1) -> str:
    (line,) = [line for line in summary(load_config(name, overrides), world) if line.startswith(beginning)]
    return line


def test_offload_names_everything_that_leaves_the_device() -> None:
    """The average lies where the master does, accumulated gradients where Adam is (DeepSpeed)."""
    offload = "engine.deepspeed=zero3_bf16_offload"
    said = line_of("audio_large", "of it", offload)
    assert said.startswith("of it master, optimizer, gradients and teacher_average, ")
    held = line_of("audio_large", "memory", offload)
    found = re.findall(r"(\w+) ([\d.]+) (GiB|MiB)", held)
    parts = {name: float(size) / {"GiB": 1, "MiB": 1024}[unit] for name, size, unit in found}
    on_host = sum(parts[name] for name in ("master", "optimizer", "gradients", "teacher_average"))
    assert float(re.findall(r"([\d.]+) GiB", said)[0]) == pytest.approx(on_host, abs=0.02)
    assert not [line for line in summary(load_config("audio_large"), 1) if "host" in line]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("audio_tiny", r"audio: 8 seconds of audio per step, 1\.111 hours of audio in all; .* 8 masks of "),
        ("audio_large", r"audio: 960 seconds of audio per step, 160,000 hours of audio in all; .* 12 masks of "),
        ("multimodal_tiny", r"text: 4,096 tokens per step, 2,048,000 tokens in all; .* 2 masks of "),
        ("image_base", r"image: 256 images per step, 96,076,800 images in all; .* 16 masks of "),
    ],
)
def test_amounts_have_the_unit_of_their_size(name: str, expected: str) -> None:
    assert re.match(expected, line_of(name, expected.split(":")[0]))


def test_a_short_run_is_told_in_minutes() -> None:
    said = line_of("audio_tiny", "audio", "run.total_steps=50", "lr.warmup_steps=5")
    assert "8 seconds of audio per step, 6.667 minutes of audio in all" in said


@pytest.mark.parametrize(
    ("name", "unit"),
    [("audio_tiny", "GFLOP"), ("image_tiny", "GFLOP"), ("text_tiny", "GFLOP"), ("image_huge14", "PFLOP")],
)
def test_operations_have_the_unit_of_their_size(name: str, unit: str) -> None:
    found = re.match(r"operations: ([\d.,]+) (\w+) per step", line_of(name, "operations"))
    assert found is not None
    assert found[2] == unit
    assert 1 <= float(found[1].replace(",", "")) < 1000


def test_memory_has_the_unit_of_its_size() -> None:
    said = line_of("text_tiny", "memory", world=64)
    sizes = re.findall(r"([\d.]+) (MiB|GiB)", said)
    assert len(sizes) > 6, said
    assert all(float(size) > 0 for size, _ in sizes)
    assert " GiB (weights 601.8 MiB, master 1.174 GiB" in line_of("audio_large", "memory")


def test_masks_that_cannot_be_drawn_are_named_by_their_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image_tiny", "objective.modalities.image.mask.block_length=99"]) == 2
    said = capsys.readouterr().err
    assert "objective.modalities.image.mask: " in said
    assert "cannot hold a block of length 99" in said
