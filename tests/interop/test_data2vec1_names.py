"""Names and settings of official data2vec 1.0 models: both ways without loss, and nothing unknown in silence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v2ds.config.load import load_config
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.data2vec1_config import first_network_of
from d2v2ds.interop.fairseq.data2vec1_keymap import is_buffer, to_official, to_ours
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.objectives.data2vec1 import Data2Vec1

GOLDEN = Path(__file__).parents[1] / "golden" / "data2vec1"
NAMES = {"audio": "v1_audio_pad", "text": "v1_text_maskedteacher"}
WITH_TEXT = {"vocab_size": 50265, "mask_token": 50264}


@pytest.mark.parametrize("layout", NAMES)
def test_names_of_an_official_file_survive_both_ways(layout: str) -> None:
    tensors = load_file(GOLDEN / f"{NAMES[layout]}.safetensors")
    student = {key.removeprefix("student/"): value for key, value in tensors.items() if key.startswith("student/")}
    ours = to_ours(student, layout)
    assert len(ours) == len(student) - 2 * 2 * sum(".q_proj.weight" in key for key in student) - (layout == "text")
    back = to_official(ours, layout)
    assert back.keys() == {key for key in student if not is_buffer(key)}
    assert all(torch.equal(back[key], student[key]) and back[key].is_contiguous() for key in back)


@pytest.mark.parametrize(
    ("config", "layout", "entries"),
    [("audio_base", "audio", 232), ("audio_large", "audio", 424), ("text_base", "text", 200)],
)
def test_every_parameter_of_the_published_sizes_has_an_official_name(config: str, layout: str, entries: int) -> None:
    """Entries as counted in the official state dicts; that of text has a buffer besides."""
    loaded = load_config(f"data2vec1/{config}")
    objective = loaded.objective.build(loaded.model, seed=1)
    assert isinstance(objective, Data2Vec1)
    with torch.device("meta"):
        state = objective.build_network(activation_checkpointing=False).state_dict()
    official = to_official(state, layout)
    assert len(official) == entries
    ours = to_ours(official, layout)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in state.items()}


def test_unknown_names_and_missing_parts_are_refused_by_name() -> None:
    with pytest.raises(D2V2Error, match="encoder.other.weight: data2vec 1.0 for audio has no such parameter"):
        to_ours({"encoder.other.weight": torch.zeros(1)}, "audio")
    with pytest.raises(D2V2Error, match="decoders.audio.proj.bias: data2vec 1.0 for audio has no such"):
        to_official({"decoders.audio.proj.bias": torch.zeros(1)}, "audio")
    with pytest.raises(D2V2Error, match="qkv.bias: expected queries, keys and values, found 1 of the three"):
        to_ours({"encoder.layers.0.self_attn.q_proj.bias": torch.zeros(1)}, "audio")


BASE: dict[str, dict[str, Any]] = {
    "audio_base": {
        "_name": "data2vec_audio", "extractor_mode": "layer_norm", "encoder_layerdrop": 0.05, "dropout_input": 0.0,
        "dropout_features": 0.0, "feature_grad_mult": 1.0, "encoder_embed_dim": 768, "mask_prob": 0.65,
        "mask_length": 10, "loss_beta": 0, "loss_scale": None, "instance_norm_target_layer": True,
        "average_top_k_layers": 8, "pos_conv_depth": 5, "conv_pos": 95, "ema_decay": 0.999, "ema_end_decay": 0.9999,
        "ema_anneal_end_step": 30000, "ema_transformer_only": True, "ema_layers_only": True, "require_same_masks": True,
        "mask_dropout": 0,
    },
    "text_base": {
        "_name": "data2vec_text", "head_layers": 2, "average_top_k_layers": 10, "layer_norm_target_layer": True,
        "loss_scale": 1.0, "ema_decay": 0.999, "ema_end_decay": 0.9999, "ema_anneal_end_step": 300000,
        "loss_beta": 4, "ema_transformer_layers_only": True,
        "transformer": {
            "dropout": 0.1, "attention_dropout": 0.1, "layernorm_embedding": True, "activation_fn": "gelu",
            "no_scale_embedding": True, "max_source_positions": 512,
            "encoder": {"embed_dim": 768, "ffn_embed_dim": 3072, "layers": 12, "attention_heads": 12,
                        "normalize_before": False, "learned_pos": True, "layerdrop": 0},
        },
    },
}  # fmt: skip
"""Sections of the published recipes."""


@pytest.mark.parametrize("name", BASE)
def test_shipped_configurations_are_the_published_ones(name: str) -> None:
    modality = name.split("_")[0]
    official = first_network_of(BASE[name], modality, **({} if modality == "audio" else WITH_TEXT))
    shipped = load_config(f"data2vec1/{name}", ["objective.modalities.text.mask_token=50264"] * (modality == "text"))
    assert shipped.model == official.trunk
    assert shipped.objective == official.objective


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("audio_base", {"some_new_option": 1}, "model.some_new_option=1"),
        ("audio_base", {"layer_norm_first": True}, "model.layer_norm_first=True, expected False"),
        ("audio_base", {"activation_dropout": 0.1}, "model.activation_dropout"),
        ("audio_base", {"ema_layers_only": False, "ema_transformer_only": False}, "model.ema_transformer_only=False"),
        ("audio_base", {"_name": "wav2vec2"}, "model._name='wav2vec2'"),
        ("text_base", {"group_norm_target_layer": True}, "model.group_norm_target_layer=True"),
        ("text_base", {"transformer": {"normalize": 2, "layernorm_embedding": True}}, "model.transformer.normalize=2"),
    ],
)
def test_unknown_and_unsupported_settings_are_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    modality = name.split("_")[0]
    with pytest.raises(UnsupportedOptionError, match=message.replace("'", ".")):
        first_network_of(BASE[name] | change, modality, **({} if modality == "audio" else WITH_TEXT))


def test_text_needs_the_size_of_its_vocabulary() -> None:
    with pytest.raises(UnsupportedOptionError, match="vocab_size and mask_token are not given"):
        first_network_of(BASE["text_base"], "text")
