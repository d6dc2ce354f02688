"""Encoders by onnxruntime, fp32 and int8, against PyTorch fp32 in the same run: size, seconds, feature error.

    python tests/benchmarks/onnx_speed.py                                # the three base sizes, two minutes each
    python tests/benchmarks/onnx_speed.py --config audio_base --batch 1,4 --threads 2
    python tests/benchmarks/onnx_speed.py --folder EXPORT --batch 4      # trained weights of an export folder

Without a folder the weights are random (first weights of a run). PyTorch runs in inference mode with its fused
attention and nothing padded; the graphs get the same noise with `padding` all False. `speed` is PyTorch's time over the
graph's. Every graph is checked before it is timed.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.config.load import load_config
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.interop.onnx.graph import (
    OnnxEncoder,
    check_onnx,
    export_onnx,
    exportable_encoder,
    graph_input,
    parts_of,
    random_inputs,
    weight_bytes,
)
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk

CASES = {"audio_base": (499, (1, 4)), "image_base": (196, (8,)), "text_base": (512, (4,))}
"""Tokens of an input, 10 s of speech, and numbers of inputs."""
REPEATS = 5
LOCAL_ENCODER = re.compile(r"\.local\b")


def _random_model(name: str) -> Trunk:
    model = Trunk(load_config(name).model)
    initialise(trunk_parts(model), 0)
    return model.eval()


def quantise(path: Path, to: Path) -> None:
    """Store the weights of the blocks' matrix products as int8, with one scale a column; inputs become int8 on the fly.

    Local encoders stay fp32: they hold few weights, and an error of theirs goes through all blocks.
    """
    nodes = onnx.load(path, load_external_data=False).graph.node
    logging.getLogger().setLevel(logging.ERROR)  # advice on pre-processing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(
            path,
            to,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in nodes if LOCAL_ENCODER.search(node.name)],
        )


def best_seconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Best time of each; they take turns, so that other load on the machine hits all of them."""
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def table(model: Trunk, modality: str, files: Sequence[Path], inputs: Sequence[Tensor]) -> Iterator[str]:
    """Lines of a Markdown table: size, speed and error of graphs against PyTorch on the same unpadded inputs.

    The error of a layer is the mean (maximum) over tokens of |features - PyTorch's| / |PyTorch's|, Euclidean over D.
    """
    encoder, graphs = exportable_encoder(model, modality), [OnnxEncoder(file) for file in files]
    with torch.inference_mode():
        expected = encoder.layers(modality, inputs[0])
        runs: list[Callable[[], object]] = [
            partial(encoder.layers, modality, inputs[0]),
            *(partial(graph, *inputs) for graph in graphs),
        ]
        errors = [""]
        for graph in graphs:
            found = graph(*inputs)
            errors.append(", ".join(f"{i}: {error(found[f'layer_{i}'], expected[i])}" for i in graph.layers))
        seconds = best_seconds(runs)
    sizes = [weight_bytes(encoder), *(sum(part.stat().st_size for part in parts_of(file)) for file in files)]
    names = ["PyTorch fp32", *(file.name for file in files)]
    yield from ("| | MB | s per batch | speed | error: mean (max), by layer |", "|---|---|---|---|---|")
    for name, size, taken, line in zip(names, sizes, seconds, errors, strict=True):
        yield f"| {name} | {size / 1e6:.1f} | {taken:.4f} | {seconds[0] / taken:.2f} | {line} |"


def error(found: Tensor, expected: Tensor) -> str:
    """Relative error over tokens of (B, T, D) features."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # (B, T)
    return f"{errors.mean():.1e} ({errors.max():.1e})"


def compare(title: str, model: Trunk, modality: str, batches: tuple[int, ...], num_tokens: int) -> None:
    """Print one table for each batch size; features of the middle and of the last block."""
    config = model.config.modalities[modality]
    size = graph_input(modality).sizes(config, [num_tokens])[0]
    depth = model.depth(modality)
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "onnxruntime fp32", Path(name) / "onnxruntime int8"]
        export_onnx(model, modality, files[0], layers=(depth // 2, depth))
        worst = check_onnx(model, modality, files[0])
        quantise(*files)
        for rows in batches:
            inputs = random_inputs(config, modality, [size] * rows, size, torch.Generator().manual_seed(2))
            load, threads = os.getloadavg()[0], torch.get_num_threads()
            print(f"\n{title}, source {tuple(inputs[0].shape)}, {threads} threads, load before it {load:.1f}")
            print(f"The graph is within {worst:.1e} of PyTorch's largest feature.\n")
            print(*table(model, modality, files, inputs), sep="\n", flush=True)


def main() -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", help="a configuration; the three base sizes if not given")
    parser.add_argument("--folder", type=Path, help="export folder with weights, in place of random ones")
    parser.add_argument("--batch", help="numbers of inputs, such as 1,4")
    parser.add_argument("--tokens", type=int, help="length of an input; 499 tokens of speech are 10 s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.WARNING)
    chosen = tuple(int(part) for part in options.batch.split(",")) if options.batch else None
    if options.folder:
        models = {str(options.folder): load_trunk(ModelFolder(options.folder))}
    else:
        models = {name: _random_model(name) for name in ([options.config] if options.config else CASES)}
    for name, model in models.items():
        for modality in model.encoders:
            tokens, batches = CASES.get(name, (499, (1,)))
            compare(name, model, modality, chosen or batches, options.tokens or tokens)


if __name__ == "__main__":
    main()
