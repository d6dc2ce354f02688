"""Official MAE checkpoints and transformers' ViTMAE folders come in and go out unchanged, and compute the same."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v2ds.api import load_model
from d2v2ds.batch import Batch
from d2v2ds.config.load import load_config
from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.mae.__main__ import main
from d2v2ds.interop.mae.files import export_mae, import_mae
from d2v2ds.interop.mae.keymap import to_official, to_ours
from d2v2ds.interop.mae.read import ReadOptions
from d2v2ds.interop.mae.settings import arguments_of, network_of
from d2v2ds.interop.mae.transformers_names import from_official
from d2v2ds.interop.task_network import folder_task
from d2v2ds.objectives.mae import MaeConfig, MaeModality
from d2v2ds.run.warm_start import WarmStart

MICRO = Path(__file__).parents[1] / "golden" / "rivals" / "mae_micro"
HEADS = ReadOptions(heads=4, decoder_heads=3)
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(MICRO.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def weights(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("student/"): value for key, value in case.items() if key.startswith("student/")}


def official(folder: Path, weights: dict[str, Tensor], **content: Any) -> Path:
    torch.save({"model": weights} | content, folder / "mae.pth")
    return folder / "mae.pth"


def encoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(("decoder_", "mask_token"))}


def test_official_names_translate_back_and_forth(weights: dict[str, Tensor]) -> None:
    assert [to_official(to_ours(name) or "") for name in weights] == list(weights)
    assert to_ours("fc.weight") is None


@pytest.mark.parametrize("whole", [True, False])
def test_file_comes_in_and_goes_out_bit_for_bit(whole: bool, weights: dict[str, Tensor], tmp_path: Path) -> None:
    given = weights if whole else encoder_of(weights)
    args = argparse.Namespace(norm_pix_loss=False, lr=1e-3)
    source = official(tmp_path, given, epoch=3, optimizer={"state": {}}, args=args)
    found = import_mae(source, tmp_path / "ours", HEADS)
    assert found.ignored == ["epoch", "optimizer"]
    assert bool(found.warnings) != whole
    export_mae(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")["model"]
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], value) for name, value in given.items())
    again = import_mae(tmp_path / "back.pth", tmp_path / "again")  # what was written names the heads
    assert again.network.trunk == found.network.trunk and again.ignored == []
    folder = ModelFolder(tmp_path / "ours")
    assert folder.description.objective is not None and folder.description.objective["name"] == "mae"
    if whole:
        assert folder.description.objective["modalities"]["image"]["normalise_pixels"] is False
    assert "An MAE encoder" in (tmp_path / "ours" / "README.md").read_text()


def test_imported_encoder_computes_the_recorded_features(
    case: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    import_mae(official(tmp_path, weights), tmp_path / "ours", HEADS)
    trunk = load_model(tmp_path / "ours")
    layers = trunk.layers("image", case["in/source"], with_extra_tokens=True)
    positions = weights["pos_embed"][:, 1:]
    torch.testing.assert_close(layers[0][:, 1:], case["mid/patch_embed_out"] + positions)
    torch.testing.assert_close(layers[0][:, :1], weights["cls_token"].expand(2, -1, -1))


@pytest.fixture(scope="module")
def of_transformers(weights: dict[str, Tensor]) -> Any:
    """A ViTMAE with the weights of the case."""
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=4,
        decoder_num_attention_heads=3, decoder_hidden_size=12, decoder_num_hidden_layers=1,
        decoder_intermediate_size=24, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config).eval()
    missing, unexpected = model.load_state_dict(from_official(weights), strict=False)
    assert not missing and not unexpected
    return model


@torch.no_grad()
def test_folder_of_transformers_comes_in(
    of_transformers: Any, case: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    of_transformers.save_pretrained(tmp_path / "theirs")
    found = import_mae(tmp_path / "theirs", tmp_path / "ours")
    assert found.warnings == []
    assert found.network.trunk.block.norm_eps == 1e-6
    ours = found.trunk | found.beside
    assert all(torch.equal(ours[to_ours(name) or ""], value) for name, value in weights.items())
    everything = {"pixel_values": case["in/source"], "noise": torch.arange(16.0).expand(2, -1)}
    of_transformers.config.mask_ratio = 0.0  # keeps all patches, in the order of the noise
    theirs = of_transformers.vit(**everything).last_hidden_state
    trunk = load_model(tmp_path / "ours")
    layers = trunk.layers("image", case["in/source"], with_extra_tokens=True)
    of_transformers.config.mask_ratio = 0.75
    torch.testing.assert_close(layers[-1], theirs, atol=2e-5, rtol=1e-5)


def older(name: str) -> str:
    """Name in a folder that transformers before version 5 wrote."""
    name = name.replace("vit.layers.", "vit.encoder.layer.").replace("mlp.fc1.", "intermediate.dense.")
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.{letter}_proj.", f"attention.attention.{word}.")
    return name.replace("attention.o_proj.", "attention.output.dense.").replace("mlp.fc2.", "output.dense.")


def test_folder_of_an_older_transformers_comes_in(
    of_transformers: Any, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    tensors = {older(name): value for name, value in from_official(weights).items()}
    assert "vit.encoder.layer.0.attention.attention.query.weight" in tensors
    save_file(tensors, folder / "model.safetensors")
    of_transformers.config.save_pretrained(folder)
    found = import_mae(folder, tmp_path / "ours")
    assert all(torch.equal((found.trunk | found.beside)[to_ours(n) or ""], value) for n, value in weights.items())


@torch.no_grad()
def test_folder_for_transformers_loads_there_and_computes_the_recorded_loss(
    case: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    import_mae(official(tmp_path, weights), tmp_path / "ours", HEADS)
    arguments = ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs"), "--transformers"]
    assert main(arguments) == 0
    model, said = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    out = model.eval()(pixel_values=case["in/source"], noise=case["mask/noise"])
    torch.testing.assert_close(out.loss, case["loss/total"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logits, case["out/pred"], rtol=1e-4, atol=2e-5)
    assert main(arguments) != 0, "a folder with files is not overwritten"


def test_run_goes_on_from_an_import(weights: dict[str, Tensor], tmp_path: Path) -> None:
    import_mae(official(tmp_path, weights), tmp_path / "ours", HEADS)
    sizes = [
        "model.block.width=16", "model.block.mlp_ratio=2", "model.shared_depth=2",
        "model.modalities.image.image_size=16",
        "objective.modalities.image.decoder={width: 12, depth: 1, num_heads: 3, mlp_ratio: 2}", "data.shards=x",
    ]  # fmt: skip
    start = WarmStart(load_config("mae/tiny", sizes), tmp_path / "ours")
    assert start.faults() == [] and start.fresh() == []
    other = WarmStart(load_config("mae/tiny", [*sizes, "model.block.num_heads=2"]), tmp_path / "ours")
    assert any("model.block.num_heads" in fault for fault in other.faults())


def faulty(weights: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], str]]:
    lacking = dict(weights)
    del lacking["blocks.1.norm1.bias"]
    yield "missing tensor", lacking, "blocks.1.norm1.bias: missing"
    yield "unknown tensor", weights | {"blocks.0.gamma_1": torch.zeros(16)}, "blocks.0.gamma_1: not a tensor"
    yield "other shape", weights | {"decoder_pred.bias": torch.zeros(5)}, "expected (48,), found (5,)"
    yield "no square", weights | {"pos_embed": torch.zeros(1, 16, 16)}, "1 + n x n rows, found 16"
    yield "no MAE", {"fc.weight": torch.zeros(2, 3)}, "expected an MAE with cls_token"
    yield "half a head", weights | {"fc_norm.weight": torch.zeros(16)}, "head.norm.weight: not a tensor"


def test_damaged_files_are_refused_by_name(weights: dict[str, Tensor], tmp_path: Path) -> None:
    for name, given, said in faulty(weights):
        with pytest.raises(CheckpointError) as error:
            import_mae(official(tmp_path, given), tmp_path / "ours", HEADS)
        assert said in str(error.value), name
        assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("options", [ReadOptions(), ReadOptions(heads=4), ReadOptions(heads=-4, decoder_heads=3)])
def test_heads_that_weights_do_not_show_are_asked_for(
    options: ReadOptions, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="--heads|--decoder-heads|greater than"):
        import_mae(official(tmp_path, weights), tmp_path / "ours", options)


def test_published_sizes_need_no_options() -> None:
    for name, heads in (("base", 12), ("large", 16), ("huge14", 16)):
        config = load_config(f"mae/{name}")
        own = config.objective.modalities["image"]
        arguments = arguments_of(config.model, own)
        assert arguments["num_heads"] == heads
        found = network_of(arguments)
        assert MaeConfig(modalities={"image": found.objective}).check(found.trunk) == []
        assert found.trunk == config.model
        assert found.objective == MaeModality(mask=own.mask, decoder=own.decoder)


def test_position_of_the_cls_token_goes_into_the_token(weights: dict[str, Tensor], tmp_path: Path) -> None:
    moved = weights["pos_embed"].clone()
    moved[:, 0] = 0.5
    found = import_mae(official(tmp_path, weights | {"pos_embed": moved}), tmp_path / "ours", HEADS)
    assert any("added to cls_token" in warning for warning in found.warnings)
    torch.testing.assert_close(found.trunk["encoders.image.extra.tokens"], weights["cls_token"] + 0.5)
    assert found.trunk["encoders.image.fixed_positions.table"][:, 0].abs().max() == 0


@torch.no_grad()
def test_fine_tuned_file_computes_its_logits_and_goes_out_again(weights: dict[str, Tensor], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"fc_norm.weight": (16,), "fc_norm.bias": (16,), "head.weight": (3, 16), "head.bias": (3,)}
    head = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    given = {name: value for name, value in encoder_of(weights).items() if not name.startswith("norm.")} | head
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    options = ReadOptions(heads=4, outputs=tmp_path / "classes.txt")
    found = import_mae(official(tmp_path, given), tmp_path / "ours", options)
    assert found.warnings == [] and found.task is not None and found.task.classes == ("cat", "dog", "cow")
    task, network = folder_task(ModelFolder(tmp_path / "ours"))
    source = torch.randn(2, 3, 16, 16, generator=generator)
    logits = network(Batch(modality="image", source=source, ids=torch.arange(2)))["logits"]
    x = network.trunk.layers("image", source)[-1].mean(1)  # patches behind the last block, without a norm
    pooled = torch.nn.functional.layer_norm(x, (16,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
    torch.testing.assert_close(logits, pooled @ head["head.weight"].T + head["head.bias"])
    assert not hasattr(network.trunk, "norm")
    export_mae(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")["model"]
    assert back.keys() == given.keys() and all(torch.equal(back[name], value) for name, value in given.items())
    del given["fc_norm.weight"]
    with pytest.raises(UnsupportedOptionError, match="CLS token"):
        import_mae(official(tmp_path, given), tmp_path / "other", options)


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "ours")]) != 0
    assert "expected model_type vit_mae, found 'vit'" in capsys.readouterr().err
