"""ONNX graphs give PyTorch's features for any batch and length; a graph that does not is not let through."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v2ds.batch import Batch
from d2v2ds.errors import D2V2Error, MissingExtraError
from d2v2ds.interop.export_folder import Description, Kind, ModelFolder
from d2v2ds.interop.export_write import write_config, write_tensors
from d2v2ds.interop.onnx import graph as onnx_graphs
from d2v2ds.interop.onnx.graph import OnnxEncoder, check_onnx, export_onnx, main, random_inputs
from d2v2ds.interop.onnx.head import graph_head
from d2v2ds.modalities.text.modality import TEXT
from d2v2ds.model.attention import Attention
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.trunk import Trunk
from d2v2ds.run.task_model import load_task
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from tests.interop.folders import published_preprocessing
from tests.model.tiny_joint import joint_trunk_config
from tests.run.test_evaluation import write

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.run
MODALITIES = ("audio", "image", "text")


def small_model() -> Trunk:
    """A prenet block and two shared ones; ALiBi for speech (a scale for each block) and text, two extra tokens."""
    config = joint_trunk_config(width=64)
    changes = {"audio": {"alibi_per_block": True}, "image": {"num_extra_tokens": 2}, "text": {"alibi": True}}
    modalities = {name: replace(config.modalities[name], **change) for name, change in changes.items()}
    trunk = Trunk(replace(config, modalities=modalities))
    initialise(trunk_parts(trunk), 0)
    with torch.no_grad():
        for module in trunk.modules():
            if isinstance(module, Attention):
                module.qkv.weight.mul_(8)  # logits that matter, so that a wrong bias shows
    return trunk.eval()


@pytest.fixture(scope="module")
def model() -> Trunk:
    return small_model()


@pytest.fixture(scope="module")
def graphs(model: Trunk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One graph of each modality with layers 0, 1 and 3."""
    folder = tmp_path_factory.mktemp("graphs")
    for modality in MODALITIES:
        export_onnx(model, modality, folder / f"{modality}.onnx", layers=(0, 1, 3))
    return {modality: folder / f"{modality}.onnx" for modality in MODALITIES}


