"""Training steps of data2vec 2.0 and its rivals against the machine's peak and against each other, within one run.

    python -m tests.benchmarks.rivals [--groups image audio text] [--batch 2] [--seconds 5] [--repeats 3]

A step is teacher forward, student forward and backward with the published settings in fp32, on noise, without
optimizer. The peak is that of a large matrix product in the same run; operations are those of the algorithm. The last
two columns compare with the first row of a group: time for one input, and time for one masked token, of which each
input gives as many as it has masks. `M 1` is data2vec 2.0 with one mask: what several masks share is missing there.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v2ds.batch import Batch, MaskSet, SpanMasks
from d2v2ds.config.load import load_config
from d2v2ds.config.schema import RunConfig
from d2v2ds.masking import MaskConfig, draw_masks, visible_positions
from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from d2v2ds.objectives.protocol import Objective
from d2v2ds.run.machine import matmul_peak_flops, tune_cpu
from d2v2ds.whole_masks import draw_whole_masks

GROUPS = {
    "image": ("image_base", "data2vec1/image_base", "mae/base"),
    "audio": ("audio_base", "data2vec1/audio_base"),
    "text": ("text_base", "data2vec1/text_base"),
    "tiny": ("image_tiny", "data2vec1/image_tiny", "mae/tiny"),
}
GOAL = 0.8
"""Wanted share of the peak, in fp32."""
RATE = 16_000


@dataclass(frozen=True)
class Row:
    """Measurement of one objective."""

    name: str
    seconds: float
    flops: float
    samples: int
    masked: int


class FrozenTeacher:
    """Teacher's network on this rank alone; an `AveragedNetwork` that is never updated."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Any:
        return self.network(*arguments)

    def update(self, decay: float, *, again: bool = False) -> None:
        """Do nothing."""

    def student_distance(self) -> float:
        """Return nothing of interest."""
        return 0.0


def build(config: RunConfig, seed: int = 0) -> tuple[Objective, nn.Module]:
    """Objective with its teacher, and the trained network."""
    objective: Any = config.objective.build(config.model, seed)
    network = objective.build_network(activation_checkpointing=False)
    objective.initialise(network, seed)
    teacher = objective.build_teacher_network()
    if teacher is not None:
        weights = network.state_dict()
        teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
        objective.follow(FrozenTeacher(teacher))
    return objective, network


def draw_input(config: RunConfig, samples: int, seconds: float) -> Tensor:
    """Noise of the modality's kind."""
    (network,) = config.model.modalities.values()
    if hasattr(network, "vocab_size"):
        return torch.randint(4, network.vocab_size - 1, (samples, network.max_tokens))
    if hasattr(network, "image_size"):
        side = network.image_size
        return torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8)
    return torch.randn(samples, round(seconds * RATE))


def make_batch(config: RunConfig, objective: Objective, samples: int, seconds: float) -> Batch:
    """Noise with masks as the run would draw them."""
    ((name, network),) = config.model.modalities.items()
    source, ids = draw_input(config, samples, seconds), np.arange(samples)
    tokens, mask = network.num_tokens(source.shape[-1]), objective.mask(name)
    batch = Batch(modality=name, source=source, ids=torch.from_numpy(ids))
    if isinstance(mask, MaskConfig):
        masked = draw_masks(mask, tokens, seed=0, epoch=0, sample_ids=ids)
        masks = MaskSet(keep=torch.from_numpy(visible_positions(masked)), masked=torch.from_numpy(masked))
        return replace(batch, masks=masks, num_masked=int(masked.sum()))
    assert mask is not None
    whole = draw_whole_masks(mask, np.full(samples, tokens), seed=0, epoch=0, sample_ids=ids)
    return replace(batch, span_masks=SpanMasks(time=torch.from_numpy(whole)), num_masked=int(whole.sum()))


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds, after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, config: RunConfig, samples: int, seconds: float, repeats: int) -> Row:
    """Time of one step."""
    torch.manual_seed(0)
    objective, network = build(config)
    batch = make_batch(config, objective, samples, seconds)

    def step() -> None:
        losses = objective.losses(network, batch, 0)
        total = torch.stack(list(losses.sums.values())).sum()
        assert torch.isfinite(total)
        (total / losses.count).backward()
        network.zero_grad()

    elapsed = fastest(step, repeats)
    flops = objective.flops(batch.modality, samples, batch.source.shape[-1])
    return Row(name, elapsed, flops, samples, batch.num_masked)


def configurations(names: tuple[str, ...]) -> dict[str, RunConfig]:
    """Configurations of a group, and the first one with a single mask."""
    found = {name: load_config(name, ["data.shards=x"]) for name in names}
    first = found[names[0]]
    assert isinstance(first.objective, Data2Vec2Config)
    ((modality, own),) = first.objective.modalities.items()
    single = {modality: replace(own, mask=replace(own.mask, num_masks=1))}
    found[f"{names[0]}, M 1"] = replace(first, objective=replace(first.objective, modalities=single))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["image", "audio", "text"])
    parser.add_argument("--batch", type=int, default=2, help="inputs of a step")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a recording")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    options = parser.parse_args(arguments)
    tune_cpu(processes=1)
    for group in options.groups:
        peak = matmul_peak_flops(torch.device("cpu"), torch.float32)
        rows = [
            measure(name, config, options.batch, options.seconds, options.repeats)
            for name, config in configurations(GROUPS[group]).items()
        ]
        peak = max(peak, matmul_peak_flops(torch.device("cpu"), torch.float32))
        head = f"{'s/step':>8} {'of peak':>8} {'masked':>7} {'per input':>9} {'per masked token':>16}"
        print(f"{group:24} {head}   goal {GOAL:.0%} of {peak / 1e9:.0f} GFLOP/s")
        first = rows[0]
        for row in rows:
            of_input = row.seconds / row.samples / (first.seconds / first.samples)
            of_token = row.seconds / row.masked / (first.seconds / first.masked)
            share = row.flops / row.seconds / peak
            assert np.isfinite([share, of_input, of_token]).all()
            line = f"{row.seconds:8.3f} {share:8.1%} {row.masked:7} {of_input:9.3f} {of_token:16.3f}"
            print(f"{row.name:24} {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
