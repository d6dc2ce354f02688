"""data2vec 1.0 checkpoints of fairseq and of transformers come in and go out; tensors keep their bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v2ds.config.load import load_config
from d2v2ds.errors import CheckpointError
from d2v2ds.interop.data2vec1.__main__ import main
from d2v2ds.interop.data2vec1.files import import_first
from d2v2ds.interop.data2vec1.read import read_first
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.read import read_official
from d2v2ds.model.trunk import Trunk
from d2v2ds.run.warm_start import WarmStart

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden" / "data2vec1"
NAMES = {"audio": "v1_audio_pad", "text": "v1_text_maskedteacher"}
EMA = {"audio": "_ema", "text": "encoder._ema"}
CLASSES = {"audio": "Data2VecAudioModel", "text": "Data2VecTextModel"}
DEFAULTS = {
    "audio": {"quantize_input": False, "latent_vars": 320, "mask_channel_prob": 0.0, "target_glu": False},
    "text": {"max_positions": 512, "classification_head_name": ""},
}  # fmt: skip
"""Options that whole files have beside, as they stand in the official code."""


def recorded(modality: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Section, student and teacher of a golden case."""
    tensors = load_file(GOLDEN / f"{NAMES[modality]}.safetensors")
    section = json.loads((GOLDEN / f"{NAMES[modality]}.json").read_text())["model"]
    student, teacher = (
        {key.removeprefix(part): one for key, one in tensors.items() if key.startswith(part)}
        for part in ("student/", "teacher/")
    )
    return section, student, teacher


