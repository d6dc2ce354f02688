"""Models of data2vec 1.0 for images (pre-norm, relative positions, CLS token) in every form that an export takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2v2ds.config.load import load_config
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.run.warm_start import WarmStart
from tests.interop.test_hub import load, tiny_network, write_export
from tests.objectives.test_data2vec1_images import NETWORK, TRUNK

PER_BLOCK = replace(TRUNK, modalities={"image": replace(NETWORK, relative_per_block=True)})
FINETUNED = replace(PER_BLOCK, final_norm=False)
TABLE = "trunk.encoders.image.relative.table"


def layers(model: Trunk, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return model.layers("image", pixels)


def test_the_last_features_alone_have_the_final_norm() -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    normed, bare = tiny_network(TRUNK), Trunk(replace(TRUNK, final_norm=False)).eval()
    bare.load_state_dict({name: value for name, value in normed.state_dict().items() if not name.startswith("norm.")})
    found, plain = layers(normed, pixels), layers(bare, pixels)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], plain[:-1], strict=True))
    with torch.no_grad():
        torch.testing.assert_close(found[-1], normed.norm(plain[-1]))


@pytest.mark.parametrize("config", [TRUNK, FINETUNED], ids=["shared table", "as fine-tuned"])
def test_transformers_gives_the_same_features(config: TrunkConfig, tmp_path: Path, own_cache: None) -> None:
    pytest.importorskip("transformers", reason="needs the extra `hub`")
    network = tiny_network(config)
    folder = write_export(tmp_path / "model", network)
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    wanted = layers(network, pixels)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(layers(load_trunk(ModelFolder(folder)), pixels)[-1], wanted[-1])
    new = type(model)(model.config)
    assert not new.encoders["image"].relative.table.any()
    assert (new.blocks[0].mlp_scale.factors == 1.0).all()


@pytest.mark.slow
def test_onnx_gives_the_same_features(tmp_path: Path) -> None:
    """`export_onnx` compares the graph with PyTorch itself."""
    pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    from d2v2ds.interop.onnx.graph import export_onnx

    export_onnx(tiny_network(replace(PER_BLOCK, shared_depth=3)), "image", tmp_path / "image.onnx", layers=[0, 3])
    assert (tmp_path / "image.onnx").stat().st_size > 10_000


# --- fine-tuning from a pretrained export -----------------------------------------------------------------------------


def start(folder: Path, trunk: TrunkConfig) -> WarmStart:
    config = load_config("finetune/image_classify_tiny")
    return WarmStart(replace(config, model=trunk, init=replace(config.init, weights=folder)), folder)


def test_every_block_gets_a_copy_of_the_shared_table(tmp_path: Path) -> None:
    network = tiny_network(TRUNK)
    folder = write_export(tmp_path / "model", network)
    found = start(folder, FINETUNED)
    assert found.faults() == []
    assert found.fresh() == ["head.norm", "head.proj"]
    table = found.reader("model")(TABLE)
    assert table is not None and table.shape[0] == TRUNK.shared_depth
    assert all(torch.equal(own, network.encoders["image"].relative.table[0]) for own in table)
    assert found.reader("model")("trunk.norm.weight") is None, "the head has a norm of its own"


def test_tables_of_blocks_do_not_become_a_shared_one(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "model", tiny_network(PER_BLOCK))
    assert start(folder, PER_BLOCK).faults() == []
    (fault,) = start(folder, TRUNK).faults()
    assert "encoders.image.relative.table has shape (3, 52, 2), this run's (1, 52, 2)" in fault
