"""Golden cases of fine-tuning: their official options as settings of ours, their network with the official weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.heads import FRAME_POOLINGS, official_task
from d2v2ds.interop.fairseq.heads import TASKS as OFFICIAL_TASKS
from d2v2ds.interop.fairseq.keymap import to_official, to_ours
from d2v2ds.interop.fairseq.official_config import network_of
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.masking import SpanMaskConfig, Spans
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.classify import ClassifyConfig, LossKind
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.tasks.mixing import ImageMixingConfig, WaveformMixingConfig
from d2v2ds.tasks.task import Task
from d2v2ds.verify.case import TASKS, ReadTensors, Tensors
from d2v2ds.verify.finetuning.records import ReadValues, refuse_dropping


class Options:
    """Official options that remember which of them were read, so that none is overlooked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self._seen = values, set[str]()

    def __call__(self, name: str, default: Any) -> Any:
        """Return an option, or its official default."""
        self._seen.add(name)
        return self._values.get(name, default)

    def zero(self, *names: str) -> None:
        """Refuse options that drop at random what the case does not record."""
        for name in names:
            if self(name, 0):
                raise UnsupportedOptionError(f"{name}={self._values[name]} (expected 0: what was dropped is unknown)")

    def finish(self) -> None:
        """Refuse every option that was not read."""
        if unread := [f"{name}={self._values[name]!r}" for name in self._values.keys() - self._seen]:
            raise UnsupportedOptionError(", ".join(sorted(unread)))


@dataclass(frozen=True)
class TaskCase:
    """One golden case of a task as read from disk."""

    name: str
    meta: ReadValues
    trunk: TrunkConfig
    config: CtcConfig | ClassifyConfig
    num_outputs: int
    tensors: ReadTensors
    grads: Tensors | None
    """Gradients by official name; None for evaluation."""

    @staticmethod
    def read(folder: Path, name: str) -> "TaskCase":
        """Load NAME.json and its tensors.

        Raises:
            UnsupportedOptionError: the case computes something that ours does not.
        """
        meta = ReadValues(json.loads((folder / f"{name}.json").read_text()))
        task = meta["task"]
        if task not in TASKS:
            raise UnsupportedOptionError(f"task={task}")
        tensors = ReadTensors(load_file(folder / f"{name}.safetensors"))
        grads_file = folder / f"{name}.grads.safetensors"
        needs_grads = meta.get("training", False) and "trajectory" not in meta
        grads = load_file(grads_file) if needs_grads or grads_file.exists() else None
        options = Options(meta.get("finetune", {}))
        refuse_dropping(meta, TASKS[task])
        trunk = _trunk(meta, TASKS[task], options)
        config, outputs = _READERS[TASKS[task] if not task.startswith("ctc") else "ctc"](meta, options, tensors)
        options.finish()
        return TaskCase(name, meta, trunk, config, outputs, tensors, grads)

    @property
    def modality(self) -> str:
        """Modality of the inputs."""
        return self.config.modality

    @property
    def is_image(self) -> bool:
        """True for a classification of images."""
        return isinstance(self.config, ClassifyConfig) and isinstance(self.config.head, PatchHeadConfig)

    @property
    def is_text(self) -> bool:
        """True for a classification of sentences."""
        return isinstance(self.config, ClassifyConfig) and isinstance(self.config.head, SentenceHeadConfig)

    @property
    def is_audio(self) -> bool:
        """True for recordings: CTC, or labels of each."""
        return not (self.is_image or self.is_text)

    def build(self) -> tuple[Task[Any], Any]:
        """Build the objective, and its network with the official weights.

        Raises:
            D2V2Error: the tensors of the case are not those of its network.
        """
        objective = self.config.build(self.trunk, seed=0)
        network = objective.build_network(activation_checkpointing=False)
        state, loaded = network.state_dict(), {}
        for key in [key for key in self.tensors if key.startswith("model/")]:
            name, value = self.our_name(key.removeprefix("model/")), self.tensors[key]
            if name not in state or value.numel() != state[name].numel():
                raise D2V2Error(f"{key} {tuple(value.shape)}: the model has no such parameter")
            loaded[name] = value.reshape(state[name].shape)
        if missing := sorted(set(state) - set(loaded)):
            raise D2V2Error(f"model/: the file lacks {', '.join(missing)}")
        network.load_state_dict(loaded)
        return objective, network.train(self.meta.get("training", True))

    def our_name(self, official: str) -> str:
        """Translate the name of an official parameter.

        Raises:
            D2V2Error: it has none here.
        """
        task = official_task(self.config)
        if official.startswith(task.prefix):
            name = to_ours(official.removeprefix(task.prefix))
            if name is not None and not name.startswith("decoders."):
                return f"trunk.{name}"
        found = task.our_name(official)
        if found is None:
            raise D2V2Error(f"{official}: the model has no such parameter")
        return found


def official_task_name(name: str) -> str:
    """Translate the name of a parameter of image classification to the official one.

    Raises:
        D2V2Error: there is none.
    """
    if name.startswith("trunk."):
        official = to_official(name.removeprefix("trunk."))
        if official is None:
            raise D2V2Error(f"{name} has no official name")
        return OFFICIAL_TASKS["patches"].prefix + official
    return OFFICIAL_TASKS["patches"].official_name(name)


