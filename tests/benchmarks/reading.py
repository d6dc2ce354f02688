"""How fast one worker reads: shard -> normalised crops -> batch with masks, as multiples of real time.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.reading [--shards DIR] [--repeats 5]

Without --shards, speech-like clips of 10 to 14 s are generated and packed with both codecs; every batch holds
six crops of 10 s with 8 masks each. The limit beside each row is what the data costs at least, measured in the
same run: the conversion of the same samples from int16 to float32, or bare soundfile decoding of the same clips.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from d2v2ds.data.collate import Collator
from d2v2ds.data.folders import JoinedShards
from d2v2ds.data.loader import DataStream, LoaderConfig, build_loader
from d2v2ds.data.order import BatchPlan, MicroBatch, SamplerState
from d2v2ds.masking import MaskConfig, draw_masks, visible_positions
from d2v2ds.modalities.audio.reader import AudioDataConfig, AudioReader
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.shapes import AUDIO_CONV_LAYERS, conv_output_length
from preprocessing.audio.rows import encode_flac
from preprocessing.pack_audio import main as pack_audio

RATE = 16_000
CROP_SECONDS = 10.0
MASK = MaskConfig(masked_fraction=0.5, adjust=0.05, block_length=5, num_masks=8)
GOALS = {"pcm16": 20_000, "flac": 2_000}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a packed folder instead of generated clips")
    parser.add_argument("--clips", type=int, default=120, help="generated clips (count)")
    parser.add_argument("--repeats", type=int, default=5, help="passes over the data; the fastest counts")
    parser.add_argument("--steps", type=int, default=100, help="batches timed through a worker process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.shards:
            folders = [options.shards]
        else:
            folders = [generate(Path(folder), codec, options.clips) for codec in GOALS]
        rows = [row for path in folders for row in measure(AudioShards(path), options.repeats, options.steps)]
    rows += measure_masks(options.repeats)
    width = max(len(name) for name, _, _ in rows)
    for name, value, note in rows:
        sys.stdout.write(f"{name:<{width}}  {value:>14}  {note}\n")
    return 0


def generate(folder: Path, codec: str, num_clips: int) -> Path:
    """Clips with the spectrum and the pauses of speech, roughly, packed with one codec."""
    rng = np.random.default_rng(0)
    wavs = folder / f"wav-{codec}"
    wavs.mkdir()
    for i in range(num_clips):
        size = int(rng.uniform(10.0, 14.0) * RATE)
        spectrum = np.fft.rfft(rng.normal(size=size)) / np.maximum(np.fft.rfftfreq(size, 1 / RATE), 300.0)
        noise = np.fft.irfft(spectrum, size)
        envelope = np.interp(np.arange(size), np.arange(0, size + 4000, 4000), rng.random(size // 4000 + 2) ** 3)
        soundfile.write(wavs / f"{i:04d}.wav", 0.3 * noise / noise.std() * envelope, RATE, subtype="PCM_16")
    output = folder / codec
    code = pack_audio(["--input", str(wavs), "--output", str(output), "--codec", codec])
    if code != 0:
        raise RuntimeError(f"packing the benchmark's clips ended with exit code {code}")
    return output


class Network:
    """Settings of the network that a reader asks for."""

    def num_tokens(self, size: int) -> int:
        return conv_output_length(size, AUDIO_CONV_LAYERS)


def settings(shards: AudioShards) -> AudioDataConfig:
    """Batches of six crops."""
    return AudioDataConfig(
        shards=shards.folder,
        global_batch_seconds=60.0,
        micro_batch_seconds=60.0,
        min_seconds=2.0,
        max_seconds=CROP_SECONDS,
    )


def measure(shards: AudioShards, repeats: int, num_steps: int) -> list[tuple[str, str, str]]:
    """Rows of the table for one folder."""
    codec = shards.index.format["codec"]
    reader = AudioReader(JoinedShards([shards]), settings(shards), Network(), MASK)
    plan = BatchPlan(reader.sizes, config=reader.plan_config(), seed=0)
    micro = plan.window(0, 0)
    seconds = sum(len(m.rows) * m.size for m in micro) / RATE
    collate = Collator(reader=reader, seed=0)

    ours = best(lambda: [collate(m) for m in micro], repeats)
    limit, limit_name = LIMITS[codec](shards, micro, repeats)
    goal = GOALS[codec]
    reached = "reached" if seconds / ours >= goal else "MISSED"
    return [
        (f"{codec}: shard to batch with masks", times(seconds, ours), f"goal {goal:,} x, {reached}"),
        (f"{codec}: {limit_name}", times(seconds, limit), f"the limit; we run at {limit / ours:.0%} of it"),
        (
            f"{codec}: the same through one worker process",
            times(*through_worker(reader, plan, num_steps)),
            "including transfer",
        ),
    ]


def conversion_limit(shards: AudioShards, micro: list[MicroBatch], repeats: int) -> tuple[float, str]:
    """Seconds to turn as many int16 samples into float32, batch by batch into new memory."""
    samples = {m.size: np.ones(m.size, dtype=np.int16) for m in micro}

    def convert() -> None:
        for m in micro:
            out = np.empty((len(m.rows), m.size), dtype=np.float32)
            for row in out:
                row[:] = samples[m.size]

    return best(convert, repeats), "int16 to float32 of as many samples"


def decode_limit(shards: AudioShards, micro: list[MicroBatch], repeats: int) -> tuple[float, str]:
    """Seconds that soundfile needs for as many samples of the same streams, each read from its start."""

    streams = [(bytes(encode_flac(shards.read_audio(int(row)))), m.size) for m in micro for row in m.rows]

    def read() -> None:
        for stream, size in streams:
            soundfile.read(io.BytesIO(stream), size, dtype="int16")

    return best(read, repeats), "soundfile decoding of as many samples, without seeking"


LIMITS: dict[str, Callable[[AudioShards, list[MicroBatch], int], tuple[float, str]]] = {
    "pcm16": conversion_limit,
    "flac": decode_limit,
}


def through_worker(reader: AudioReader, plan: BatchPlan, num_steps: int) -> tuple[float, float]:
    """Audio seconds and wall seconds of batches that arrive from one worker process, once it runs."""
    loader = build_loader(
        {"audio": DataStream(reader, plan)},
        state={"audio": SamplerState()},
        rank=0,
        world=1,
        config=LoaderConfig(num_workers=1),
    )
    for _ in range(10):
        next(loader)
    start = time.perf_counter()
    samples = sum(batch.source.numel() for _ in range(num_steps) for batch in next(loader).micro)
    elapsed = time.perf_counter() - start
    loader.close()
    return samples / RATE, elapsed


def measure_masks(repeats: int) -> list[tuple[str, str, str]]:
    """Masks alone: 96 rows of a 10 s clip."""
    num_tokens = conv_output_length(int(CROP_SECONDS * RATE), AUDIO_CONV_LAYERS)
    ids = np.arange(12)
    taken = best(lambda: visible_positions(draw_masks(MASK, num_tokens, seed=0, epoch=0, sample_ids=ids)), 10 * repeats)
    return [(f"masks: 96 rows of {num_tokens} tokens", f"{taken * 1e3:.2f} ms", "goal: well under 10 ms")]


def best(function: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, in seconds; one more warms up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def times(audio_seconds: float, wall_seconds: float) -> str:
    return f"{audio_seconds / wall_seconds:,.0f} x"


if __name__ == "__main__":
    from tests.benchmarks import reading  # workers do not import a main module, and they get our classes

    sys.exit(reading.main())
