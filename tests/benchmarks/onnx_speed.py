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
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from d2v2ds.config.load import load_config
from d2v2ds.interop.export_folder import ModelFolder, load_encoder
from d2v2ds.interop.onnx.graph import KINDS, check_onnx, export_onnx, measure, quantise, random_inputs, table
from d2v2ds.model.init import initialise
from d2v2ds.model.trunk import Data2Vec2

CASES = {"audio_base": (499, (1, 4)), "image_base": (196, (8,)), "text_base": (512, (4,))}
"""Tokens of an input, 10 s of speech, and numbers of inputs."""


def _random_model(name: str) -> Data2Vec2:
    model = Data2Vec2(load_config(name).model)
    initialise(model, 0)
    return model.eval()


def compare(title: str, model: Data2Vec2, modality: str, batches: tuple[int, ...], num_tokens: int) -> None:
    """Print one table for each batch size; features of the middle and of the last block."""
    config = model.config.modalities.active()[modality]
    size = KINDS[modality].sizes(config, [num_tokens])[0]
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
            print(table(measure(model, modality, files, inputs)), flush=True)


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
        models = {str(options.folder): load_encoder(ModelFolder(options.folder))}
    else:
        models = {name: _random_model(name) for name in ([options.config] if options.config else CASES)}
    for name, model in models.items():
        for modality in model.encoders:
            tokens, batches = CASES.get(name, (499, (1,)))
            compare(name, model, modality, chosen or batches, options.tokens or tokens)


if __name__ == "__main__":
    main()
