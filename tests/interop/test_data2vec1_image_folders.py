"""Folders of transformers' data2vec 1.0 for images: the same outputs here, and the same bits back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.data2vec1.images.__main__ import main
from d2v2ds.interop.data2vec1.images.transformers_folder import export_folder, import_folder
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.task_network import folder_task
from tests.interop.test_hub import tiny_network, write_export
from tests.objectives.test_data2vec1_images import TRUNK

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "layer_scale_init_value": 0.1, "drop_path_rate": 0.1,
}  # fmt: skip
KINDS = {
    "pretrained": {"use_mask_token": True, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    "as fairseq": {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_norm_eps": 1e-5,
                   "layer_scale_init_value": 0.0},
    "pooled": {"use_relative_position_bias": True, "use_mean_pooling": True},
}  # fmt: skip


def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def theirs(classifies: bool, **options: Any) -> Any:
    """A model of transformers, with no weight at the value that it would have without being loaded."""
    config = transformers.Data2VecVisionConfig(**(SIZES | options))
    kind = transformers.Data2VecVisionForImageClassification if classifies else transformers.Data2VecVisionModel
    torch.manual_seed(3)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_an_encoder_agree_and_its_tensors_come_back(kind: str, tmp_path: Path) -> None:
    model = theirs(False, **KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    assert import_folder(tmp_path / "theirs", tmp_path / "ours") == []
    trunk = load_trunk(ModelFolder(tmp_path / "ours"))
    with torch.no_grad():
        wanted = model(pixels(), output_hidden_states=True)
        found = trunk.layers("image", pixels(), with_extra_tokens=True)
    assert differ(found[-1], wanted.last_hidden_state) < 2e-6
    for one, other in zip(found[:-1], wanted.hidden_states[:-1], strict=True):
        assert differ(one, other) < 2e-6
    export_folder(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, report = transformers.AutoModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(again(pixels()).last_hidden_state, wanted.last_hidden_state)


@pytest.mark.parametrize("pools", [True, False])
def test_logits_of_a_classifier_agree_and_its_tensors_come_back(pools: bool, tmp_path: Path) -> None:
    names = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}}
    model = theirs(True, use_relative_position_bias=True, use_mean_pooling=pools, **names)
    model.save_pretrained(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    task, network = folder_task(ModelFolder(tmp_path / "ours"))
    assert task.config.classes == ("cat", "dog", "eel")
    with torch.no_grad():
        features = network.trunk.layers("image", pixels(), with_extra_tokens=True)[-1]
        wanted = model(pixels()).logits
        assert differ(network.head(features, 1, None), wanted) < 2e-6
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(pixels()).logits, wanted)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_an_export_of_a_run_loads_with_transformers(tmp_path: Path) -> None:
    network = tiny_network(TRUNK)
    export_folder(write_export(tmp_path / "ours", network), tmp_path / "theirs")
    model = transformers.AutoModel.from_pretrained(tmp_path / "theirs")
    small = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = network.layers("image", small, with_extra_tokens=True)[-1]
        assert differ(model(small).last_hidden_state, wanted) < 2e-6
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    assert processor.crop_size == {"height": 16, "width": 16} or processor.crop_size["height"] == 16


def test_older_folders_have_indexes_that_are_no_weights(tmp_path: Path) -> None:
    model = theirs(False, **KINDS["pretrained"])
    model.save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    state["encoder.relative_position_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    (warning,) = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert "image_mean is [0.5, 0.5, 0.5]" in warning
    assert load_trunk(ModelFolder(tmp_path / "ours")).config.shared_depth == 3


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "beit"}, CheckpointError, "expected model_type 'data2vec-vision', found 'beit'"),
        ({"hidden_act": "relu"}, UnsupportedOptionError, "hidden_act='relu', expected 'gelu'"),
        ({"image_size": [32, 64]}, UnsupportedOptionError, "expected a square"),
        ({"use_shared_relative_position_bias": False}, UnsupportedOptionError, "found none"),
        ({"num_hidden_layers": 4}, CheckpointError, "missing: blocks.3"),
        ({"num_hidden_layers": 2}, CheckpointError, "blocks.2"),
        ({"patch_size": 4}, CheckpointError, "expected"),
        ({"hidden_size": 0}, CheckpointError, "hidden_size"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers"),
        ({"layer_norm_eps": "small"}, CheckpointError, "layer_norm_eps"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    theirs(False, **KINDS["pretrained"]).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(kind) as caught:
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()
