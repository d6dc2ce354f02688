"""`D2V2DSModel`: the trunk of data2vec 2.0 as a model of transformers.

Its parts are the very modules that d2v2ds trains, under the same names, and its features are those of
`Trunk.layers`. In: one of `input_values`, `pixel_values`, `input_ids`. Out: `D2V2DSOutput`.
"""

import types
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from itertools import repeat
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from d2v2ds.interop.hub.files.configuration_d2v2ds import D2V2DSConfig
from d2v2ds.interop.hub.files.networks_d2v2ds import NETWORKS
from d2v2ds.model.alibi import Alibi
from d2v2ds.model.attention import QueryValueBias
from d2v2ds.model.block import LayerScale
from d2v2ds.model.encoder import ExtraTokens
from d2v2ds.model.positions import GridPositions, RelativePositions
from d2v2ds.model.trunk import Trunk, TrunkConfig


@dataclass
class D2V2DSOutput(BaseModelOutput):
    """`BaseModelOutput`, and which frames are real."""

    attention_mask: Tensor | None = None
    """(B, T) bool, False = this frame is padding; None of images, and of audio that came without a mask."""


class D2V2DSModel(PreTrainedModel):
    """Encoders and shared blocks.

    Gradient checkpointing recomputes every block, without reentrance whatever is asked for: gradients of the distance
    penalty would be lost with it. Attention is `scaled_dot_product_attention`, or row by row in training on a CPU.
    """

    config_class = D2V2DSConfig
    base_model_prefix = "d2v2ds"
    _no_split_modules = ["Block", "ModalityEncoder"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    layers, encoder, normed = Trunk.layers, Trunk.encoder, Trunk.normed

    def __init__(self, config: D2V2DSConfig) -> None:
        super().__init__(config)
        trunk = Trunk(trunk_config(config.model or {}))
        self.encoders, self.blocks = trunk.encoders, trunk.blocks
        if hasattr(trunk, "norm"):
            self.norm = trunk.norm
        self.main_input_name = NETWORKS[next(iter(trunk.encoders))][1]
        self.gradient_checkpointing = False
        self._constants = [name for name, value in self.named_parameters() if not value.requires_grad]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but keep constants untrainable: transformers makes every weight trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        model: D2V2DSModel = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in model._constants:
            model.get_parameter(name).requires_grad_(False)
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        """Embedding of token ids, which gradient checkpointing and adapters ask for."""
        for name, (_, argument, _, _) in NETWORKS.items():
            if argument == "input_ids":
                embedding: nn.Module = self.get_submodule(f"encoders.{name}.local.tokens")
                return embedding
        found: nn.Module = super().get_input_embeddings()
        return found

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        with_extra_tokens: bool = False,
    ) -> D2V2DSOutput | tuple[Any, ...]:
        """Run one input of one modality.

        Args:
            input_values: (B, S) waveforms, each with zero mean and unit variance.
            attention_mask: (B, S), 0 = padding, of audio at the end; None: audio is all real, text as far as its ids
                are not `<pad>`.
            pixel_values: (B, 3, Y, X) normalised, or uint8.
            input_ids: (B, S) int64.
            output_hidden_states: whether to return the input of the first block and the output of every block.
            return_dict: False: a tuple.
            output_attentions: True is refused: attention probabilities are not kept.
            with_extra_tokens: keep the tokens in front that have no position, for heads that read one.

        Returns:
            `last_hidden_state` (B, T, D) without extra tokens; `hidden_states`, each (B, T, D); `attention_mask`.
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                "D2V2DSModel.forward: output_attentions=True: attention probabilities are not kept, expected False; "
                "output_hidden_states=True gives the features of every block"
            )
        given = {"input_values": input_values, "pixel_values": pixel_values, "input_ids": input_ids}
        sources = {name: given[argument] for name, (_, argument, _, _) in NETWORKS.items()}
        found = [argument for argument, source in given.items() if source is not None]
        arguments = [argument for _, argument, _, _ in NETWORKS.values()]
        if len(found) != 1 or found[0] not in arguments:
            raise ValueError(f"D2V2DSModel.forward: expected one of {arguments}, found {found}")
        modality = next(name for name, source in sources.items() if source is not None)
        source = sources[modality]
        assert source is not None
        _, _, is_padded, pad_id = NETWORKS[modality]
        padding = None if attention_mask is None or not is_padded else attention_mask == 0  # (B, S)
        if pad_id is not None:
            padding = source == pad_id if padding is None else padding
            source = source.masked_fill(padding, pad_id)
        run = None
        if self.gradient_checkpointing and self.training:
            run = partial(self._gradient_checkpointing_func, use_reentrant=False)
        layers = self.layers(modality, source, padding, run=run, with_extra_tokens=with_extra_tokens)
        extra = self.encoder(modality).num_extra_tokens if with_extra_tokens else 0
        frames = self._padded_frames(modality, padding, layers[-1].shape[1] - extra)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = D2V2DSOutput(
            last_hidden_state=layers[-1],
            hidden_states=tuple(layers) if output_hidden_states else None,
            attention_mask=None if frames is None else frames.logical_not(),
        )
        return output.to_tuple() if return_dict is False else output

    def _padded_frames(self, modality: str, padding: Tensor | None, length: int) -> Tensor | None:
        """(B, S) -> (B, T), True = padding."""
        return self.encoder(modality).token_padding(padding, length)

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """(B, S) of samples -> (B, T) bool of frames, as the speech models of transformers call it."""
        modality = next(name for name, (_, argument, _, _) in NETWORKS.items() if argument == "input_values")
        frames = self._padded_frames(modality, attention_mask == 0, feature_vector_length)
        assert frames is not None
        return frames.logical_not()

    def _init_weights(self, module: nn.Module) -> None:
        """Only weights that no file gave: those of `from_config`."""
        if isinstance(module, ExtraTokens):
            init.normal_(module.tokens)
        elif isinstance(module, GridPositions):
            init.copy_(module.table, module.first_table())
        elif isinstance(module, Alibi):
            init.ones_(module.scale)
        elif isinstance(module, LayerScale):
            init.constant_(module.factors, module.first)
        elif isinstance(module, QueryValueBias):
            init.zeros_(module.queries)
            init.zeros_(module.values)
        elif isinstance(module, RelativePositions):
            init.zeros_(module.table)
        else:
            super()._init_weights(module)


def trunk_config(values: dict[str, Any]) -> TrunkConfig:
    """Settings of the trunk from plain values.

    Raises:
        ValueError: naming a number beyond its bounds, or fields that contradict each other.
    """
    given = {name: settings for name, settings in values["modalities"].items() if settings is not None}
    modalities = {name: from_plain(NETWORKS[name][0], settings, name) for name, settings in given.items()}
    shared: TrunkConfig = from_plain(TrunkConfig, values | {"modalities": {}}, "model")
    config = replace(shared, modalities=modalities)
    if problems := config.check():
        raise ValueError(f"config.json: model: {'; '.join(problems)}")
    return config


def from_plain(kind: Any, value: Any, name: str) -> Any:
    """Values as JSON holds them -> the dataclasses and tuples that a type names; numbers within their bounds."""
    if get_origin(kind) is Annotated:
        kind, *limits = get_args(kind)
        for limit in limits:
            _check_number(value, kind, limit, name)
    if value is None:
        return None
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        if not isinstance(value, dict) or value.keys() - hints.keys():
            type_name = getattr(kind, "__name__", kind)
            found = sorted(value.keys() - hints.keys()) if isinstance(value, dict) else value
            raise ValueError(f"config.json: {name}: expected the fields of {type_name}, found {found!r:.80}")
        fields = {field: from_plain(hints.get(field), part, f"{name}.{field}") for field, part in value.items()}
        return kind(**fields)  # type: ignore[operator]
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (choice for choice in get_args(kind) if choice is not type(None))
        return from_plain(kind, value, name)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        each = repeat(kinds[0]) if kinds[-1] is Ellipsis else kinds
        return tuple(from_plain(kind, part, name) for kind, part in zip(each, value, strict=False))
    return value


def _check_number(value: Any, kind: Any, limit: Any, name: str) -> None:
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    lowest = (limit.ge is None or value >= limit.ge) and (limit.gt is None or value > limit.gt) if fits else False
    highest = (limit.le is None or value <= limit.le) and (limit.lt is None or value < limit.lt) if fits else False
    if not (lowest and highest):
        raise ValueError(f"config.json: {name}: expected {kind.__name__} of {limit}, found {value!r:.40}")
