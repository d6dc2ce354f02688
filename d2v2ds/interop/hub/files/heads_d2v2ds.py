"""Fine-tuned models of d2v2ds as models of transformers: CTC, and classification of images, recordings and texts."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import cached_file

from d2v2ds.interop.hub.files.configuration_d2v2ds import D2V2DSConfig
from d2v2ds.interop.hub.files.modeling_d2v2ds import D2V2DSModel, from_plain
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig, TokenHead

_HEAD_FILE = "objective.safetensors"
_HEAD_CONFIGS = {"patches": PatchHeadConfig, "sentence": SentenceHeadConfig, "frames": FrameHeadConfig}


class _WithHead(PreTrainedModel):
    """Encoder and head; d2v2ds keeps the head's weights in a file of their own."""

    config_class = D2V2DSConfig
    base_model_prefix = "d2v2ds"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "ModalityEncoder"]
    _keys_to_ignore_on_load_missing = [r"head\..*"]
    accepts_loss_kwargs = False  # losses are means over inputs, whatever else a Trainer counts

    head: nn.Module

    def __init__(self, config: D2V2DSConfig) -> None:
        super().__init__(config)
        self.d2v2ds = D2V2DSModel(config)
        self.main_input_name = self.d2v2ds.main_input_name

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, then the head; constants stay untrainable."""
        model, info = super().from_pretrained(name, *args, **(kwargs | {"output_loading_info": True}))
        loaded = (model, info) if kwargs.get("output_loading_info") else model
        for constant in model.d2v2ds._constants:
            model.d2v2ds.get_parameter(constant).requires_grad_(False)
        options: dict[str, Any] = {
            key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if key in kwargs
        }
        if _has_head(name, options):  # saved by transformers, with the encoder
            return loaded
        file = cached_file(name, _HEAD_FILE, _raise_exceptions_for_missing_entries=False, **options)
        if file is None:
            raise OSError(f"{name}: expected the head in {_HEAD_FILE} or model.safetensors, found it in neither")
        state = {key.removeprefix("head."): value for key, value in load_file(file).items()}
        like = next(model.head.parameters())
        model.head.load_state_dict({key: value.to(like.dtype) for key, value in state.items()})
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        self.d2v2ds._init_weights(module)


def _has_head(name: Any, options: dict[str, Any]) -> bool:
    """Return True if model.safetensors, or the index of its pieces, lists tensors of a head."""
    for file in ("model.safetensors", "model.safetensors.index.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path is not None and file.endswith(".json"):
            listed = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            return any(key.startswith("head.") for key in listed)
        if path is not None:
            with safe_open(path, "pt") as tensors:
                return any(key.startswith("head.") for key in tensors.keys())  # noqa: SIM118
    return False


class D2V2DSForCTC(_WithHead):
    """Letters of every frame; output 0 is blank."""

    def __init__(self, config: D2V2DSConfig) -> None:
        super().__init__(config)
        settings = config.objective or {}
        self.head = TokenHead(config.hidden_size, config.vocab_size, settings.get("final_dropout", 0.0))
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """
        Args:
            input_values: (B, S) waveforms, each with zero mean and unit variance.
            attention_mask: (B, S), 0 = padding.
            labels: (B, U) numbers of letters, -100 = padding.
            return_dict: False: a tuple.

        Returns:
            `logits` (B, T, V); `loss`, mean over utterances of -ln p(letters), with labels.
        """
        found = self.d2v2ds(input_values=input_values, attention_mask=attention_mask, **kwargs)
        logits = self.head(found.last_hidden_state)
        if found.attention_mask is not None:  # padded frames are blank, as in the official code
            hidden = found.attention_mask.logical_not()
            logits = logits.masked_fill(hidden[..., None], torch.finfo(logits.dtype).min)
            logits[..., 0] = logits[..., 0].masked_fill(hidden, 0)
        loss = None
        if labels is not None:
            real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            frames = (real if found.attention_mask is None else found.attention_mask).sum(1)
            log_probs = F.log_softmax(logits.float(), -1).transpose(0, 1)
            lengths, letters = (labels >= 0).sum(1), labels.clamp(min=1)
            loss = F.ctc_loss(log_probs, letters, frames, lengths, reduction="none", zero_infinity=True).mean()
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return output.to_tuple() if return_dict is False else output


class _Classifier(_WithHead):
    """One vector of logits for each input."""

    def __init__(self, config: D2V2DSConfig) -> None:
        super().__init__(config)
        values = (config.objective or {})["head"]
        settings: Any = from_plain(_HEAD_CONFIGS[values["kind"]], values, "objective.head")
        self.head = settings.build(config.hidden_size, config.num_labels)
        self.post_init()

    def _classify(self, kind: Any, labels: Tensor | None, return_dict: bool | None, **inputs: Any) -> Any:
        """Run encoder and head; returns an output of the given kind, or a tuple."""
        found = self.d2v2ds(**inputs, with_extra_tokens=True)
        padding = None if found.attention_mask is None else found.attention_mask.logical_not()
        (encoder,) = self.d2v2ds.encoders.values()
        logits = self.head(found.last_hidden_state, encoder.num_extra_tokens, padding)
        scale = float((self.config.objective or {}).get("scale", 1.0))
        loss = None
        if labels is not None:
            wanted = (self.config.objective or {}).get("kind", "one")
            if wanted == "one":
                loss = F.cross_entropy(logits.float(), labels)
            elif wanted == "several":
                loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum") / len(labels)
            else:
                loss = (logits.float()[:, 0] - labels / scale).square().mean()
        scaled = logits * scale if scale != 1.0 else logits
        output = kind(loss=loss, logits=scaled, hidden_states=found.hidden_states)
        return output.to_tuple() if return_dict is False else output


class D2V2DSForImageClassification(_Classifier):
    """Classes of images."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """(B, 3, Y, X) -> `logits` (B, C); `loss` with (B,) labels."""
        inputs = {"pixel_values": pixel_values}
        return self._classify(ImageClassifierOutput, labels, return_dict, **inputs, **kwargs)


class D2V2DSForAudioClassification(_Classifier):
    """Classes of recordings."""

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """(B, S) -> `logits` (B, C); `loss` with labels."""
        inputs = {"input_values": input_values, "attention_mask": attention_mask}
        return self._classify(SequenceClassifierOutput, labels, return_dict, **inputs, **kwargs)


class D2V2DSForSequenceClassification(_Classifier):
    """Classes of texts, or numbers."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """(B, S) ids -> `logits` (B, C); `loss` with labels."""
        kwargs.pop("token_type_ids", None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._classify(SequenceClassifierOutput, labels, return_dict, **inputs, **kwargs)