def noise(model: Trunk, modality: str, rows: int, size: int, seed: int = 3) -> tuple[torch.Tensor, ...]:
    config = model.config.modalities[modality]
    return random_inputs(config, modality, [size] * rows, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("modality", MODALITIES)
def test_graph_gives_the_features_of_pytorch(model: Trunk, graphs: dict[str, Path], modality: str) -> None:
    assert check_onnx(model, modality, graphs[modality]) < 1e-5


@pytest.mark.parametrize("modality, rows, size", [("audio", 1, 41), ("audio", 5, 977), ("text", 1, 1), ("text", 3, 24)])
def test_batch_and_length_are_free(model: Trunk, graphs: dict[str, Path], modality: str, rows: int, size: int) -> None:
    source, padding = noise(model, modality, rows, size)
    found = OnnxEncoder(graphs[modality])(source, padding)
    with torch.inference_mode():
        expected = model.layers(modality, source)  # nothing padded, none given
    for i in (0, 1, 3):
        assert torch.allclose(found[f"layer_{i}"], expected[i], atol=1e-5)
    assert found["token_padding"].shape == expected[0].shape[:2] and not found["token_padding"].any()


@pytest.mark.parametrize("modality, sizes", [("audio", (400, 777, 130)), ("text", (9, 24, 2))])
def test_padded_row_equals_the_same_row_alone(
    model: Trunk, graphs: dict[str, Path], modality: str, sizes: tuple[int, ...]
) -> None:
    graph, config = OnnxEncoder(graphs[modality]), model.config.modalities[modality]
    source, padding = random_inputs(config, modality, sizes, max(sizes), torch.Generator().manual_seed(4))
    together = graph(source, padding)
    for row, size in enumerate(sizes):
        alone = graph(source[row : row + 1, :size], padding[row : row + 1, :size])
        real = ~together["token_padding"][row]
        assert real.sum() == config.num_tokens(size)
        for name in ("layer_0", "layer_1", "layer_3"):
            assert torch.allclose(together[name][row][real], alone[name][0], atol=1e-5), name


def test_image_graph_takes_any_number_of_images(model: Trunk, graphs: dict[str, Path]) -> None:
    (source,) = noise(model, "image", 7, 16)
    found = OnnxEncoder(graphs["image"])(source)
    assert found["layer_3"].shape == (7, 16, 64) and found["token_padding"].shape == (7, 16)


def test_other_attention_and_precision_export_the_same_graph(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = small_model()
    other = Trunk(replace(model.config, block=replace(model.config.block, attention_path="rowwise")))
    other.load_state_dict(model.state_dict())
    other.train().double()
    export_onnx(other, "text", tmp_path / "text.onnx", layers=(0, 1, 3))
    assert other.training and next(other.parameters()).dtype == torch.float64
    assert (tmp_path / "text.onnx").read_bytes() == graphs["text"].read_bytes()


def test_graph_names_no_file_of_this_machine(graphs: dict[str, Path]) -> None:
    for path in graphs.values():
        assert b".py" not in path.read_bytes()


def test_large_weights_lie_beside_the_graph(model: Trunk, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    export_onnx(model, "text", path, single_file_bytes=1000)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for part in onnx_graphs.parts_of(path):
        part.rename(moved / part.name)
    assert (moved / "text.onnx.data").stat().st_size > 50_000
    assert check_onnx(model, "text", moved / "text.onnx") < 1e-5


def test_graph_of_other_weights_is_caught(model: Trunk, graphs: dict[str, Path]) -> None:
    other = small_model()
    with torch.no_grad():
        other.encoders["audio"].alibi.scale.mul_(1.05)  # type: ignore[union-attr, operator]
    with pytest.raises(D2V2Error, match=r"4 rows of size \d+: layer_1 differs by \d"):
        check_onnx(other, "audio", graphs["audio"])


def test_graph_that_overlooks_padding_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    encoder_class = type(model.encoders["text"])
    biases = encoder_class.biases
    monkeypatch.setattr(encoder_class, "biases", lambda self, places, padding, depth: biases(self, places, None, depth))
    export_onnx(model, "text", tmp_path / "text.onnx", layers=(3,))
    check_onnx(model, "text", tmp_path / "text.onnx")  # while PyTorch overlooks it, too
    monkeypatch.undo()
    with pytest.raises(D2V2Error) as caught:
        check_onnx(model, "text", tmp_path / "text.onnx")
    assert "4 rows of size 9: layer_3" in str(caught.value) and "1 rows" not in str(caught.value)


def test_graph_that_gives_no_number_is_caught(tmp_path: Path) -> None:
    model = small_model()
    good = small_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] = float("nan")  # type: ignore[union-attr, index]
    export_onnx(model, "image", tmp_path / "image.onnx", layers=(3,))
    with pytest.raises(D2V2Error, match="layer_3 differs by inf"):
        check_onnx(good, "image", tmp_path / "image.onnx")


def test_graph_with_a_fixed_length_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(type(TEXT), "graph", replace(TEXT.graph, axes=("batch", None)))
    export_onnx(model, "text", tmp_path / "text.onnx", layers=(3,))
    monkeypatch.undo()
    with pytest.raises(D2V2Error, match="(?s)1 rows of size 1: onnxruntime cannot run it: .*Expected: 23"):
        check_onnx(model, "text", tmp_path / "text.onnx")


def test_wrong_requests_name_what_there_is(model: Trunk, tmp_path: Path) -> None:
    with pytest.raises(D2V2Error, match="'video': this model has audio, image, text"):
        export_onnx(model, "video", tmp_path / "a.onnx")
    with pytest.raises(D2V2Error, match=r"layers \[4\]: expected some of 0 to 3 for text, found 2, 4"):
        export_onnx(model, "text", tmp_path / "a.onnx", layers=(4, 2))
    with pytest.raises(D2V2Error, match="found none"):
        export_onnx(model, "text", tmp_path / "a.onnx", layers=())
    assert not list(tmp_path.iterdir())


def test_missing_extra_names_its_install(model: Trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"needs onnxruntime: in the checkout of d2v2ds, pip install '.\[onnx\]'"
    ):
        export_onnx(model, "text", tmp_path / "a.onnx")


def write_folder(model: Trunk, folder: Path) -> Path:
    tensors = model.state_dict()
    folder.mkdir()
    write_tensors(folder, "model", {name: Kind.of(value) for name, value in tensors.items()}, tensors.items())
    description = Description(model=model.config, preprocessing=published_preprocessing(model.config), origin={})
    write_config(folder, description, {})
    return folder


def test_command_writes_the_graph_and_reports_its_check(
    model: Trunk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, to = write_folder(model, tmp_path / "folder"), tmp_path / "graphs"
    with caplog.at_level("INFO"):
        assert main([str(folder), "--to", str(to), "--modality", "text", "--layers", "1,3"]) == 0
    assert [file.name for file in to.iterdir()] == ["text.onnx"]
    assert OnnxEncoder(to / "text.onnx").layers == [1, 3]
    assert re.search(r"text\.onnx: within \d\.\de-0\d of PyTorch's largest feature", caplog.text)


def test_command_leaves_nothing_that_failed_the_check(
    model: Trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, to = write_folder(model, tmp_path / "folder"), tmp_path / "graphs"
    monkeypatch.setattr(onnx_graphs, "_largest_difference", lambda found, expected: 2e-4)
    assert main([str(folder), "--to", str(to), "--modality", "image", "--layers", "3"]) == 2
    assert "do not use this graph" in caplog.text and not list(to.iterdir())


def test_one_process_writes_a_graph_and_what_a_killed_one_left_goes(
    model: Trunk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, to = write_folder(model, tmp_path / "folder"), tmp_path / "graphs"
    (to / ".text.onnx.unchecked").mkdir(parents=True)
    for name in ("text.onnx", "text.onnx.data"):
        (to / ".text.onnx.unchecked" / name).write_text("half")
    given = [str(folder), "--to", str(to), "--modality", "text", "--layers", "3"]
    with held_elsewhere(to / "text.onnx"):
        assert main(given) == 2
    assert "text.onnx: another process is at work on it" in caplog.text and not (to / "text.onnx").exists()
    assert main(given) == 0
    assert [file.name for file in to.iterdir()] == ["text.onnx"]


@contextlib.contextmanager
def held_elsewhere(path: Path) -> Iterator[None]:
    """Another process that is at work on an output."""
    code = (
        "import sys; from pathlib import Path; from d2v2ds.io.output import sole_writer; from d2v2ds.errors import *\n"
        "with sole_writer(Path(sys.argv[1]), D2V2Error): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield
        process.communicate(b"")


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_no_graph_reads_the_weights_of_another(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any of the renames, a folder has the old graph with its weights, or no graph."""
    names, place = ("text.onnx", "text.onnx.data"), tmp_path / "text.onnx"
    (tmp_path / "unchecked").mkdir()
    for count, folder, content in ((before, tmp_path, "old"), (after, tmp_path / "unchecked", "new")):
        for name in names[:count]:
            (folder / name).write_text(content)
    replace_file = Path.replace

    def replace_once(path: Path, to: Path) -> Path:
        found = {part.read_text() for part in onnx_graphs.parts_of(place)} if place.exists() else set()
        assert len(found) < 2
        return replace_file(path, to)

    monkeypatch.setattr(Path, "replace", replace_once)
    onnx_graphs._publish(tmp_path / "unchecked" / "text.onnx", place)
    assert {part.read_text() for part in onnx_graphs.parts_of(place)} == {"new"}
    assert len(onnx_graphs.parts_of(place)) == after


@pytest.mark.parametrize(
    "config",
    [
        CtcConfig(modality="audio", vocabulary=("|", "a", "b")),
        ClassifyConfig(modality="image", classes=("cat", "owl"), head=PatchHeadConfig()),
        ClassifyConfig(modality="image", classes=("cat", "owl"), head=PatchHeadConfig(pooling="cls")),
        ClassifyConfig(modality="audio", kind="several", classes=("cat", "owl", "dog"), head=FrameHeadConfig()),
        ClassifyConfig(modality="text", kind="number", scale=5.0, head=SentenceHeadConfig()),
    ],
    ids=["ctc", "patches", "cls", "frames", "sentence"],
)
def test_a_fine_tuned_export_has_logits(config: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config)
    assert main([str(folder), "--to", str(tmp_path), "--layers", "3"]) == 0
    graph = OnnxEncoder(tmp_path / f"{config.modality}.onnx")
    assert graph.output_names == ["layer_3", "logits", "token_padding"]
    model = load_task(folder)
    network_config = model.task.trunk.modalities[config.modality]
    size = onnx_graphs.graph_input(config.modality).sizes(network_config, [17])[0]
    inputs = random_inputs(network_config, config.modality, [size, size - 3], size, torch.Generator().manual_seed(8))
    padding = inputs[1] if len(inputs) > 1 else None
    batch = Batch(modality=config.modality, source=inputs[0], padding=padding, ids=torch.arange(2))
    with torch.inference_mode():
        expected = model.network(batch)["logits"]
    found = graph(*inputs)["logits"]
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())) and expected.std() > 0.01
    about = json.loads(graph.metadata["d2v2ds"])
    assert about["task"] == config.name and about["preprocessing"] == model.preprocessing
    if isinstance(config, CtcConfig):
        assert about["outputs"] == ["<s>", "<pad>", "</s>", "<unk>", "|", "a", "b"]
    else:
        assert (about["outputs"], about["kind"], about["scale"]) == (list(config.classes), config.kind, config.scale)
    head = graph_head(ModelFolder(folder))
    assert head is not None
    with torch.no_grad():
        next(head.module.parameters()).mul_(1.01)
    with pytest.raises(D2V2Error, match="logits differs by"):
        check_onnx(model.network.trunk, config.modality, tmp_path / f"{config.modality}.onnx", head=head)


def test_logits_are_the_only_output_unless_layers_are_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CtcConfig(modality="audio", vocabulary=("|", "a")))
    assert main([str(folder), "--to", str(tmp_path)]) == 0
    assert OnnxEncoder(tmp_path / "audio.onnx").output_names == ["logits", "token_padding"]
