"""How fast `d2v2ds.extract` goes through a packed folder, against a bare forward of the same model.

    python -m tests.benchmarks.extracting [--configs audio_base image_base text_base] [--inputs 48] [--dtype bfloat16]

Synthetic inputs and random weights: clips of 5 to 15 s, photographs of 500 x 375, blocks of 512 tokens. A bare forward
runs `Trunk.layers` up to the same layer on inputs of one size that are in memory already (10 s, 224 pixels, 512
tokens), with each of several batch sizes; the best counts. One process, all cores, pooled features of two layers.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from d2v2ds.config.load import load_config
from d2v2ds.inference.extraction import Extraction
from d2v2ds.inference.extraction_options import DTYPES, PART_TOKENS, Options
from d2v2ds.modalities.known import open_shards
from d2v2ds.model.trunk import Trunk
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.benchmarks.packing_text import python_reference
from tests.interop.folders import write_folder

RATE = 16_000
BATCH_SIZES = (1, 2, 4, 8, 16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["audio_base", "image_base", "text_base"])
    parser.add_argument("--inputs", type=int, default=48, help="clips, photographs or blocks (count)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="of both; the fastest counts")
    options = parser.parse_args(arguments)
    header = f"{'model':<14}{'unit':<9}{'extract/s':>12}{'bare/s':>12}{'batch':>7}{'ratio':>8}   goal 0.9\n"
    sys.stdout.write(header)
    for name in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), name, options.inputs, options.dtype, options.repeats)
        sys.stdout.write("{:<14}{:<9}{:>12.4g}{:>12.4g}{:>7}{:>8.2f}\n".format(*row))
        sys.stdout.flush()
    return 0


def measure(folder: Path, name: str, count: int, dtype: str, repeats: int) -> tuple[str, str, float, float, int, float]:
    """One model: amounts a second of both, the best batch size, the ratio; both sides by turns."""
    config = load_config(name).model
    modality, settings = next(iter(config.modalities.items()))
    unit, pack, size, source = INPUTS[modality]
    shards = pack(folder, count)
    write_folder(folder / "model", config)
    depth = config.depth(modality)
    extraction = Extraction(
        Options(
            model=str(folder / "model"), shards=str(shards), layers=(depth // 2, depth), pool="mean", weights="student",
            dtype=dtype, batch_tokens=None, part_tokens=PART_TOKENS,
        )
    )  # fmt: skip
    amount = float(np.asarray(open_shards(shards).sizes[:], dtype=np.float64).sum())
    amount = {"audio": amount / RATE, "image": float(count), "text": amount}[modality]
    trunk = extraction.extractor.model

    def every_part() -> None:
        for number in range(len(extraction.bounds) - 1):
            extraction.write_part(number, folder / f"{number}.arrow")

    own, alone = [], []
    for _ in range(repeats):
        own.append(timed(every_part))
        alone += [(bare(trunk, modality, source(b, settings), depth) / b, b) for b in BATCH_SIZES]
    seconds, batch = min(alone)
    rates = amount / min(own), size / seconds
    return name, unit, *rates, batch, rates[0] / rates[1]


def bare(trunk: Trunk, modality: str, source: Tensor, depth: int) -> float:
    """Seconds of one forward; the faster of two."""
    with torch.inference_mode():
        return min(timed(lambda: trunk.layers(modality, source, depth=depth)) for _ in range(2))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _clips(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    (folder / "wav").mkdir()
    for i in range(count):
        samples = 0.1 * rng.standard_normal(int(rng.uniform(5, 15) * RATE))
        soundfile.write(folder / "wav" / f"{i:04d}.wav", samples, RATE, subtype="PCM_16")
    return _packed(pack_audio, folder / "wav", folder / "shards")


def _photographs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    (folder / "jpg").mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3), dtype=np.uint8)).resize((500, 375))
        coarse.save(folder / "jpg" / f"{i:04d}.jpg", quality=90)
    return _packed(pack_images, folder / "jpg", folder / "shards")


def _texts(folder: Path, count: int) -> Path:
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(python_reference()[: count * 512 * 5], encoding="utf-8")
    return _packed(pack_text, folder / "text", folder / "shards", "--train-tokenizer", "--vocab-size", "600")


def _packed(pack: Callable[[list[str]], int], source: Path, shards: Path, *options: str) -> Path:
    if pack(["--input", str(source), "--output", str(shards), "--workers", "1", *options]) != 0:
        raise RuntimeError("packing the benchmark's inputs failed")
    return shards


def _pixels(count: int, settings: Any) -> Tensor:
    return torch.randint(0, 256, (count, 3, settings.image_size, settings.image_size), dtype=torch.uint8)


INPUTS: dict[str, tuple[str, Callable[[Path, int], Path], float, Callable[[int, Any], Tensor]]] = {
    "audio": ("seconds", _clips, 10.0, lambda b, _: torch.randn(b, 10 * RATE)),
    "image": ("images", _photographs, 1.0, _pixels),
    "text": ("tokens", _texts, 512.0, lambda b, _: torch.randint(4, 600, (b, 512))),
}
"""Modality -> unit, how inputs are packed, amount of one input of the bare forward, a batch of them."""


if __name__ == "__main__":
    sys.exit(main())
