"""The first 20 steps of every tiny configuration, as numbers that a refactoring must leave alone.

    python -m tests.runs.golden_curves [NAME ...]     (make golden) writes tests/golden/curves/ and prints what changed

Each configuration as shipped but for the length of the run, half the batch of text, a quarter of that of MAE, and in
the joint one half of every batch: data that are made here, one process, fp32, a record at every step. Whoever changes
the numbers says why in the commit.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from d2v2ds.config.load import load_config, to_dict
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.runs.launching import Processes, deterministic, pack_clips

FOLDER = Path(__file__).parents[1] / "golden" / "curves"
NAMES = (
    "audio_tiny",
    "image_tiny",
    "text_tiny",
    "multimodal_tiny",
    "spectrogram_tiny",
    "mae/tiny",
    "data2vec1/audio_tiny",
    "data2vec1/text_tiny",
)
STEPS = 20
EXACT = ("optim/lr", "optim/skipped_steps", "ema/decay", "mask/fraction", "data/")
"""Metrics that are arithmetic or counting: the same on every machine but for the last digit."""
FRACTIONS = ("explained", "position_share")
"""Metrics whose size says nothing of their rounding."""
TOLERANCE = 1e-4
"""Of the others, relative. With the kernels of older processors (`ATEN_CPU_CAPABILITY=avx2` or `default` with
`ONEDNN_MAX_CPU_ISA` and `MKL_ENABLE_INSTRUCTIONS` to match) nothing moved by more than 3e-6, but for the gradient
of the ALiBi scales with 1e-5."""
_WORDS = 60


def make_data(root: Path) -> dict[str, Path]:
    """A packed folder of each modality; the same bytes everywhere."""
    rng = np.random.default_rng(0)
    audio = pack_clips(root / "audio")
    packed = {"audio": audio, "spectrogram": audio, "image": root / "image-shards", "text": root / "text-shards"}
    (root / "image").mkdir()
    for number in range(96):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BILINEAR).save(root / "image" / f"{number:02d}.png")
    assert pack_images(["--input", str(root / "image"), "--output", str(packed["image"]), "--workers", "1"]) == 0
    with (root / "text.txt").open("w") as file:
        for _ in range(900):
            topic = rng.integers(0, 4)
            file.write(" ".join(f"word{topic * 10 + word}" for word in rng.integers(0, 30, _WORDS)) + "\n\n")
    options = ["--block-tokens", "128", "--train-tokenizer", "--vocab-size", "320", "--workers", "1"]
    assert pack_text(["--input", str(root / "text.txt"), "--output", str(packed["text"]), *options]) == 0
    return packed


def train(root: Path, names: Sequence[str] = NAMES) -> dict[str, list[dict[str, float]]]:
    """Train configurations, side by side on data of `root`; returns their metrics at each step, less the clock."""
    packed = make_data(root)
    folders = {name: root / name.replace("/", "_") for name in names}
    with ExitStack() as running:
        runs = {
            name: running.enter_context(
                Processes("d2v2ds.pretrain", _arguments(name, packed, folder), [{}], logs=root / f"{folder.name}-logs")
            )
            for name, folder in folders.items()
        }
        for name, run in runs.items():
            assert run.wait(600) == [0], f"{name}: {run.printed(0)[-6000:]}"
    return {name: deterministic(folder) for name, folder in folders.items()}


def _arguments(name: str, packed: dict[str, Path], run_dir: Path) -> list[str]:
    shards = [f"data.{m}.shards=x" for m in _modalities(name)]
    modalities = load_config(name, shards).model.modalities
    overrides = [f"data.{modality}.shards={packed[modality]}" for modality in modalities]
    if "text" in modalities:
        overrides.append("model.modalities.text.vocab_size=320")
        overrides += ["data.text.global_batch_tokens=2048", "data.text.micro_batch_tokens=1024"]
    if "ema" in to_dict(load_config(name, shards).objective):
        overrides.append(f"objective.ema.anneal_steps={STEPS}")
    if name == "mae/tiny":
        overrides += ["data.image.global_batch_images=32", "data.image.micro_batch_images=16"]
    if len(modalities) > 1:
        overrides += ["data.audio.global_batch_seconds=4", "data.audio.micro_batch_seconds=4"]
        overrides += ["data.image.global_batch_images=8"]
    return [
        "--config", name, *overrides,
        f"run.dir={run_dir}", f"run.total_steps={STEPS}", "run.log_every_steps=1", f"run.health_every_steps={STEPS}",
        f"run.save_every_steps={STEPS}", "lr.warmup_steps=5",
        "engine.deepspeed=zero0_fp32_debug",
    ]  # fmt: skip


def _modalities(name: str) -> list[str]:
    kind = name.removeprefix("data2vec1/").removesuffix("_tiny")
    return {"multimodal": ["audio", "image", "text"], "mae/tiny": ["image"]}.get(kind, [kind])


def file_of(name: str) -> Path:
    """The file with the kept records."""
    return FOLDER / f"{name.replace('/', '_')}.json"


def expected(name: str) -> list[dict[str, float]]:
    """The records that are kept."""
    records: list[dict[str, float]] = json.loads(file_of(name).read_text())
    return records


def differences(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> Iterator[str]:
    """What differs by more than the tolerance, a sentence each."""
    if len(found) != len(wanted):
        yield f"expected {len(wanted)} records, found {len(found)}"
    for ours, theirs in zip(found, wanted, strict=False):
        step = int(theirs["step"])
        if ours.keys() != theirs.keys():
            yield f"step {step}: other metrics: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
        for metric in ours.keys() & theirs.keys():
            limit = 1e-6 if any(part in metric for part in EXACT) else TOLERANCE
            size = 1.0 if metric.endswith(FRACTIONS) else abs(theirs[metric])
            if abs(ours[metric] - theirs[metric]) > limit * size:
                yield f"step {step}: {metric} expected {theirs[metric]:.6g}, found {ours[metric]:.6g}"


def main(names: Sequence[str]) -> int:
    """Write the files of some configurations anew; of all if none are named."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, found in train(Path(folder), names or NAMES).items():
            file = file_of(name)
            changed = list(differences(found, expected(name))) if file.exists() else ["new"]
            print(f"{name}: {len(changed)} differences", *changed[:20], sep="\n  ")
            lines = ",\n".join(json.dumps({key: float(f"{v:.9g}") for key, v in record.items()}) for record in found)
            file.write_text(f"[{lines}]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
