"""Fields of an official configuration: which are known, and a reader that overlooks none.

Every key is looked at. One that changes the computation and that this project does not have raises
`UnsupportedOptionError` with its name, so that nothing is computed differently in silence.
"""

import ast
from dataclasses import dataclass, field
from typing import Any

from d2v2ds.errors import D2V2Error
from d2v2ds.objectives.targets import NormKind
from d2v2ds.shapes import ConvLayer


class UnsupportedOptionError(D2V2Error):
    """An official option that changes the computation and that this project does not have."""


_IGNORED = {
    # names, and what belongs to the mask sampler, the teacher's schedule or the run rather than to the network
    "_name", "supported_modality", "clone_batch", "ema_decay", "ema_end_decay", "ema_anneal_end_step",
    "min_target_var", "min_pred_var", "mask_prob", "mask_prob_adjust", "mask_length", "mask_dropout",
    "inverse_mask", "add_masks", "keep_masked_pct", "mask_noise_std", "init_extra_token_zero",
    "mae_init", "decoder_group",
    # copies of the model's own numbers of heads and blocks
    "num_alibi_heads", "model_depth",
    # start value of a parameter that the case carries, and width of hidden projection layers where there are none
    "alibi_scale", "projection_ratio",
}  # fmt: skip

_MUST_BE: dict[str, tuple[Any, ...]] = {
    # value(s) at which an option changes nothing here
    "layer_norm_first": (False,), "end_of_block_targets": (False,), "drop_path_rate": (0,),
    "start_drop_path_rate": (0,), "end_drop_path_rate": (0,), "norm_affine": (True,), "recon_loss": (0,),
    "d2v_loss": (1,), "dropout_input": (0,), "prenet_layerdrop": (0,), "num_extra_tokens": (0,),
    "local_grad_mult": (1,), "encoder_zero_mask": (True,), "learned_alibi": (False,), "use_alibi_encoder": (False,),
    "learned_alibi_scale": (False,), "learned_alibi_scale_per_head": (False,),
    "learned_alibi_scale_per_layer": (False,),
    "add_positions_masked": (False,), "add_positions_all": (False,), "projection_layers": (1,),
    "batch_norm_targets": (False,), "no_scale_embedding": (True,), "learned_pos": (True,), "in_chans": (3,),
    "layernorm_embedding": (True,), "fixed_positions": (True,), "flexible_mask": (False,), "utterance_level": (False,),
}  # fmt: skip

_TRAINING_ONLY = {
    # of the above: what only a training run computes differently; fine-tuned files set some of them
    "drop_path_rate", "start_drop_path_rate", "end_drop_path_rate", "dropout_input", "prenet_layerdrop",
    "local_grad_mult", "encoder_zero_mask",
}  # fmt: skip


@dataclass
class Notes:
    """Findings of a lenient reading, which does not refuse them."""

    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Known keys with their values, by section."""
    ignored: list[str] = field(default_factory=list)
    """Other keys, as `section.key=value`."""


class Fields:
    """One level of an official config: reads with defaults and remembers what was read."""

    def __init__(self, values: dict[str, Any] | None, where: str, notes: Notes | None) -> None:
        self.values = values or {}
        self.where = where
        self.notes = notes
        self.read: set[str] = set()

    def __call__(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self.values.get(name, default)

    def required(self, name: str) -> Any:
        """Read a value for which no default is known."""
        if name not in self.values:
            raise UnsupportedOptionError(f"{self.where}{name} is not given and has no known default")
        return self(name, None)

    def finish(self) -> None:
        """Refuse every key that was not read, unless its value is None or known to change nothing.

        With notes, unknown keys and those that only training reads are noted instead.
        """
        unsupported = []
        known = {}
        for name, found in self.values.items():
            if name in self.read or name in _IGNORED or name in _MUST_BE:
                known[name] = found
            if name in self.read or name in _IGNORED or found is None or found in _MUST_BE.get(name, ()):
                continue
            if self.notes is not None and (name not in _MUST_BE or name in _TRAINING_ONLY):
                self.notes.ignored.append(f"{self.where}{name}={found!r}")
            else:
                unsupported.append(f"{self.where}{name}={found!r}")
        if unsupported:
            raise UnsupportedOptionError(", ".join(unsupported))
        if self.notes is not None:
            self.notes.known[self.where] = known


LAYER_NORMS: dict[str, NormKind] = {
    "instance_norm_target_layer": "instance",
    "layer_norm_target_layer": "layer",
    "batch_norm_target_layer": "batch",
}
FINAL_NORMS: dict[str, NormKind] = {"layer_norm_targets": "layer", "instance_norm_targets": "instance"}


_SPEC_CHARACTERS = 1000
_SPEC_LAYERS = 1000


def conv_layers(text: str) -> tuple[ConvLayer, ...]:
    """Read a layer list such as ``[(512, 10, 5)] + [(512, 3, 2)] * 4`` without executing it.

    Raises:
        ValueError: if it is anything but lists, tuples, integers, ``+`` and ``*``.
    """
    if len(text) > _SPEC_CHARACTERS:
        raise ValueError(f"feature_encoder_spec: expected at most {_SPEC_CHARACTERS} characters, found {len(text)}")

    message = f"feature_encoder_spec: expected a list of (channels, kernel, stride), found {text!r}"

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(value(item) for item in node.elts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            product = value(node.left), value(node.right)
            many = max((len(one) for one in product if not isinstance(one, int)), default=0)
            times = max((one for one in product if isinstance(one, int)), default=0)
            if many * times <= _SPEC_LAYERS:
                return product[0] * product[1]
        raise ValueError(message)

    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise ValueError(message) from error
    layers = value(tree.body)
    if not isinstance(layers, list) or not all(isinstance(layer, tuple) and len(layer) == 3 for layer in layers):
        raise ValueError(message)
    return tuple(layers)
