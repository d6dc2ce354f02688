"""The official `model` section of one of our networks of data2vec 1.0."""

from collections.abc import Callable, Mapping
from typing import Any

from d2v2ds.interop.fairseq.data2vec1_config import FirstNetwork, Layout, first_network_of
from d2v2ds.interop.fairseq.official_fields import FINAL_NORMS, LAYER_NORMS, UnsupportedOptionError
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec1 import Data2Vec1Config, WholeModalityConfig


def official_section(
    trunk: TrunkConfig, objective: Data2Vec1Config, modality: str
) -> tuple[FirstNetwork, dict[str, Any]]:
    """Write the official section of a network of one modality, and read it again.

    Returns:
        The network as it is read from the section, and the section.

    Raises:
        UnsupportedOptionError: naming the settings that the official section cannot express.
    """
    if modality not in _WRITERS or set(trunk.modalities) != {modality}:
        raise UnsupportedOptionError(
            f"the model has {', '.join(trunk.modalities)}, an official file one of {', '.join(_WRITERS)}"
        )
    own, network = objective.modalities[modality], trunk.modalities[modality]
    ema, target = objective.ema, own.target
    section = {
        "average_top_k_layers": target.num_layers,
        "loss_scale": own.loss.scale,
        "loss_beta": own.loss.beta,
        "ema_decay": ema.start_decay,
        "ema_end_decay": ema.end_decay,
        "ema_anneal_end_step": ema.anneal_steps,
        **{key: kind in target.layer_norms for key, kind in LAYER_NORMS.items()},
        **{key: kind in target.final_norms for key, kind in FINAL_NORMS.items()},
    } | _WRITERS[modality](trunk, own)
    found = first_network_of(section, modality, **context_of(network, own))
    different = [
        name
        for name in ("trunk", "objective")
        if getattr(found, name) != {"trunk": trunk, "objective": objective}[name]
    ]
    if different:
        wanted, have = (trunk, found.trunk) if "trunk" in different else (own, found.own)
        raise UnsupportedOptionError(f"no official option for {', '.join(_differences(wanted, have))}")
    return found, section


def context_of(network: Any, own: WholeModalityConfig) -> dict[str, Any]:
    """Return what stands outside the section of text: its vocabulary, masks and the teacher's input."""
    if not hasattr(network, "vocab_size"):
        return {}
    spans = {"mask_prob": getattr(own.mask, "fraction", 0.35), "mask_multiple_length": getattr(own.mask, "length", 4)}
    return {
        "vocab_size": network.vocab_size,
        "mask_token": own.mask_token,
        "teacher_input": own.teacher_input,
        "task": spans,
    }


def _differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """List the fields of nested settings that differ, as `a.b=value`."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return [one for key in wanted for one in _differences(wanted[key], found.get(key), f"{where}.{key}")]
    if hasattr(wanted, "__dataclass_fields__") and type(wanted) is type(found):
        return _differences(vars(wanted), vars(found), where)
    return [] if wanted == found else [f"{where[1:]}={wanted!r}"]


def _audio(trunk: TrunkConfig, own: WholeModalityConfig) -> dict[str, Any]:
    network, block = trunk.modalities["audio"], trunk.block
    return {
        "_name": "data2vec_audio",
        "extractor_mode": "layer_norm",
        "conv_feature_layers": str(list(network.conv_layers)),
        "encoder_layers": trunk.shared_depth,
        "encoder_embed_dim": block.width,
        "encoder_ffn_embed_dim": round(block.width * block.mlp_ratio),
        "encoder_attention_heads": block.num_heads,
        "dropout": block.mlp_dropout,
        "attention_dropout": block.attention_dropout,
        "activation_dropout": 0.0,
        "dropout_input": 0.0,
        "dropout_features": 0.0,
        "encoder_layerdrop": trunk.layer_drop,
        "feature_grad_mult": network.conv_gradient,
        "pos_conv_depth": network.position_depth,
        "conv_pos": network.position_total_kernel,
        "conv_pos_groups": network.position_groups,
        "mask_prob": getattr(own.mask, "fraction", 0.65),
        "mask_length": getattr(own.mask, "length", 10),
        "ema_transformer_only": True,
        "ema_layers_only": own.copied == ("positions",),
    }


def _text(trunk: TrunkConfig, own: WholeModalityConfig) -> dict[str, Any]:
    network, block = trunk.modalities["text"], trunk.block
    return {
        "_name": "data2vec_text",
        "head_layers": own.head_layers,
        "loss_scale": 0.0 if own.loss.scale is None else own.loss.scale,
        "ema_transformer_layers_only": True,
        "transformer": {
            "dropout": network.embedding_dropout,
            "attention_dropout": block.attention_dropout,
            "activation_dropout": 0.0,
            "activation_fn": "gelu",
            "layernorm_embedding": True,
            "no_scale_embedding": True,
            "max_source_positions": network.max_tokens,
            "encoder": {
                "embed_dim": block.width,
                "ffn_embed_dim": round(block.width * block.mlp_ratio),
                "layers": trunk.shared_depth,
                "attention_heads": block.num_heads,
                "normalize_before": False,
                "learned_pos": True,
                "layerdrop": trunk.layer_drop,
            },
        },
    }


_WRITERS: dict[Layout | str, Callable[[TrunkConfig, WholeModalityConfig], dict[str, Any]]] = {
    "audio": _audio,
    "text": _text,
}
