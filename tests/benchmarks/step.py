"""Speed of one training step (teacher forward, student forward and backward) against the machine's own peak.

    python tests/benchmarks/step.py                                  # audio_base, 10 s, M 8, on this CPU
    python tests/benchmarks/step.py --config audio_large --seconds 5
    python tests/benchmarks/step.py --config image_base --batch 2    # or text_base: blocks of 512 tokens
    python tests/benchmarks/step.py --device cuda --paths sdpa,explicit --compile both --batch 6

Needs torch and numpy. The peak is that of a large matrix product of the same precision in the same run; operations
are those of the algorithm alone (visible tokens in the encoder, no recomputation), so the share is what the user
gets out of the machine. No optimizer, no DeepSpeed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.masking import MaskConfig, draw_masks, masked_count
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.decoder import DecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2, Data2Vec2Config, ModalityConfig
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.run.machine import matmul_peak_flops, tune_cpu

SAMPLE_RATE_HZ = 16000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """One model and its objective, without YAML so that torch and numpy suffice."""

    trunk: TrunkConfig
    own: ModalityConfig

    @property
    def modality(self) -> str:
        """The only one."""
        return next(iter(self.trunk.modalities))

    def objective(self) -> Data2Vec2:
        """data2vec 2.0 with these settings."""
        ema = EmaConfig(start_decay=0.999, end_decay=0.999, anneal_steps=0)
        return Data2Vec2Config(ema=ema, modalities={self.modality: self.own}).build(self.trunk, seed=0)


INSTANCE = ("instance",)


def _audio(width: int, heads: int, prenet: int, depth: int, decoder: int, top: int, mask: MaskConfig) -> Size:
    audio = AudioNetwork(prenet_depth=prenet, prenet_dropout=0.1)
    own = ModalityConfig(
        share_local_encoder=True,
        mask=mask,
        decoder=DecoderConfig(width=decoder, depth=4, kernel=7, groups=16),
        target=TargetConfig(num_layers=top, layer_norms=INSTANCE),
    )
    block = BlockConfig(width=width, num_heads=heads)
    return Size(TrunkConfig(block=block, shared_depth=depth, modalities={"audio": audio}), own)


def _image(width: int, heads: int, prenet: int, depth: int, decoder: DecoderConfig, image_size: int, kept: str) -> Size:
    mask = {
        "base": MaskConfig(
            masked_fraction=0.8, adjust=0.07, num_masks=16, kind="block_2d", block_length=3, inverse=True
        ),
        "large": MaskConfig(
            masked_fraction=0.75, adjust=0.1, num_masks=16, kind="block_2d", block_length=3, inverse=True
        ),
    }[kept]
    own = ModalityConfig(
        share_local_encoder=False,
        mask=mask,
        decoder=decoder,
        target=TargetConfig(num_layers=depth, layer_norms=INSTANCE, final_norms=("layer",)),
        loss=LossConfig(cls_weight=0.01),
    )
    dropouts = {"attention_dropout": 0.0, "attention_output_dropout": 0.0, "mlp_dropout": 0.0}
    block = BlockConfig(width=width, num_heads=heads, norm_eps=1e-6, **dropouts)
    image = ImageNetwork(prenet_depth=prenet, image_size=image_size)
    return Size(TrunkConfig(block=block, shared_depth=depth, modalities={"image": image}), own)


def _text(width: int, heads: int, depth: int, decoder: DecoderConfig, vocab: int, tokens: int, masked: float) -> Size:
    own = ModalityConfig(
        share_local_encoder=True,
        mask=MaskConfig(masked_fraction=masked, num_masks=8, kind="random"),
        decoder=decoder,
        target=TargetConfig(num_layers=depth, layer_norms=INSTANCE),
        loss=LossConfig(scale=1.0),
    )
    block = BlockConfig(width=width, num_heads=heads)
    text = TextNetwork(prenet_depth=0, vocab_size=vocab, max_tokens=tokens)
    return Size(TrunkConfig(block=block, shared_depth=depth, modalities={"text": text}), own)


def _text_decoder(width: int) -> DecoderConfig:
    return DecoderConfig(width=width, depth=5, kernel=9, groups=1, residual=False, projection_layers=2)


SPEECH_BASE = MaskConfig(masked_fraction=0.5, num_masks=8, block_length=5, adjust=0.05)
SIZES = {
    "audio_base": _audio(768, 12, 0, 12, 384, 8, SPEECH_BASE),
    "audio_large": _audio(
        1024, 16, 8, 16, 768, 16, MaskConfig(masked_fraction=0.55, num_masks=12, block_length=5, adjust=0.1)
    ),
    "image_base": _image(
        768, 12, 2, 10, DecoderConfig(width=768, depth=6, kernel=3, groups=16, input_dropout=0.0), 224, "base"
    ),
    "image_large": _image(
        1024, 16, 0, 24, DecoderConfig(width=1024, depth=3, kernel=5, groups=16, input_dropout=0.0), 224, "large"
    ),
    "text_base": _text(768, 12, 12, _text_decoder(768), 50265, 512, 0.48),
    "text_large": _text(1024, 16, 24, _text_decoder(768), 50265, 512, 0.5),
    "tiny": _audio(64, 4, 1, 2, 32, 2, replace(SPEECH_BASE, num_masks=2)),
    "image_tiny": _image(
        64, 4, 1, 2, DecoderConfig(width=32, depth=2, kernel=3, groups=16, input_dropout=0.0), 80, "base"
    ),
    "text_tiny": _text(64, 4, 2, _text_decoder(32), 100, 64, 0.48),
}


def _input(size: Size, samples: int, seconds: float) -> torch.Tensor:
    """Noise of the right kind."""
    network = size.trunk.modalities[size.modality]
    if isinstance(network, AudioNetwork):
        return torch.randn(samples, round(seconds * SAMPLE_RATE_HZ))
    if isinstance(network, ImageNetwork):
        side = network.image_size
        return torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8)
    return torch.randint(4, network.vocab_size, (samples, network.max_tokens))


def make_batch(size: Size, samples: int, seconds: float) -> Batch:
    """Noise with masks as the run would draw them."""
    source, mask = _input(size, samples, seconds), size.own.mask
    tokens = size.trunk.modalities[size.modality].num_tokens(source.shape[-1])
    masked = torch.from_numpy(draw_masks(mask, tokens, seed=0, epoch=0, sample_ids=range(samples)))
    visible = tokens - masked_count(mask, tokens)
    keep = masked.to(torch.uint8).argsort(dim=-1, stable=True)[..., :visible]
    return Batch(
        modality=size.modality,
        source=source,
        ids=torch.arange(samples),
        masks=MaskSet(keep=keep, masked=masked),
        num_masked=int(masked.sum()),
    )


def measure(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median seconds of `run` after one warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[(len(times) - 1) // 2]


def benchmark(
    size: Size, *, clips: int, seconds: float, dtype: torch.dtype, device: torch.device, compiled: bool, repeats: int
) -> tuple[float, float, int]:
    """Seconds of one step, algorithmic operations of it, and peak bytes on a CUDA device."""
    torch.manual_seed(0)
    objective = size.objective()
    student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network().eval()
    objective.initialise(student, seed=0)
    student, teacher = student.to(device, dtype), teacher.to(device, dtype).requires_grad_(False)
    if compiled:
        for block in [*student.modules(), *teacher.modules()]:
            if type(block).__name__ == "Block":
                block.compile()
    batch = make_batch(size, clips, seconds).to(device)
    make_targets = torch.no_grad()(teacher.__call__)

    def step() -> None:
        losses = student(batch, make_targets)["losses"]
        (torch.stack(list(losses.values())).sum() / batch.num_masked).backward()
        student.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elapsed = measure(step, device, repeats)
    flops = objective.flops(size.modality, clips, batch.source.shape[-1])
    return elapsed, flops, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main(arguments: list[str] | None = None) -> int:
    """Print one line per precision, attention path and compile setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=sorted(SIZES), default="audio_base")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (speech)")
    parser.add_argument("--batch", type=int, default=1, help="clips, images or blocks of text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--paths", default="auto", help="attention paths, comma-separated")
    parser.add_argument("--no-dropout", action="store_true", help="all rates 0 (the flex path needs it)")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="off")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        tune_cpu(processes=1)
    length = f" of {options.seconds:g} s" if SIZES[options.config].modality == "audio" else ""
    print(f"{options.config}, batch {options.batch}{length}, torch {torch.__version__}, {device}", end="")
    print(f", {torch.get_num_threads()} threads" if device.type == "cpu" else f", {torch.cuda.get_device_name(device)}")
    print(f"{'precision':9} {'attention':9} {'compile':7} {'s/step':>8} {'inputs/s':>8} {'TFLOP/s':>8} {'peak':>8} "
          f"{'share':>6} {'GiB':>6}")  # fmt: skip
    for precision in options.dtypes.split(","):
        dtype = DTYPES[precision]
        for path in options.paths.split(","):
            size = SIZES[options.config]
            block = replace(size.trunk.block, attention_path=path)
            if options.no_dropout:
                block = replace(block, attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0)
            size = replace(size, trunk=replace(size.trunk, block=block))
            for compiled in {"off": [False], "on": [True], "both": [False, True]}[options.compile]:
                peak = matmul_peak_flops(device, dtype)
                elapsed, flops, memory = benchmark(
                    size,
                    clips=options.batch,
                    seconds=options.seconds,
                    dtype=dtype,
                    device=device,
                    compiled=compiled,
                    repeats=options.repeats,
                )
                peak = max(peak, matmul_peak_flops(device, dtype))
                rate = flops / elapsed
                print(
                    f"{precision:9} {path:9} {'on' if compiled else 'off':7} {elapsed:8.3f} "
                    f"{options.batch / elapsed:8.2f} {rate / 1e12:8.5f} {peak / 1e12:8.3f} {rate / peak:6.1%} "
                    f"{memory / 2**30:6.1f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
