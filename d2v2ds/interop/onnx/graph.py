"""Export the encoder of one modality as an ONNX graph and check it against PyTorch.

    python -m d2v2ds.interop.onnx FOLDER --to DIR [--modality NAME] [--layers 6,12]

In: an export folder. Out: DIR/NAME.onnx, once onnxruntime has given PyTorch's features for batches and lengths that
the graph was not traced with.

    source         audio (B, S) float32, normalised; image (B, 3, Y, X) float32, normalised, of the model's own side;
                   text (B, S) int64. B and S are free.
    padding        (B, S) bool, True = pad; audio and text only. With nothing padded: all False.
    layer_<i>      (B, T, D) float32, features as of `Trunk.layers`: 0 enters the first block.
    logits         of a fine-tuned model: (B, T, V) float32 of CTC, output 0 is blank; or (B, C) float32. Each row needs
                   a token that is no padding.
    token_padding  (B, T) bool, True = this token is padding.

A graph with logits has `layer_<i>` only where --layers asks for them. Its metadata, key `d2v2ds`, is JSON: task, names
of the outputs, preprocessing, and `scale`, by which a number is multiplied.

The graph has opset 20, so that onnxruntime 1.17 and later can read it. It comes from `torch.export`, which knows the
lengths as symbols; the older tracer would write down whichever branches the traced input took.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.errors import D2V2Error, MissingExtraError
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.interop.onnx.head import GraphHead, graph_head
from d2v2ds.io.durable import sync
from d2v2ds.io.output import beside, sole_writer
from d2v2ds.modalities.inference import GraphInput
from d2v2ds.modalities.known import modality_of
from d2v2ds.model.trunk import Trunk

logger = logging.getLogger(__name__)

OPSET = 20
"""The first with an exact GELU, which PyTorch's becomes one node of."""
TOLERANCE = 1e-4
"""Largest difference from PyTorch that a graph may show, over the largest feature of the layer."""
METADATA_KEY = "d2v2ds"
"""Key of the graph's metadata for task, outputs and preprocessing."""
SINGLE_FILE_BYTES = 1_800_000_000
"""Weights of more bytes go to a file of their own beside the graph: a protobuf message ends at 2 GB."""
_TRACED_TOKENS = 23
_CHECKED_TOKENS = (1, 9, 50, 121)
_CHECKED_ROWS = (1, 4, 3, 5)


def graph_input(modality: str) -> GraphInput:
    """Return the form of the input of a modality's graph.

    Raises:
        D2V2Error: the modality has no ONNX graph.
    """
    found = modality_of(modality, "ONNX export").graph
    if found is None:
        raise D2V2Error(f"{modality}: expected a modality with an ONNX graph, found one without")
    return found


