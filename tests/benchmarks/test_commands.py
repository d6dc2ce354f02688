"""Every benchmark runs at a small size, started as its first lines say; its numbers are for people, not for tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

COMMANDS = {
    "checkpoints": ("--config audio_tiny --seconds 1 --repeats 1 --folder {folder}", ["save", "load"]),
    "downloading": ("--mib 1 --rounds 1", ["curl, then sha256", "download"]),
    "ema": ("--million 13", ["share", "goal 80 %"]),
    "extracting": ("--configs audio_tiny image_tiny --inputs 3 --repeats 1", ["audio_tiny", "image_tiny"]),
    "finetuning": (
        "--step finetune/ctc_tiny --evaluate finetune/ctc_tiny --seconds 2 --utterances 4 --repeats 1",
        ["step", "evaluation", "greedy", "beam"],
    ),
    "onnx_speed": ("--config image_tiny --batch 1", ["int8"]),
    "packing": ("--hours 0.02 --rounds 1", ["bare soundfile decode", "1 worker / bare decode", "2 workers / 1 worker"]),
    "packing_images": ("--images 6 --rounds 1", ["copy into one file", "packing, 2 workers", "decode / 1 worker"]),
    "packing_text": ("--megabytes 0.1 --rounds 1", ["sentencepiece  paragraphs", "bpe            JSON lines"]),
    "position": ("--folder {folder} --rows 200000 --shards 20", ["first"]),
    "reading": (
        "--clips 7 --repeats 1 --steps 3",
        ["pcm16: shard to batch with masks", "flac: soundfile decoding", "masks: 96 rows"],
    ),
    "reading_images": (
        "--images 2 --repeats 1",
        ["500 x 375", "bare decode + crop", "without draft", "RandAugment takes"],
    ),
    "reading_text": ("--rows 64 --rounds 1", ["np.copyto, cached", "TextReader.read"]),
    "rivals": ("--groups tiny --batch 1 --repeats 1", ["data2vec1/image_tiny", "mae/tiny", "M 1"]),
    "zero": ("--config audio_tiny --seconds 1 --steps 1 --stages zero3_bf16", ["zero3_bf16"]),
}
"""Arguments, and what the table says. `step` has a test of its own; `resume` needs a run of before."""


def test_every_benchmark_is_run() -> None:
    names = {path.stem for path in HERE.glob("*.py")} - {"__init__", "test_commands", "test_step_benchmark"}
    assert names == {*COMMANDS, "step", "resume"}


@pytest.mark.run
@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_prints_its_table(name: str, tmp_path: Path) -> None:
    arguments, rows = COMMANDS[name]
    if name == "onnx_speed":
        pytest.importorskip("onnxruntime")
    documented = re.search(
        r"^    (?:OMP_\w+=1 )?(.*?benchmarks[./]\w+(?:\.py)?)", (HERE / f"{name}.py").read_text(), re.M
    )
    assert documented is not None
    launcher, *rest = documented[1].split()
    started = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[launcher]
    # as a user has it: no path of ours, nothing left by a launcher
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [*started, *rest, *arguments.format(folder=tmp_path).split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in rows:
        assert row in done.stdout, done.stdout