def official_file(
    path: Path, modality: str, *, old: bool = False, teacher: bool = True, section: dict[str, Any] | None = None
) -> Path:
    """The file that the official code would write of a golden case; `old` as the released ones are."""
    own, student, averaged = recorded(modality)
    weights: dict[str, Any] = dict(student)
    if old and modality == "audio":
        weights = {name.replace("final_proj.", "final_proj.0."): one for name, one in student.items()}
    elif old:
        renamed = {
            "encoder.": "decoder.",
            ".layernorm_embedding.": ".emb_layer_norm.",
            ".regression_head.": ".lm_head.",
        }
        for now, before in renamed.items():
            weights = {name.replace(now, before, 1): one for name, one in weights.items()}
        weights["encoder.target_model.embed_tokens.weight"] = torch.zeros(3)
    if teacher:
        weights[EMA[modality]] = averaged
    settings = own | DEFAULTS[modality] | (section or {})
    torch.save({"args": None, "cfg": {"model": settings, "task": {"data": "x"}}, "model": weights, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("modality", NAMES)
@pytest.mark.parametrize("old", [False, True], ids=["of today", "released"])
def test_a_file_comes_in_and_goes_out_with_every_bit(modality: str, old: bool, tmp_path: Path) -> None:
    source, folder, back = official_file(tmp_path / "a.pt", modality, old=old), tmp_path / "in", tmp_path / "b.pt"
    assert main(["import", str(source), "--out", str(folder)]) == 0
    assert all(ModelFolder(folder).has(part) for part in ("model", "objective", "teacher"))
    assert "data2vec 1.0" in (folder / "README.md").read_text()
    assert main(["export", str(folder), "--out", str(back)]) == 0
    written = torch.load(back, weights_only=True)["model"]
    _, student, teacher = recorded(modality)
    assert written.keys() == student.keys() | {EMA[modality]}
    assert all(torch.equal(written[name], student[name]) for name in student)
    assert written[EMA[modality]].keys() == teacher.keys()
    assert all(torch.equal(written[EMA[modality]][name], teacher[name]) for name in teacher)
    again = read_first(back)
    first = read_first(source)
    assert again.network == first.network
    assert any("latent_vars=320" in one or "classification_head_name" in one for one in first.ignored)


def test_without_a_teacher_a_run_starts_with_the_students(tmp_path: Path) -> None:
    found = read_first(official_file(tmp_path / "a.pt", "audio", teacher=False))
    assert found.teacher is None
    assert any("no teacher in the file" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"layer_norm_first": True}, UnsupportedOptionError, "model.layer_norm_first=True"),
        ({"quantize_input": True}, UnsupportedOptionError, "model.quantize_input=True"),
        ({"encoder_layers": 4}, CheckpointError, "trunk.blocks.3"),
        ({"encoder_attention_heads": 0}, CheckpointError, "not the configuration of a network"),
        ({"encoder_layers": -1}, CheckpointError, "not the configuration of a network"),
        ({"conv_feature_layers": "exit()"}, CheckpointError, "not the configuration of a network"),
        ({"_name": "wav2vec2"}, CheckpointError, "expected a configuration of data2vec_audio"),
    ],
)
def test_what_does_not_fit_is_named(
    section: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read_first(official_file(tmp_path / "a.pt", "audio", section=section))


def test_other_files_are_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = official_file(tmp_path / "a.pt", "audio")
    with pytest.raises(CheckpointError, match="python -m d2v2ds.interop.data2vec1"):
        read_official(source)
    torch.save({"model": {"other.weight": torch.zeros(1)}}, tmp_path / "b.pt")
    assert main(["import", str(tmp_path / "b.pt"), "--out", str(tmp_path / "x")]) == 2
    assert "expected a data2vec 1.0 of audio or text" in capsys.readouterr().err
    content = torch.load(source, weights_only=True)
    content["model"]["encoder.other.weight"] = torch.zeros(1)
    torch.save(content, source)
    with pytest.raises(CheckpointError, match="unknown to our network: encoder.other.weight"):
        read_first(source)


def inputs(modality: str) -> Tensor:
    """Two inputs without padding."""
    generator = torch.Generator().manual_seed(0)
    if modality == "audio":
        return torch.randn(2, 1900, generator=generator)
    return torch.randint(4, 40, (2, 20), generator=generator)


def features(folder: Path, modality: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of our blocks, after the input of the first."""
    model = ModelFolder(folder)
    trunk = Trunk(model.description.model).eval()
    trunk.load_state_dict(dict(model.tensors("model")))
    source = inputs(modality)
    with torch.no_grad():
        return trunk.to(dtype).layers(modality, source.to(dtype) if source.is_floating_point() else source)


@pytest.mark.parametrize("modality", NAMES)
def test_transformers_gives_the_same_features_and_a_folder_of_it_comes_back(
    modality: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_first(official_file(tmp_path / "a.pt", modality), tmp_path / "in")
    hub, back = tmp_path / "hub", tmp_path / "back"
    assert main(["export", str(tmp_path / "in"), "--out", str(hub), "--transformers"]) == 0
    assert "transformers has no place for" in capsys.readouterr().out
    extra = {"add_pooling_layer": False} if modality == "text" else {}
    model, loading = getattr(transformers, CLASSES[modality]).from_pretrained(hub, output_loading_info=True, **extra)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    model.save_pretrained(tmp_path / "saved")
    for dtype, tolerance in ((torch.float32, 4e-6), (torch.float64, 1e-12)):
        source = inputs(modality)
        source = source.to(dtype) if source.is_floating_point() else source
        with torch.no_grad():
            found = model.to(dtype).eval()(source, output_hidden_states=True).hidden_states
        ours = features(tmp_path / "in", modality, dtype)
        assert len(found) == len(ours)
        for mine, theirs in zip(ours, found, strict=True):
            assert (mine - theirs).abs().max() < tolerance * theirs.abs().max()

    assert main(["import", str(tmp_path / "saved"), "--out", str(back)]) == 0
    assert "draws one anew" in capsys.readouterr().out
    before, after = (dict(ModelFolder(one).tensors("model")) for one in (tmp_path / "in", back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folder_of_a_task_gives_its_encoder_and_other_settings_are_named(tmp_path: Path) -> None:
    settings = {
        "vocab_size": 45, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 34, "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1,
    }  # fmt: skip
    model = transformers.Data2VecTextForMaskedLM(transformers.Data2VecTextConfig(**settings))
    torch.nn.init.zeros_(model.data2vec_text.embeddings.token_type_embeddings.weight)
    model.save_pretrained(tmp_path / "task")
    found = read_first(tmp_path / "task")
    assert any("lm_head" in name for name in found.ignored)
    weight = model.data2vec_text.embeddings.word_embeddings.weight
    assert torch.equal(found.trunk["encoders.text.local.tokens.weight"], weight)

    written = json.loads((tmp_path / "task" / "config.json").read_text())
    (tmp_path / "task" / "config.json").write_text(json.dumps(written | {"layer_norm_eps": 1e-12}))
    with pytest.raises(UnsupportedOptionError, match="layer_norm_eps=1e-12, expected 1e-05"):
        read_first(tmp_path / "task")
    (tmp_path / "task" / "config.json").write_text(json.dumps(written))
    tensors = load_file(tmp_path / "task" / "model.safetensors")
    tensors["data2vec_text.embeddings.token_type_embeddings.weight"] += 1
    save_file(tensors, tmp_path / "task" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedOptionError, match="token_type_embeddings.weight: expected zeros"):
        read_first(tmp_path / "task")
    (tmp_path / "task" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="expected model_type data2vec-audio or data2vec-text, found 'bert'"):
        read_first(tmp_path / "task")


SMALL = [
    "model.block.width=32", "model.block.num_heads=4", "model.block.mlp_ratio=2", "model.shared_depth=3",
    "model.modalities.audio.conv_layers=[[16,10,5],[16,3,2],[16,3,2],[16,2,2]]",
    "objective.modalities.audio.target.num_layers=3",
]  # fmt: skip


def test_an_imported_folder_begins_pretraining_and_fine_tuning(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    import_first(official_file(tmp_path / "a.pt", "audio"), folder)
    config = load_config("data2vec1/audio_base", [*SMALL, f"init.weights={folder}"])
    start = WarmStart(config, folder)
    assert start.faults() == []
    assert start.fresh() == []
    trunk = [*(one for one in SMALL if not one.startswith("objective")), "objective.mask.channels.length=8"]
    tuning = load_config("finetune/ctc_base_10h", [*trunk, f"init.weights={folder}"])
    faults = WarmStart(tuning, folder).faults()
    assert all("model.modalities.audio.alibi" in one for one in faults)
    assert faults
    tuning = load_config(
        "finetune/ctc_base_10h", [*trunk, f"init.weights={folder}", "model.modalities.audio.alibi=false"]
    )
    start = WarmStart(tuning, folder)
    assert start.faults() == []
    assert start.fresh() == ["head.proj"]


def test_a_network_that_the_official_options_cannot_express_is_not_written(tmp_path: Path) -> None:
    import_first(official_file(tmp_path / "a.pt", "audio"), tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    values = json.loads(path.read_text())
    values["objective"]["modalities"]["audio"]["share_local_encoder"] = False
    path.write_text(json.dumps(values))
    assert main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "b.pt")]) == 2
    assert not (tmp_path / "b.pt").exists()
    values["objective"]["name"] = "data2vec2"
    path.write_text(json.dumps(values))
    assert main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "b.pt")]) == 2