def _trunk(meta: Mapping[str, Any], modality: str, options: Options) -> TrunkConfig:
    """Translate the network, without dropout: the golden cases were made so."""
    official = json.loads(json.dumps(meta["pretrained_model"]))
    for key in ("encoder_dropout", "post_mlp_drop", "attention_dropout", "activation_dropout", "layerdrop"):
        official[key] = 0
    own = official["modalities"][modality]
    own["prenet_dropout"] = 0
    own |= _OWN_OPTIONS.get(modality, lambda meta, options, own: {})(meta, options, own)
    return network_of(official, modality, meta.get("vocab_size")).trunk


def _audio_options(meta: Mapping[str, Any], options: Options, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the front end and of ALiBi in fine-tuning."""
    if not meta["task"].startswith("ctc"):
        effective = meta.get("effective_audio_options", {})
        return {"encoder_zero_mask": True, "local_grad_mult": effective.get("local_grad_mult", 1)}
    return {
        "encoder_zero_mask": True,
        "local_grad_mult": options("feature_grad_mult", 0),
        "learned_alibi_scale": options("update_alibi", True) and own.get("learned_alibi_scale", False),
    }


_OWN_OPTIONS: dict[str, Callable[[Mapping[str, Any], Options, Mapping[str, Any]], dict[str, Any]]] = {
    "audio": _audio_options,
    "text": lambda meta, options, own: {"dropout": 0},
}
"""Modality -> its options that fine-tuning replaces."""


def _span_mask(options: Options) -> SpanMaskConfig:
    time, channels = options("mask_prob", 0.5), options("mask_channel_prob", 0)
    length, channel_length = options("mask_length", 10), options("mask_channel_length", 10)
    options("apply_mask", True)
    return SpanMaskConfig(
        time=Spans(fraction=time, length=length) if time else None,
        channels=Spans(fraction=channels, length=channel_length) if channels else None,
        equal_counts=True,
    )


def _ctc(meta: Mapping[str, Any], options: Options, tensors: Tensors) -> tuple[CtcConfig, int]:
    options.zero("dropout", "attention_dropout", "activation_dropout", "dropout_input", "final_dropout", "layerdrop")
    options.zero("mask_dropout", "blank_weight")
    criterion = Options(meta.get("criterion", {}))
    if not criterion("zero_infinity", False) or criterion("post_process", "letter") != "letter":
        raise UnsupportedOptionError(f"criterion={meta.get('criterion')}")
    criterion.finish()
    options("zero_mask", False)  # a case carries what was written
    symbols = tuple(meta["dictionary"])
    config = CtcConfig(
        modality="audio",
        vocabulary=symbols[4:],
        mask=_span_mask(options),
        mask_noise_std=0.0,
        hide_padding=False,
        freeze_steps=options("freeze_finetune_updates", 0),
    )
    return config, len(symbols)


def _image(meta: Mapping[str, Any], options: Options, tensors: Tensors) -> tuple[ClassifyConfig, int]:
    mode = options("prediction_mode", "MEAN_POOLING")
    if mode not in ("MEAN_POOLING", "CLS_TOKEN"):
        raise UnsupportedOptionError(f"prediction_mode={mode}")
    mixing = ImageMixingConfig(
        mixup=options("mixup", 0.8),
        cutmix=options("cutmix", 1.0),
        share=options("mixup_prob", 1.0),
        cutmix_share=options("mixup_switch_prob", 0.5),
    )
    outputs = options("num_classes", 1000)
    config = ClassifyConfig(
        modality="image",
        num_outputs=outputs,
        head=PatchHeadConfig(pooling="cls" if mode == "CLS_TOKEN" else "mean", norm=options("use_fc_norm", True)),
        image_mixing=mixing if mixing.mixup or mixing.cutmix else None,
        label_smoothing=options("label_smoothing", 0.1),
        drop_path=options("drop_path_rate", 0.1),
        layer_decay=options("layer_decay", 0.65),
        freeze_steps=(1 << 30) if options("linear_classifier", False) else 0,
    )
    return config, outputs


def _text(meta: Mapping[str, Any], options: Options, tensors: Tensors) -> tuple[ClassifyConfig, int]:
    options.zero("pooler_dropout")
    outputs = meta["num_classes"]
    kind: LossKind = "number" if meta["regression_target"] else "one"
    config = ClassifyConfig(
        modality="text", kind=kind, num_outputs=outputs, head=SentenceHeadConfig(), hide_padding=False
    )
    return config, outputs


def _audio(meta: Mapping[str, Any], options: Options, tensors: Tensors) -> tuple[ClassifyConfig, int]:
    options.zero("attention_dropout", "activation_dropout", "dropout_input", "final_dropout", "mask_dropout")
    mode = options("prediction_mode", "lin_softmax")
    if mode not in FRAME_POOLINGS:
        raise UnsupportedOptionError(f"prediction_mode={mode}")
    least, outputs = options("source_mixup", -1), meta["num_classes"]
    mixing = WaveformMixingConfig(
        least=max(least, 0.0), rows=options("mixup_prob", 1.0), labels=options("label_mixup", False)
    )
    config = ClassifyConfig(
        modality="audio",
        kind="several",
        num_outputs=outputs,
        head=FrameHeadConfig(pooling=FRAME_POOLINGS[mode], pool_padding=True),
        mask=_span_mask(options),
        mask_noise_std=0.0,
        hide_padding=False,
        waveform_mixing=mixing if least >= 0 else None,
        per_positive=True,
    )
    return config, outputs


_Read = Callable[[Mapping[str, Any], Options, Tensors], tuple[CtcConfig | ClassifyConfig, int]]
_READERS: dict[str, _Read] = {"ctc": _ctc, "image": _image, "text": _text, "audio": _audio}
