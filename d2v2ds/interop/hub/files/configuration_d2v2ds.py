"""`D2V2DSConfig`: the config.json of an export folder as transformers reads it."""

from typing import Any

from transformers import PreTrainedConfig


class D2V2DSConfig(PreTrainedConfig):
    """Holds the keys of config.json that d2v2ds writes; all others are transformers' own."""

    model_type = "d2v2ds"

    model: dict[str, Any] | None = None
    """Plain values of `ModelConfig`."""
    objective: dict[str, Any] | None = None
    """Plain values of what the weights were trained for."""
    preprocessing: dict[str, Any] | None = None
    """Preprocessing by modality."""

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        """Settings of the modalities in use, by name."""
        modalities = (self.model or {}).get("modalities", {})
        return {name: settings for name, settings in modalities.items() if settings is not None}

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of one frame of speech; 1 without speech."""
        ratio = 1
        for settings in self.modalities.values():
            for _, _, stride in settings.get("conv_layers", ()):
                ratio *= int(stride)
        return ratio

    @property
    def hidden_size(self) -> int:
        """D, width of the model."""
        return int((self.model or {})["block"]["width"])

    @property
    def num_attention_heads(self) -> int:
        """H, attention heads."""
        return int((self.model or {})["block"]["num_heads"])

    @property
    def num_hidden_layers(self) -> int:
        """Blocks on the longest way through the model, a modality's own ones included."""
        own = max((settings["prenet_depth"] for settings in self.modalities.values()), default=0)
        return int((self.model or {})["shared_depth"]) + int(own)
