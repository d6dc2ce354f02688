"""Official files that are whole, old, fine-tuned, damaged or something else; golden cases in the official layout."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from d2v2ds import FeatureExtractor, load_model
from d2v2ds.config.load import load_config
from d2v2ds.errors import CheckpointError
from d2v2ds.interop.export_folder import ModelFolder, load_trunk
from d2v2ds.interop.fairseq.__main__ import main
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.read import OWN_LICENCE, OfficialCheckpoint, read_official
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.modalities.text.tokenizers import load_tokenizer
from d2v2ds.objectives.data2vec2 import Data2Vec2Network
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.verify.case import Case, case_names
from d2v2ds.verify.networks import set_noise, total_loss
from tests.inference.test_api import small_tokenizer
from tests.interop.folders import tiny_config
from tests.interop.folders import write_folder as write_tiny_folder
from tests.interop.official_files import PUBLISHED, content_of, save
from tests.interop.test_fairseq_layout import assert_same_tensors, one_modality, student_of, write_back
from tests.interop.test_folder import changed
from tests.oracles import official_image_text, official_step
from tests.verify.test_verify_oracle_cases import CASES, case

MICRO = Path(__file__).parents[1] / "golden" / "micro"
GOLDEN = [(MICRO, name) for name in case_names(MICRO, None)]
if "D2V2_REFERENCE" in os.environ:  # the larger golden vectors do not travel with the project
    larger = Path(os.environ["D2V2_REFERENCE"]) / "golden"
    GOLDEN += [(larger, name) for name in case_names(larger, None)]

ALIBI = "modality_encoders.AUDIO.alibi_scale"


def golden_content(folder: Path, name: str) -> dict[str, Any]:
    """A golden case as the official trainer would have saved it."""
    section = json.loads((folder / f"{name}.json").read_text())["model"]
    tensors = load_file(folder / f"{name}.safetensors")
    weights: dict[str, Any] = {k.removeprefix("student/"): v for k, v in tensors.items() if k.startswith("student/")}
    weights["_ema"] = {k.removeprefix("teacher/"): v for k, v in tensors.items() if k.startswith("teacher/")}
    return {"args": None, "cfg": OmegaConf.create({"model": section, "task": {"_name": "x"}}), "model": weights}


@pytest.fixture
def audio() -> dict[str, Any]:
    return golden_content(MICRO, "audio_micro")


def networks_of(checkpoint: OfficialCheckpoint) -> tuple[Data2Vec2Network, TeacherNetwork]:
    """Student and teacher with the weights of an official file."""
    name, trunk, own = checkpoint.modality, checkpoint.network.trunk, checkpoint.network.objective()
    student = Data2Vec2Network(trunk, {name: own})
    teacher = TeacherNetwork(trunk, {name: own.target}, {name: own.share_local_encoder}).eval()
    student.load_state_dict({f"trunk.{key}": tensor for key, tensor in checkpoint.trunk.items()} | checkpoint.decoder)
    assert checkpoint.teacher is not None
    teacher.trunk.load_state_dict(checkpoint.teacher)
    return student, teacher


def check_case(folder: Path, name: str, tmp_path: Path) -> None:
    """Import gives the recorded loss, and export the same file."""
    content, golden = golden_content(folder, name), Case.read(folder, name)
    checkpoint = read_official(save(tmp_path / "official.pt", content))
    assert checkpoint.network == golden.network
    student, teacher = networks_of(checkpoint)
    set_noise(student, golden.modality, golden.tensors["mid/decoder_noise_full"])
    with torch.no_grad():
        out = student(golden.batch(), teacher)
    torch.testing.assert_close(total_loss(out), golden.tensors["loss/total"].to(torch.float32), rtol=2e-5, atol=0)
    torch.testing.assert_close(out["target"], golden.tensors["out/targets_full"], rtol=1e-4, atol=1e-4)
    back = write_back(tmp_path / "back.pt", checkpoint)
    assert_same_tensors(back["model"], content["model"])
    assert read_official(tmp_path / "back.pt").network == golden.network


EAT: dict[str, Any] = {"in_chans": 1, "patch_size": 16, "target_length": 32, "max_length": 5, "prenet_depth": 0}


def write_eat_case(folder: Path) -> Path:
    """A case of spectrograms in the official layout."""
    folder.mkdir()
    eat = official_image_text.Case(modality="image", own=EAT, model={"cls_loss": 1}, num_masked=(11,))
    official_image_text.write_case(folder, "eat", eat)
    return folder


def test_an_official_file_of_spectrograms_is_told_from_one_of_images(tmp_path: Path) -> None:
    """Both call their encoder IMAGE; the channels of the patches decide."""
    folder = write_eat_case(tmp_path / "case")
    check_case(folder, "eat", tmp_path)
    assert main(["import", str(tmp_path / "official.pt"), "--out", str(tmp_path / "ours")]) == 0
    assert list(ModelFolder(tmp_path / "ours").description.model.modalities) == ["spectrogram"]
    features = FeatureExtractor(tmp_path / "ours")(torch.randn(16000).numpy() * 0.1, sample_rate=16000)
    assert features.layers[2].shape[1:] == (7 * 8, 24)  # 98 frames are 7 rows of patches, padded


@pytest.mark.parametrize("rows", [5, 3])
def test_a_folder_of_eat_gives_the_weights_of_the_file(rows: int, tmp_path: Path) -> None:
    content = golden_content(write_eat_case(tmp_path / "case"), "eat")
    expected = read_official(save(tmp_path / "official.pt", content))
    hub, own = tmp_path / "hub", "modality_encoders.IMAGE."
    hub.mkdir()
    weights = {k: v for k, v in content["model"].items() if k != "_ema" and ".decoder." not in k}
    names = {k: k.removeprefix(own).replace("context_encoder.norm", "pre_norm") for k in weights}
    weights[f"{own}fixed_positional_encoder.positions"] = weights[f"{own}fixed_positional_encoder.positions"][
        :, : 8 * rows
    ].clone()  # older files have shorter tables
    save_file({f"model.{names[k]}": v.contiguous() for k, v in weights.items()}, hub / "model.safetensors")
    config = {"model_type": "eat", "model_variant": "pretrain", "embed_dim": 24, "depth": 2, "num_heads": 6}
    config |= {"patch_size": 16, "in_chans": 1, "mel_bins": 128, "max_length": 5, "img_size": [32, 128]}
    (hub / "config.json").write_text(json.dumps(config))
    found = read_official(hub)
    assert found.modality == "spectrogram" and found.network.trunk == expected.network.trunk
    assert not found.has_decoder and found.teacher is None
    assert_same_tensors(found.trunk, expected.trunk)
    (hub / "config.json").write_text(json.dumps(config | {"model_variant": "finetune"}))
    with pytest.raises(UnsupportedOptionError, match="model_variant='finetune'"):
        read_official(hub)
    (hub / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type 'eat'"):
        read_official(hub)


@pytest.mark.parametrize("folder, name", GOLDEN, ids=[name for _, name in GOLDEN])
def test_golden_case_computes_its_recorded_loss_after_import_and_is_exported_unchanged(
    folder: Path, name: str, tmp_path: Path
) -> None:
    check_case(folder, name, tmp_path)


VARIANTS = {
    "audio_scale_per_block": official_step.Options(scale_shape="block"),
    "audio_one_scale": official_step.Options(scale_shape="one"),
    "audio_own_front_end": official_step.Options(own_front_end=True),
}
OTHERS = ("image_other_patch_width", "image_students_patches", "image_two_extra_tokens", "text_own_embeddings",
          "text_full_names_without_prenet", "text_alibi_per_block_with_prenet", "text_no_positions")  # fmt: skip


@pytest.mark.parametrize("name", [*VARIANTS, *OTHERS])
def test_unpublished_network_computes_the_loss_of_the_second_implementation_and_is_exported_unchanged(
    name: str, tmp_path: Path
) -> None:
    if name in VARIANTS:
        official_step.write_case(tmp_path, name, VARIANTS[name])
    else:
        official_image_text.write_case(tmp_path, name, case(name, CASES[name]))
    check_case(tmp_path, name, tmp_path)


def test_alibi_scale_of_older_files_gets_the_axis_it_lacks(audio: dict[str, Any], tmp_path: Path) -> None:
    expected = read_official(save(tmp_path / "new.pt", audio))
    old = audio | {"model": dict(audio["model"])}
    old["model"][ALIBI] = audio["model"][ALIBI][0]
    old["model"]["_ema"] = audio["model"]["_ema"] | {ALIBI: audio["model"]["_ema"][ALIBI][0]}
    assert old["model"][ALIBI].ndim == 4
    found = read_official(save(tmp_path / "old.pt", old))
    assert expected.teacher is not None
    assert found.teacher is not None
    assert_same_tensors(student_of(found), student_of(expected))
    assert_same_tensors(found.teacher, expected.teacher)
    assert found.trunk["encoders.audio.alibi.scale"].shape == (1, 4)


def test_missing_teacher_is_a_warning(audio: dict[str, Any], tmp_path: Path) -> None:
    del audio["model"]["_ema"]
    checkpoint = read_official(save(tmp_path / "x.pt", audio))
    assert checkpoint.teacher is None
    assert checkpoint.has_decoder
    assert ["no teacher (`_ema`)" in warning for warning in checkpoint.warnings] == [True]


def test_all_faults_of_the_tensors_are_in_one_message(audio: dict[str, Any], tmp_path: Path) -> None:
    weights = audio["model"]
    weights["blocks.0.norm1.weight"] = torch.ones(7)
    weights["blocks.0.gain"] = torch.ones(1)
    del weights["modality_encoders.AUDIO.decoder.proj.bias"]
    weights["_ema"]["blocks.1.gain"] = torch.ones(1)
    del weights["_ema"]["blocks.1.norm2.bias"]
    weights["_ema"][ALIBI] = torch.ones(1, 1, 8, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        read_official(save(tmp_path / "x.pt", audio))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/x.pt: not the tensors of its own configuration:",
        "  blocks.0.norm1.weight: expected (16,), found (7,)",
        "  modality_encoders.AUDIO.decoder.proj.bias: missing, expected (16,)",
        f"  _ema.{ALIBI}: expected (1, 1, 4, 1, 1), found (1, 1, 8, 1, 1)",
        "  _ema.blocks.1.norm2.bias: missing, expected (16,)",
        "  blocks.0.gain: unknown to our network (--drop-unknown leaves it out)",
        "  _ema.blocks.1.gain: unknown to our network (--drop-unknown leaves it out)",
    ]


def test_unknown_tensors_can_be_left_out_and_are_reported(audio: dict[str, Any], tmp_path: Path) -> None:
    expected = read_official(save(tmp_path / "known.pt", audio))
    audio["model"]["blocks.0.gain"] = torch.ones(1)
    audio["model"]["0.norm1.weight"] = torch.ones(1)  # a name of text teachers, which must not pass for a block's
    checkpoint = read_official(save(tmp_path / "x.pt", audio), drop_unknown=True)
    assert checkpoint.warnings == [
        "left out, unknown to our network: blocks.0.gain",
        "left out, unknown to our network: 0.norm1.weight",
    ]
    assert_same_tensors(student_of(checkpoint), student_of(expected))


def fine_tuned(content: dict[str, Any], prefix: str, head: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """What is left of a pretraining file after fine-tuning: encoder under a prefix, head, nested configuration."""
    encoder = {prefix + k: v for k, v in content["model"].items() if k != "_ema" and ".decoder." not in k}
    return {"cfg": cfg, "args": None, "model": encoder | head}


CTC = {"w2v_encoder.proj.weight": torch.randn(32, 16), "w2v_encoder.proj.bias": torch.randn(32)}


@pytest.mark.parametrize(
    "prefix, head", [("w2v_encoder.w2v_model.", CTC), ("model.", {"head.weight": torch.randn(10, 16)})]
)
@pytest.mark.parametrize("case", ["audio_micro", "image_micro", "text_micro"])
def test_fine_tuned_file_gives_encoder_and_head(case: str, prefix: str, head: dict[str, Any], tmp_path: Path) -> None:
    content = golden_content(MICRO, case)
    whole = read_official(save(tmp_path / "whole.pt", content))
    cfg = {"model": {"_name": "ctc", "w2v_args": {"model": content["cfg"].model, "task": {"a": 1}}, "lr": 0.1}}
    tuned = fine_tuned(content, prefix, head, OmegaConf.create(cfg))
    checkpoint = read_official(save(tmp_path / "tuned.pt", tuned))
    assert (checkpoint.network, checkpoint.prefix, checkpoint.teacher) == (whole.network, prefix, None)
    assert_same_tensors(checkpoint.head, head)
    assert_same_tensors(checkpoint.trunk, whole.trunk)
    assert (checkpoint.decoder, bool(whole.decoder)) == ({}, True)
    assert ["no decoder" in warning for warning in checkpoint.warnings] == [True]
    back = write_back(tmp_path / "back.pt", checkpoint)
    assert_same_tensors(back["model"], tuned["model"])


def test_options_that_only_training_looks_at_do_not_keep_a_fine_tuned_file_out(
    audio: dict[str, Any], tmp_path: Path
) -> None:
    section = OmegaConf.to_container(audio["cfg"])["model"]
    section |= {"end_drop_path_rate": 0.2}
    args = argparse.Namespace(w2v_args=argparse.Namespace(model=section), arch="ctc")
    tuned = fine_tuned(audio, "w2v_encoder.w2v_model.", CTC, None) | {"args": args}
    checkpoint = read_official(save(tmp_path / "x.pt", tuned))
    assert checkpoint.ignored == ["args.w2v_args.model.end_drop_path_rate=0.2", "args.arch"]


def test_configuration_under_args_and_interpolations_are_followed(audio: dict[str, Any], tmp_path: Path) -> None:
    expected = read_official(save(tmp_path / "x.pt", audio)).network
    section = OmegaConf.to_container(audio["cfg"])["model"]
    depth, section["depth"] = section["depth"], "${sizes.depth}"
    section["norm_eps"] = "???"  # not given
    content = {"model": audio["model"], "args": argparse.Namespace(model=section, sizes={"depth": depth})}
    assert read_official(save(tmp_path / "x.pt", content)).network == expected


def test_fields_of_the_network_are_kept_and_all_others_listed(audio: dict[str, Any], tmp_path: Path) -> None:
    known = OmegaConf.to_container(audio["cfg"])["model"]
    section = json.loads(json.dumps(known)) | {"data": "/corpora", "seed": 1, "shared_decoder": None}
    section["modalities"]["audio"] |= {"type": "AUDIO"}
    section["modalities"]["audio"]["decoder"] |= {"final_layer_norm": True}
    section["modalities"] |= {"image": {"prenet_depth": 4}, "text": None}
    content = audio | {
        "cfg": OmegaConf.create({"model": section, "task": {"a": 1}}),
        "extra_state": {"epoch": 1},
        "task_state": {},
    }
    content["model"]["num_updates"] = torch.tensor(3)
    checkpoint = read_official(save(tmp_path / "x.pt", content))
    assert checkpoint.section == known
    assert checkpoint.ignored == [
        "model.num_updates",
        "cfg.model.modalities.audio.decoder.final_layer_norm=True",
        "cfg.model.modalities.audio.type='AUDIO'",
        "cfg.model.data='/corpora'",
        "cfg.model.seed=1",
        "cfg.model.modalities.image",
        "cfg.task",
        "extra_state",
        "task_state",
    ]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"layer_norm_first": True},
            UnsupportedOptionError,
            r"x\.pt: cfg\.model: not supported: layer_norm_first=True",
        ),
        ({"recon_loss": 1}, UnsupportedOptionError, r"recon_loss=1"),
        ({"depth": 10**9}, CheckpointError, "depth: Input should be less than or equal to 1000"),
        ({"depth": 10**5000}, CheckpointError, "not the configuration of a network"),
        ({"norm_eps": float("nan")}, CheckpointError, "not the configuration of a network"),
        ({"embed_dim": 10**30}, CheckpointError, "width: Input should be"),
        ({"num_heads": 5}, CheckpointError, "width 16 is not divisible by num_heads 5"),
        ({"depth": "many"}, CheckpointError, "not the configuration of a network"),
        ({"depth": {"a": [[]] * 300_000}}, CheckpointError, "plain values, found more than 200,000 values"),
        (
            {"modalities": None},
            CheckpointError,
            r"expected a configuration with embed_dim, depth and modalities\.audio",
        ),
    ],
)
def test_configuration_that_cannot_be_followed_is_named(
    change: dict[str, Any], error: type[Exception], message: str, audio: dict[str, Any], tmp_path: Path
) -> None:
    section = OmegaConf.to_container(audio["cfg"])["model"] | change
    with pytest.raises(error, match=message):
        read_official(save(tmp_path / "x.pt", audio | {"cfg": {"model": section}}))


@pytest.mark.parametrize(
    "spec", ["[(512, 10, 5)] * 999999999", "(1,) * 9999 * 9999", "[" + "(1, 1, 1)," * 200 + "]", "[" * 900]
)
def test_a_list_of_convolutions_that_multiplies_is_refused(spec: str, audio: dict[str, Any], tmp_path: Path) -> None:
    cfg = OmegaConf.to_container(audio["cfg"])
    cfg["model"]["modalities"]["audio"]["feature_encoder_spec"] = spec
    with pytest.raises(CheckpointError, match="not the configuration of a network"):
        read_official(save(tmp_path / "x.pt", audio | {"cfg": cfg}))


def test_weights_that_share_their_bytes_many_times_are_refused(audio: dict[str, Any], tmp_path: Path) -> None:
    one = torch.zeros(10_000)
    many = {f"head.{number}": one for number in range(30)}
    with pytest.raises(CheckpointError, match="expected weights of at most .* by the size of the file"):
        read_official(save(tmp_path / "x.pt", audio | {"model": audio["model"] | many}))


def test_weights_without_content_are_refused(
    audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {name: one if name == "_ema" else one.to("meta") for name, one in audio["model"].items()}
    file = save(tmp_path / "x.pt", audio | {"model": model})
    assert main(["import", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "x.pt: expected weights, found names and shapes alone" in capsys.readouterr().err


def test_what_is_not_needed_of_a_file_can_be_left_out(
    audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "x.pt", audio | {"extra_state": Harm()}, pickle_protocol=4)
    command = ["import", str(file), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "found a wish to use posix.system" in capsys.readouterr().err
    assert main([*command, "--only-model"]) == 0
    assert load_model(tmp_path / "out").config == read_official(file, only_model=True).network.trunk


def test_other_models_are_named_as_such(audio: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"under `model`, found the keys best, state"):
        read_official(save(tmp_path / "x.pt", {"state": {}, "best": 1}))
    with pytest.raises(CheckpointError, match=r"found none among encoder\.layers\.0\.fc1\.weight"):
        read_official(save(tmp_path / "x.pt", audio | {"model": {"encoder.layers.0.fc1.weight": torch.ones(1)}}))
    both = audio["model"] | {"modality_encoders.IMAGE.extra_tokens": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"found modality_encoders\.AUDIO, modality_encoders\.IMAGE"):
        read_official(save(tmp_path / "x.pt", audio | {"model": both}))


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


def test_command_names_harm_and_damage(
    audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "harm.pt", audio | {"cfg": Harm()})
    assert main(["import", "harm.pt", "--out", "out"]) == 2
    assert "harm.pt: expected tensors and configurations, found a wish to use posix.system" in capsys.readouterr().err
    whole = save(tmp_path / "cut.pt", audio).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-1000])
    assert main(["import", "cut.pt", "--out", "out"]) == 2
    assert "cut.pt: expected a whole file of torch.save, found one that is cut off" in capsys.readouterr().err
    assert main(["import", "none.pt", "--out", "out"]) == 2
    assert "none.pt" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "harm.pt"]


@pytest.mark.parametrize("modality", ["audio", "image", "text"])
def test_command_imports_to_a_folder_and_exports_the_same_file(
    modality: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = golden_content(MICRO, f"{modality}_micro")
    content["model"] = {k: v if k == "_ema" else v.half() for k, v in content["model"].items()}
    file, folder, back = save(tmp_path / "official.pt", content), tmp_path / "folder", tmp_path / "back.pt"
    assert main(["import", str(file), "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert ["NON-COMMERCIAL" in text for text in (printed, card)] == [modality == "image"] * 2
    assert "check what came with your file" in printed
    assert main(["export", str(folder), "--out", str(back)]) == 0
    found = read_pickled(back)
    assert_same_tensors(found["model"], content["model"])
    assert found["cfg"]["model"] == OmegaConf.to_container(content["cfg"])["model"]
    network = read_official(file).network
    described = json.loads((folder / "config.json").read_text())["objective"]["modalities"][modality]
    assert described.keys() == {"share_local_encoder", "decoder", "target", "loss"}
    assert described["decoder"]["depth"] == network.decoder.depth
    assert load_model(folder).config == network.trunk
    assert load_trunk(ModelFolder(folder)).config == network.trunk
    assert load_trunk(ModelFolder(folder), "teacher").config == network.trunk


def text_file(path: Path, vocabulary: int) -> Path:
    """A tiny official text checkpoint."""
    base = PUBLISHED["text_base"]
    decoder = base.decoder | {"decoder_dim": 16, "decoder_layers": 1}
    network = replace(base, width=32, heads=4, depth=1, vocabulary=vocabulary, decoder=decoder)
    content = content_of(replace(network, model=base.model | {"average_top_k_layers": 1}))
    return save(path, content)


def test_tokenizer_travels_with_a_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, folder = tmp_path / "own.model", tmp_path / "folder"
    tokenizer.write_bytes(small_tokenizer(["the quick brown fox", "jumps over a lazy dog"]))
    size = load_tokenizer("sentencepiece", tokenizer).vocab_size
    file = text_file(tmp_path / "official.pt", size)
    command = ["import", str(file), "--out", str(folder)]
    assert main(command) == 0
    assert "no --tokenizer" in capsys.readouterr().out
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0
    assert "WARNING" not in capsys.readouterr().out
    assert FeatureExtractor(folder)(["the lazy fox"]).layers[0].shape[2] == 32
    text_file(file, size + 1)
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0
    assert f"the tokenizer has {size} ids, the checkpoint {size + 1}" in capsys.readouterr().out
    text_file(file, size - 1)
    assert main([*command, "--tokenizer", str(tokenizer)]) == 2
    assert f"has {size} ids, the checkpoint embeds {size - 1}" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(file)]) == 2
    assert "expected a tokenizer.json or a sentencepiece .model" in capsys.readouterr().err


def test_tokenizer_of_another_modality_is_refused(
    audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "x.pt", audio)
    assert main(["import", str(file), "--out", str(tmp_path / "out"), "--tokenizer", "tokenizer.json"]) == 2
    assert "the checkpoint is of audio; leave it out" in capsys.readouterr().err


def test_export_of_a_joint_network_needs_a_modality_and_gives_its_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("multimodal_tiny")
    trunk, objective = replace(config.model, shared_depth=4), config.objective
    parts = write_tiny_folder(tmp_path / "joint", trunk, objective=objective, teacher=True)
    command = ["export", str(tmp_path / "joint"), "--out", str(tmp_path / "x.pt")]
    assert main(command) == 2
    assert "holds audio, image, text; an official file holds one, choose it: --modality" in capsys.readouterr().err
    for modality in trunk.modalities:
        assert main([*command, "--modality", modality]) == 0
        checkpoint = read_official(tmp_path / "x.pt")
        assert checkpoint.network == one_modality(trunk, objective, modality)
        assert checkpoint.teacher is not None
        found = {"model": checkpoint.trunk, "objective": checkpoint.decoder, "teacher": checkpoint.teacher}
        kept = (f"encoders.{modality}.", f"decoders.{modality}.", "blocks.")
        for part, tensors in parts.items():
            assert_same_tensors(found[part], {k: v for k, v in tensors.items() if k.startswith(kept)})


@pytest.mark.parametrize(
    "place, value, said",
    [
        ("origin.official.section", {"depth": 1}, "origin.official.section: not"),
        ("origin.official.section.depth", 10**9, "depth: Input should be less than or equal to 1000"),
        ("origin.official.section", "x", "origin: expected the fields of _Origin, found official.section"),
        ("origin.official", None, "found official"),
        ("origin.official.prefix", 3, "found official.prefix"),
    ],
)
def test_export_of_a_folder_with_a_strange_origin_is_refused_by_name(
    place: str, value: Any, said: str, audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = save(tmp_path / "official.pt", audio), tmp_path / "folder"
    assert main(["import", str(file), "--out", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(config, place, value)))
    assert main(["export", str(folder), "--out", str(tmp_path / "x.pt")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", [3, [], {"audio": 3}, {"audio": {"decoder": {}}}, {"audio": None}])
def test_export_of_a_folder_with_a_strange_objective_is_refused_by_name(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_folder(tmp_path / "folder", tiny_config("audio"))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(changed(config, "objective.modalities", value)))
    assert main(["export", str(tmp_path / "folder"), "--out", str(tmp_path / "x.pt")]) == 2
    assert f"{tmp_path / 'folder'}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, name",
    [
        ("model", "blocks.0.norm1.weight"),
        ("objective", "decoders.audio.proj.bias"),
        ("teacher", "blocks.0.norm1.weight"),
    ],
)
def test_export_of_a_folder_that_does_not_fit_itself_is_refused(
    part: str, name: str, audio: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert main(["import", str(save(tmp_path / "x.pt", audio)), "--out", str(folder)]) == 0
    tensors = load_file(folder / f"{part}.safetensors")
    tensors[name] = torch.ones(7)
    save_file(tensors, folder / f"{part}.safetensors")
    assert main(["export", str(folder), "--out", str(tmp_path / "back.pt")]) == 2
    assert f"{name}: expected (16,), found (7,)" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


def test_weights_of_our_own_come_back_without_a_licence_of_others(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "run", tiny_config("image"), teacher=True)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "own.pt")]) == 0
    checkpoint = read_official(tmp_path / "own.pt")
    assert checkpoint.licence == OWN_LICENCE
    assert not any("d2v2ds" in name for name in checkpoint.ignored)
    assert main(["import", str(tmp_path / "own.pt"), "--out", str(tmp_path / "again")]) == 0
    assert main(["export", str(tmp_path / "again"), "--out", str(tmp_path / "twice.pt")]) == 0
    assert read_official(tmp_path / "twice.pt").licence == OWN_LICENCE
