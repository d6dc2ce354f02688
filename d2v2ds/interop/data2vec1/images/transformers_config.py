"""Settings of transformers' `Data2VecVisionConfig` and ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2v2ds.bounds import Count, Depth, PositiveOrZero, Rate, Share, Width
from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.io.read import validate
from d2v2ds.modalities.image.network import ImageNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import PatchHeadConfig

MODEL_TYPE = "data2vec-vision"
CLASSIFIER = "Data2VecVisionForImageClassification"
_FIXED = {"hidden_act": "gelu", "num_channels": 3, "use_absolute_position_embeddings": False}
"""Options that this project has in one form."""


@dataclass(frozen=True)
class VisionConfig:
    """Keys of config.json that decide about the network; defaults are those of transformers 5."""

    hidden_size: Width = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    intermediate_size: Count = 3072
    hidden_dropout_prob: Rate = 0.0
    attention_probs_dropout_prob: Rate = 0.0
    layer_norm_eps: Share = 1e-12
    image_size: Count = 224
    patch_size: Count = 16
    use_mask_token: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: PositiveOrZero = 0.1
    drop_path_rate: Rate = 0.1
    use_mean_pooling: bool = True
    id2label: dict[str, str] = field(default_factory=dict)

    def trunk(self) -> TrunkConfig:
        """Settings of the trunk.

        Raises:
            UnsupportedOptionError: it has no relative positions, or two kinds of them.
        """
        if self.use_relative_position_bias == self.use_shared_relative_position_bias:
            raise UnsupportedOptionError(
                "expected one of use_relative_position_bias and use_shared_relative_position_bias, found "
                f"{'both' if self.use_relative_position_bias else 'none'}"
            )
        block = BlockConfig(
            width=self.hidden_size,
            num_heads=self.num_attention_heads,
            mlp_ratio=self.intermediate_size / self.hidden_size,
            norm_eps=self.layer_norm_eps,
            attention_dropout=self.attention_probs_dropout_prob,
            attention_output_dropout=self.hidden_dropout_prob,
            mlp_dropout=self.hidden_dropout_prob,
            pre_norm=True,
            layer_scale=self.layer_scale_init_value or None,
            key_bias=False,
        )
        network = ImageNetwork(
            prenet_depth=0,
            image_size=self.image_size,
            patch_size=self.patch_size,
            positions="relative",
            relative_per_block=self.use_relative_position_bias,
        )
        return TrunkConfig(
            block=block,
            shared_depth=self.num_hidden_layers,
            modalities={"image": network},
            final_norm=not self.use_mean_pooling,
        )

    def task(self, num_outputs: int) -> ClassifyConfig:
        """Settings of the classifier."""
        names = [self.id2label.get(str(number), f"LABEL_{number}") for number in range(num_outputs)]
        is_named = names != [f"LABEL_{number}" for number in range(num_outputs)]
        pooling = PatchHeadConfig(
            pooling="mean" if self.use_mean_pooling else "cls",
            norm=self.use_mean_pooling,
            norm_eps=self.layer_norm_eps,
        )
        return ClassifyConfig(
            modality="image",
            classes=tuple(names) if is_named else (),
            num_outputs=num_outputs,
            head=pooling,
            drop_path=self.drop_path_rate,
        )


def read_config(values: Mapping[str, Any], where: str) -> VisionConfig:
    """Read config.json of transformers.

    Raises:
        CheckpointError: it is of another model, or damaged.
        UnsupportedOptionError: it computes something that ours does not, with the option.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where}: expected model_type {MODEL_TYPE!r}, found {values.get('model_type')!r:.80}")
    for name, expected in _FIXED.items():
        if (found := values.get(name, expected)) != expected:
            raise UnsupportedOptionError(f"{where}: {name}={found!r:.80}, expected {expected!r}")
    known: dict[str, Any] = {name: values[name] for name in VisionConfig.__dataclass_fields__ if name in values}
    for name in ("image_size", "patch_size"):
        sides = known.get(name)
        if isinstance(sides, list | tuple):
            if len(set(sides)) != 1:
                raise UnsupportedOptionError(f"{where}: {name}={sides!r:.80}, expected a square")
            known[name] = sides[0]
    return validate(VisionConfig, known, where, CheckpointError)


def write_config(model: TrunkConfig, task: ClassifyConfig | None, *, has_mask: bool) -> dict[str, Any]:
    """Write config.json for transformers.

    Args:
        model: settings of the trunk.
        task: of a classifier, or None.
        has_mask: there is a mask vector.

    Raises:
        UnsupportedOptionError: transformers' model cannot compute what ours does.
    """
    block, network = model.block, model.modalities["image"]
    head = None if task is None else task.head
    eps = getattr(head, "norm_eps", block.norm_eps) if getattr(head, "norm", False) else block.norm_eps
    needed = {
        "model.block.pre_norm": (block.pre_norm, True),
        "model.block.key_bias": (block.key_bias, False),
        "model.block.attention_gate": (block.attention_gate, False),
        "model.modalities.image.positions": (network.positions, "relative"),
        "model.modalities.image.prenet_depth": (network.prenet_depth, 0),
        "model.modalities.image.patch_width": (network.patch_width in (None, block.width), True),
        "objective.head.norm_eps": (eps, block.norm_eps),
    }
    if task is not None:
        pooling = "cls" if model.final_norm else "mean"
        needed |= {
            "objective.kind": (task.kind, "one"),
            "objective.head.pooling": (getattr(head, "pooling", None), pooling),
            "objective.head.norm": (getattr(head, "norm", None), not model.final_norm),
        }
    if other := [f"{name} is {found!r}" for name, (found, wanted) in needed.items() if found != wanted]:
        raise UnsupportedOptionError(f"transformers has no such {MODEL_TYPE} model: {'; '.join(other)}")
    values: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [CLASSIFIER if task is not None else "Data2VecVisionModel"],
        "dtype": "float32",
        "hidden_size": block.width,
        "num_hidden_layers": model.shared_depth,
        "num_attention_heads": block.num_heads,
        "intermediate_size": int(block.width * block.mlp_ratio),
        "hidden_dropout_prob": block.mlp_dropout,
        "attention_probs_dropout_prob": block.attention_dropout,
        "layer_norm_eps": block.norm_eps,
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "use_mask_token": has_mask,
        "use_relative_position_bias": network.relative_per_block,
        "use_shared_relative_position_bias": not network.relative_per_block,
        "layer_scale_init_value": block.layer_scale or 0.0,
        "drop_path_rate": 0.0 if task is None else task.drop_path,
        "use_mean_pooling": not model.final_norm,
        **_FIXED,
    }
    if task is not None:
        names = task.classes or [f"LABEL_{number}" for number in range(task.num_outputs)]
        values["id2label"] = {str(number): name for number, name in enumerate(names)}
        values["label2id"] = {name: number for number, name in enumerate(names)}
    return values