def random_inputs(
    config: Any, modality: str, real: Sequence[int], size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Noise in the form that the graph takes.

    Args:
        config: of the modality.
        modality: its name.
        real: for each row, samples or tokens that are not padding; for images only their number counts.
        size: samples, tokens, or side of an image.
        generator: the only source of randomness.

    Returns:
        The source and, where inputs can be padded, the padding.
    """
    kind = graph_input(modality)
    source = kind.draw(config, len(real), size, generator)
    if kind.padding is None:
        return (source,)
    padding = torch.arange(size) >= torch.tensor(real)[:, None]  # (B, S)
    at_samples = padding.view(len(real), *[1] * (source.dim() - 2), size)  # (B, ..., S)
    return source.masked_fill(at_samples, kind.padding), padding


class _Graph(nn.Module):
    """Module that is exported: tensors in, tensors out."""

    def __init__(self, model: Trunk, modality: str, layers: Sequence[int], head: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.modality, self.layers, self.head = model, modality, layers, head

    def forward(self, source: Tensor, padding: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute layers and token padding, as the module docstring says."""
        encoder = self.model.encoder(self.modality)
        features = self.model.layers(self.modality, source, padding, with_extra_tokens=True)
        extra = encoder.num_extra_tokens
        shown = [features[i][:, extra:] for i in self.layers]
        rows, tokens = features[0].shape[0], features[0].shape[1] - extra
        token_padding = encoder.token_padding(padding, tokens)  # (B, T)
        if self.head is not None:
            shown.append(self.head(features[-1], extra, token_padding))
        if token_padding is None:
            token_padding = torch.zeros((rows, tokens), dtype=torch.bool, device=source.device)
        return *shown, token_padding


def output_names(layers: Sequence[int], has_logits: bool) -> list[str]:
    """Return the output names of a graph."""
    return [*(f"layer_{i}" for i in layers), *(["logits"] if has_logits else []), "token_padding"]


def exportable_encoder(model: Trunk, modality: str) -> Trunk:
    """One modality's encoder with the same weights, in fp32 on the CPU, and with attention that can be exported.

    Weights that are fp32 on the CPU already are shared, not copied.

    Raises:
        D2V2Error: if the model has no such modality.
    """
    if modality not in model.encoders:
        raise D2V2Error(f"modality {modality!r}: this model has {', '.join(model.encoders)}; give one of them")
    block = replace(model.config.block, attention_path="sdpa")
    modalities = {modality: model.config.modalities[modality]}
    with torch.device("meta"):
        twin = Trunk(replace(model.config, block=block, modalities=modalities))
    wanted = twin.state_dict().keys()
    state = {name: tensor.float().cpu() for name, tensor in model.state_dict().items() if name in wanted}
    twin.load_state_dict(state, assign=True)
    return twin.requires_grad_(False).eval()


def _chosen_layers(model: Trunk, modality: str, layers: Sequence[int] | None) -> list[int]:
    """`layers`, or all of them.

    Raises:
        D2V2Error: if one does not exist or none is asked for.
    """
    depth = model.depth(modality)
    chosen = list(range(depth + 1)) if layers is None else sorted(set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer <= depth]
    if wrong or not chosen:
        raise D2V2Error(
            f"layers {wrong or 'to export'}: expected some of 0 to {depth} for {modality}, found "
            f"{', '.join(map(str, chosen)) or 'none'}; 0 is the input of the first block, {depth} the last output"
        )
    return chosen


def require_onnx() -> None:
    """
    Raises:
        MissingExtraError: if a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"ONNX export needs {', '.join(missing)}", "onnx")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxruntime say of torchvision, of their own deprecated calls, and of pre-processing."""
    names = ("torch.onnx", None)
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def export_onnx(
    model: Trunk,
    modality: str,
    path: Path,
    *,
    layers: Sequence[int] | None = None,
    head: GraphHead | None = None,
    single_file_bytes: int = SINGLE_FILE_BYTES,
) -> None:
    """Write one modality's encoder as a graph; see the module docstring for what goes in and out.

    Args:
        model: on any device and of any floating type; the graph is fp32.
        modality: whose encoder.
        path: file to write. Weights of a large model lie beside it, in `path` + `.data`; move both together.
        layers: features to return, 0 to `model.depth(modality)`; None: all, with a head none.
        head: of a fine-tuned model; None: features alone.
        single_file_bytes: weights of more bytes go to that other file.

    Raises:
        D2V2Error: if the modality or a layer does not exist.
        MissingExtraError: if ONNX is not installed.
    """
    require_onnx()
    twin = exportable_encoder(model, modality)
    chosen = [] if layers is None and head is not None else _chosen_layers(twin, modality, layers)
    module = None if head is None else head.module
    kind, config = graph_input(modality), model.config.modalities[modality]
    size = kind.sizes(config, [_TRACED_TOKENS])[0]
    inputs = random_inputs(config, modality, [size, size], size, torch.Generator().manual_seed(0))
    free_axes = {axis: name for axis, name in enumerate(kind.axes) if name is not None}
    num_bytes = weight_bytes(twin)
    logger.info("%s: tracing %d blocks, %.0f MB of weights", path, twin.depth(modality), num_bytes / 1e6)
    started = time.perf_counter()
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            _Graph(twin, modality, chosen, module).eval(),
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=kind.input_names,
            output_names=output_names(chosen, head is not None),
            dynamic_shapes=(free_axes, {0: kind.axes[0], 1: kind.axes[-1]})[: len(inputs)],
        )
    logger.info("%s: traced in %.0f s, writing", path, time.perf_counter() - started)
    _name_nodes(program.model)
    if head is not None:
        program.model.metadata_props[METADATA_KEY] = json.dumps(head.about, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=num_bytes > single_file_bytes)


def _name_nodes(model: Any) -> None:
    """Name every node after its module, and remove the stack traces beside it: they name files of this machine."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        node.name = f"{module}/{node.name}"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def weight_bytes(model: nn.Module) -> int:
    """Size of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


