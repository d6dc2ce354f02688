"""Official data2vec 1.0 files of images: outputs equal transformers' for the same weights, the same bits come back."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError, D2V2Error
from d2v2ds.interop.data2vec1.images.__main__ import main
from d2v2ds.interop.data2vec1.images.official import export_official, import_official
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.task_network import folder_task
from tests.interop.test_data2vec1_image_folders import KINDS, differ, pixels, theirs

INDEX = torch.arange(17 * 17).view(17, 17)
BEIT_NAMES = {
    r"embeddings\.(cls_token|mask_token)": r"\1",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"encoder\.relative_position_bias\.(\w+)": r"rel_pos_bias.\1",
    r"encoder\.layer\.(\d+)\.attention\.attention\.relative_position_bias\.(\w+)": r"blocks.\1.attn.\2",
    r"encoder\.layer\.(\d+)\.attention\.attention\.query\.bias": r"blocks.\1.attn.q_bias",
    r"encoder\.layer\.(\d+)\.attention\.attention\.value\.bias": r"blocks.\1.attn.v_bias",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)": r"blocks.\1.norm1.\2",
    r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)": r"blocks.\1.norm2.\2",
    r"encoder\.layer\.(\d+)\.lambda_(\d)": r"blocks.\1.gamma_\2",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"layernorm\.(\w+)": r"norm.\1",
    r"pooler\.layernorm\.(\w+)": r"fc_norm.\1",
    r"classifier\.(\w+)": r"head.\1",
}
"""Names of the fork of BEiT by those of transformers; queries, keys and values aside."""
FAIRSEQ_NAMES = {
    r"(cls|mask)_token": r"\1_emb",
    r"patch_embed\.proj\.(\w+)": r"patch_embed.conv.\1",
    r"(blocks.*)\.mlp\.fc1\.(\w+)": r"encoder.\1.mlp.0.\2",
    r"(blocks.*)\.mlp\.fc2\.(\w+)": r"encoder.\1.mlp.2.\2",
    r"((?:blocks|norm|rel_pos_bias)\..*)": r"encoder.\1",
}
"""Names of fairseq's port by those of BEiT."""
SECTION = {
    "_name": "data2vec_vision", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4,
    "layer_scale_init_value": 0.0, "num_mask_patches": 6, "min_mask_patches_per_block": 2, "average_top_k_layers": 2,
    "layer_norm_targets": True, "loss_beta": 2.0, "ema_anneal_end_step": "${optimization.max_update}",
}  # fmt: skip
ARGUMENTS = {"l1_beta": 1.5, "num_mask_patches": 6, "target_layers": "[1, 2]", "drop_path": 0.1, "lr": 1e-3}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for pattern, ours in names.items():
            if re.fullmatch(pattern, name):
                found[re.sub(pattern, ours, name)] = value
                break
        else:
            raise AssertionError(name)
    return found


def beit(model: Any) -> dict[str, Tensor]:
    """Weights of a model of transformers in the layout of the fork of BEiT."""
    state = {name.removeprefix("data2vec_vision."): value.clone() for name, value in model.state_dict().items()}
    fused = {}
    for i in range(3):
        prefix = f"encoder.layer.{i}.attention.attention."
        thirds = [state.pop(f"{prefix}{name}.weight") for name in ("query", "key", "value")]
        fused[f"blocks.{i}.attn.qkv.weight"] = torch.cat(thirds)
    return renamed(state, BEIT_NAMES) | fused


def with_index(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    return state | {name.replace("bias_table", "index"): INDEX for name in tables}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted if not n.endswith("relative_position_index"))