class OnnxEncoder:
    """A graph on the CPU, with as many threads as PyTorch has; tensors in, tensors out."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            MissingExtraError: if ONNX is not installed.
        """
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait by spinning take the cores from PyTorch, which would seem six times as slow beside them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.output_names = [output.name for output in self._session.get_outputs()]
        self.layers = [int(name.removeprefix("layer_")) for name in self.output_names if name.startswith("layer_")]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self._input_names = [given.name for given in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name; inputs in the order of the module docstring."""
        given = {name: tensor.numpy() for name, tensor in zip(self._input_names, inputs, strict=True)}
        found = self._session.run(None, given)
        return {name: torch.from_numpy(array) for name, array in zip(self.output_names, found, strict=True)}


def _expected(graph: _Graph, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same outputs by PyTorch."""
    with torch.inference_mode():
        outputs = graph(*inputs)
    return dict(zip(output_names(graph.layers, graph.head is not None), outputs, strict=True))


def check_onnx(
    model: Trunk, modality: str, path: Path, *, head: GraphHead | None = None, tolerance: float = TOLERANCE
) -> float:
    """Run a graph on batches and lengths that it was not traced with, padded and whole, and compare with PyTorch.

    Args:
        model: that the graph was made of.
        modality: of the graph.
        path: the graph.
        head: that the graph was made with.
        tolerance: largest difference allowed, over the largest feature of the layer in that batch.

    Returns:
        The largest difference found, likewise.

    Raises:
        D2V2Error: if an output differs by more, with batch, size, output and numbers.
        MissingExtraError: if ONNX is not installed.
    """
    graph = OnnxEncoder(path)
    own = _Graph(exportable_encoder(model, modality), modality, graph.layers, None if head is None else head.module)
    from onnxruntime.capi import onnxruntime_pybind11_state as refusals

    config = model.config.modalities[modality]
    generator = torch.Generator().manual_seed(1)
    sizes = graph_input(modality).sizes(config, _CHECKED_TOKENS)
    worst, faults = 0.0, []
    for i, rows in enumerate(_CHECKED_ROWS):
        size = sizes[i % len(sizes)]
        real = [size, size // 2, 0, size - 1, size // 3][:rows]  # a row may be nothing but padding, but for a head
        if head is not None:
            real = [count if config.num_tokens(count) > 0 else size for count in real]
        inputs = random_inputs(config, modality, real, size, generator)
        try:
            found = graph(*inputs)
        except (refusals.Fail, refusals.InvalidArgument, refusals.RuntimeException) as error:
            faults.append(f"{rows} rows of size {size}: onnxruntime cannot run it: {error}")
            continue
        for name, value in _expected(own, inputs).items():
            difference = _largest_difference(found[name], value)
            worst = max(worst, difference)
            if difference > tolerance:
                faults.append(f"{rows} rows of size {size}: {name} differs by {difference:.2g}")
    if faults:
        raise D2V2Error(
            f"{path}: expected PyTorch's features to {tolerance:g} of the largest, found:\n"
            + "\n".join(faults)
            + "\ndo not use this graph"
        )
    return worst


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    """Over the largest expected value; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.float(), expected.float()
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return difference.nan_to_num(float("inf")).item()


def parts_of(path: Path) -> list[Path]:
    """A graph and, where there is one, its file of weights."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path]


def _int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.interop.onnx", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="export folder of the model")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--modality", help="whose encoder; all of them if not given")
    parser.add_argument(
        "--layers", type=_int_list, help="features to return, such as 6,12; all if not given, none beside logits"
    )
    return parser


def _export_checked(
    model: Trunk, modality: str, folder: Path, layers: Sequence[int] | None, head: GraphHead | None
) -> None:
    """Write one modality's graph, alone; it appears in the folder only after the check.

    Raises:
        D2V2Error: another process writes it, or see `export_onnx` and `check_onnx`.
    """
    place = folder / f"{modality}.onnx"
    file = beside(place, "unchecked") / place.name
    with sole_writer(place, D2V2Error):
        _remove_unchecked(file)  # of an export that was killed
        file.parent.mkdir()
        try:
            export_onnx(model, modality, file, layers=layers, head=head)
            worst = check_onnx(model, modality, file, head=head)
            _publish(file, place)
        finally:
            _remove_unchecked(file)
    logger.info("%s: within %.1e of PyTorch's largest feature", place, worst)


def _publish(file: Path, place: Path) -> None:
    """Give a graph its name, its weights first. A graph whose weights are replaced is removed before them."""
    new, old = parts_of(file), parts_of(place)
    for part in new:
        sync(part)
    if len(new) > 1 or len(old) > 1:
        for part in old:
            part.unlink(missing_ok=True)
    for part in reversed(new):
        part.replace(place.with_name(part.name))
    sync(place.parent)


def _remove_unchecked(file: Path) -> None:
    if file.parent.is_symlink():
        file.parent.unlink()
    elif file.parent.exists():
        for part in parts_of(file):
            part.unlink(missing_ok=True)
        file.parent.rmdir()


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        require_onnx()
        exported = ModelFolder(options.folder)
        model, head = load_trunk(exported), graph_head(exported)
        for modality in [options.modality] if options.modality else model.encoders:
            _export_checked(model, modality, options.to, options.layers, head)
    except (D2V2Error, OSError) as error:
        logger.error("%s", error)
        return getattr(error, "exit_code", D2V2Error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