def features(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_trunk(ModelFolder(folder)).layers("image", pixels(), with_extra_tokens=True)[-1]


def test_a_file_of_the_fork_of_beit_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = theirs(False, **(KINDS["pretrained"] | {"layer_norm_eps": 1e-6}))
    student = with_index(beit(model)) | {"lm_head.weight": torch.randn(32, 32), "lm_head.bias": torch.randn(32)}
    teacher = {name: value + (0.0 if value.dtype == torch.int64 else 0.1) for name, value in student.items()}
    content = {"model": student, "model_ema": teacher, "args": Namespace(**ARGUMENTS), "epoch": 3}
    torch.save(content, tmp_path / "theirs.pth")
    assert main(["import", str(tmp_path / "theirs.pth"), "--out", str(tmp_path / "ours")]) == 0
    assert "left out, the teacher's targets do not depend on it: heads.image.0.bias" in capsys.readouterr().out
    with torch.no_grad():
        assert differ(features(tmp_path / "ours"), model(pixels()).last_hidden_state) < 2e-6
    folder = ModelFolder(tmp_path / "ours")
    own = folder.description.objective["modalities"]["image"]  # type: ignore[index]
    assert (own["loss"]["beta"], own["mask"]["count"], own["target"]["num_layers"]) == (1.5, 6, 2)
    averaged = load_trunk(folder, "teacher").state_dict()
    assert torch.equal(averaged["blocks.1.mlp.fc1.weight"], teacher["blocks.1.mlp.fc1.weight"])
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same(back["model"], student)
    idle = {"mask_token", "lm_head.weight", "lm_head.bias"}
    assert_same({n: v for n, v in back["model_ema"].items() if n not in idle},
                {n: v for n, v in teacher.items() if n not in idle})  # fmt: skip
    assert import_official(tmp_path / "back.pt", tmp_path / "again")
    assert ModelFolder(tmp_path / "again").description.model == folder.description.model


@pytest.mark.parametrize("whole_teacher", [False, True])
def test_a_file_of_fairseq_and_back(whole_teacher: bool, tmp_path: Path) -> None:
    options = KINDS["as fairseq"] | {"use_mask_token": True, "intermediate_size": 128}
    model = theirs(False, **options)
    student = with_index(renamed(beit(model), FAIRSEQ_NAMES))
    student |= {"final_proj.weight": torch.randn(32, 32), "final_proj.bias": torch.randn(32)}
    moved = {name: value if value.dtype == torch.int64 else value + 0.1 for name, value in student.items()}
    encoder = {name.removeprefix("encoder."): one for name, one in moved.items() if name.startswith("encoder.")}
    weights = student | {"_ema": moved if whole_teacher else encoder}
    section = SECTION | {"ema_transformer_only": not whole_teacher, "layer_scale_init_value": 0.0}
    cfg = {"model": section, "optimization": {"max_update": 40}}
    torch.save({"model": weights, "cfg": cfg, "args": None}, tmp_path / "theirs.pt")
    notes = import_official(tmp_path / "theirs.pt", tmp_path / "ours")
    assert [note for note in notes if "left out" in note] if whole_teacher else notes == []
    with torch.no_grad():
        assert differ(features(tmp_path / "ours"), model(pixels()).last_hidden_state) < 2e-6
    folder = ModelFolder(tmp_path / "ours")
    assert folder.description.objective["ema"]["anneal_steps"] == 40  # type: ignore[index]
    averaged = load_trunk(folder, "teacher").state_dict()
    expected = moved["cls_emb"] if whole_teacher else student["cls_emb"]
    assert torch.equal(averaged["encoders.image.extra.tokens"], expected), "copied where the file has none"
    assert export_official(tmp_path / "ours", tmp_path / "back.pt") == []
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    found = back.pop("_ema")
    assert_same(back, student)
    idle = {"mask_emb", "final_proj.weight", "final_proj.bias"} if whole_teacher else set()
    assert_same({n: v for n, v in found.items() if n not in idle},
                {n: v for n, v in weights["_ema"].items() if n not in idle})  # type: ignore[union-attr]  # fmt: skip


@pytest.mark.parametrize("pools", [True, False])
def test_a_fine_tuned_file_gives_the_logits_of_transformers(pools: bool, tmp_path: Path) -> None:
    model = theirs(True, use_relative_position_bias=True, use_mean_pooling=pools, layer_norm_eps=1e-6, num_labels=5)
    torch.save({"model": with_index(beit(model))}, tmp_path / "theirs.pth")
    assert import_official(tmp_path / "theirs.pth", tmp_path / "ours") == [
        "the file has no names of classes: they have numbers"
    ]
    task, network = folder_task(ModelFolder(tmp_path / "ours"))
    assert task.config.num_outputs == 5
    with torch.no_grad():
        found = network.trunk.layers("image", pixels(), with_extra_tokens=True)[-1]
        assert differ(network.head(found, 1, None), model(pixels()).logits) < 2e-6


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = beit(theirs(False, **(KINDS["pretrained"] | {"layer_norm_eps": 1e-6})))

    def refusal(weights: dict[str, Tensor], kind: type[D2V2Error] = CheckpointError, **others: Any) -> str:
        torch.save({"model": weights, **others}, tmp_path / "theirs.pth")
        with pytest.raises(kind) as caught:
            import_official(tmp_path / "theirs.pth", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        return str(caught.value)

    assert "expected a data2vec 1.0 of images, found x" in refusal({"x": torch.ones(1)})
    lacking = {name: value for name, value in state.items() if name != "blocks.2.norm1.weight"}
    assert "trunk.blocks.2.norm1.weight: missing" in refusal(lacking)
    assert "blocks.1.other: data2vec 1.0" in refusal(state | {"blocks.1.other": torch.ones(1)}, D2V2Error)
    wrong = state | {"blocks.1.norm1.weight": torch.ones(31)}
    assert "trunk.blocks.1.norm1.weight: expected (32,), found" in refusal(wrong)
    args = {"target_layers": [0, 1]}
    assert "target_layers=[0, 1], expected the last" in refusal(state, UnsupportedOptionError, args=args)
    assert "not the configuration of a network" in refusal(state, args={"num_mask_patches": "many"})
