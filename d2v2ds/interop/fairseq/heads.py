"""Heads of official fine-tuned models as tasks of ours, and back.

Sources: the official examples/data2vec/models, mae_image_classification, data2vec_text_classification and
audio_classification, and fairseq's wav2vec_ctc: names of parameters, options and their defaults.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2v2ds.errors import CheckpointError
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.pickles import plain
from d2v2ds.io.read import validate
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.heads import FrameHeadConfig, FramePooling, PatchHeadConfig, PatchPooling, SentenceHeadConfig
from d2v2ds.tasks.known import TASKS as TASK_CONFIGS
from d2v2ds.tasks.vocabulary import SPECIAL

TunedConfig = CtcConfig | ClassifyConfig
Tensors = dict[str, Tensor]
_Choice = TypeVar("_Choice")

_SENTENCE = "classification_heads.sentence_classification_head."
HEAD = "head."
"""Beginning of our names of a head's parameters."""
_PROJ = f"{HEAD}proj."
IMAGE_POOLINGS: dict[str, PatchPooling] = {"MEAN_POOLING": "mean", "CLS_TOKEN": "cls"}
"""Pooling of image classification by its official name."""
FRAME_POOLINGS: dict[str, FramePooling] = {
    "lin_softmax": "linear_softmax",
    "average": "mean",
    "average_sigmoid": "mean_sigmoid",
    "max_sigmoid": "max",
    "max": "max",
    "average_before": "mean_features",
}
"""Pooling of audio classification by its official name; the first of equal ones is written."""
READ_OPTIONS = {"_name", "prediction_mode", "use_fc_norm", "num_classes"}
"""Official options of a fine-tuned model that are understood."""
_MADE_UP = re.compile(r"madeupword\d{4}")
"""Names that fill official dictionaries up to a multiple of 8."""


@dataclass(frozen=True)
class Facts:
    """What an official file says of its head beside the tensors, as plain values."""

    options: Mapping[str, Any]
    """Options of the fine-tuned model."""
    symbols: tuple[str, ...] = ()
    """Its dictionary of letters; empty if the file has none."""
    settings: Mapping[str, Any] | None = None
    """Our settings of the task; only files of ours have them."""
    sentences: int | None = None
    """Sentences of an input, 1 or 2; only files of ours say so, and only of text."""

    def choice(self, name: str, default: str, known: Mapping[str, _Choice]) -> _Choice:
        """Translate an option that is one of several words.

        Raises:
            UnsupportedOptionError: it is none of them.
        """
        found = self.options.get(name, default)
        if not isinstance(found, str) or found not in known:
            raise UnsupportedOptionError(f"{name}={found!r:.40}")
        return known[found]


def read_facts(content: Mapping[str, Any], made_by: str) -> Facts:
    """Read what a file says of its head.

    Args:
        content: of the file, as `read_pickled` gives it.
        made_by: key of `cfg` under which our exports say more.

    Raises:
        ValueError: it is nothing plain.
    """
    cfg, args = plain(content.get("cfg")), plain(content.get("args"))
    state = content.get("task_state")
    dictionary = plain(state.get("target_dictionary")) if isinstance(state, dict) else None
    symbols = dictionary.get("symbols") if isinstance(dictionary, dict) else None
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        symbols = []
    model = cfg.get("model") if isinstance(cfg, dict) else args
    own = cfg.get(made_by) if isinstance(cfg, dict) else None
    own = own if isinstance(own, dict) else {}
    settings, sentences = own.get("objective"), own.get("sentences")
    return Facts(
        options=model if isinstance(model, dict) else {},
        symbols=tuple(symbols),
        settings=settings if isinstance(settings, dict) else None,
        sentences=sentences if sentences in (1, 2) else None,
    )


# --- settings of a task from an official file, for C outputs ----------------------------------------------------------


def _ctc(facts: Facts, names: Sequence[str], outputs: int) -> TunedConfig:
    names = names or facts.symbols
    units = names[len(SPECIAL) :] if tuple(names[: len(SPECIAL)]) == SPECIAL else names
    if not units:
        raise CheckpointError(
            f"expected the letters of its {outputs} outputs, found none in the file; give its dict.ltr.txt with "
            "--outputs, or take the encoder alone with --encoder-only"
        )
    if len(set(units)) != len(units) or not all(units):
        raise CheckpointError(
            "expected different letters, found some twice or empty; give its dict.ltr.txt with --outputs"
        )
    if len(units) + len(SPECIAL) != outputs:
        raise CheckpointError(
            f"its head has {outputs} outputs, {len(units)} letters and {len(SPECIAL)} special symbols make "
            f"{len(units) + len(SPECIAL)}; give the dictionary that it was trained with"
        )
    return CtcConfig(modality="audio").with_names(tuple(units))


def _classes(names: Sequence[str], outputs: int) -> tuple[str, ...]:
    """Check the names of classes; none are allowed too."""
    classes = tuple(name for name in names if not _MADE_UP.fullmatch(name))
    if classes and len(classes) != outputs:
        raise CheckpointError(
            f"its head has {outputs} outputs, found {len(classes)} classes; give those that it was trained with"
        )
    return classes


def _image(facts: Facts, names: Sequence[str], outputs: int) -> TunedConfig:
    norm = facts.options.get("use_fc_norm", True)
    if not isinstance(norm, bool):
        raise UnsupportedOptionError(f"use_fc_norm={norm!r:.40}")
    head = PatchHeadConfig(pooling=facts.choice("prediction_mode", "MEAN_POOLING", IMAGE_POOLINGS), norm=norm)
    return ClassifyConfig(modality="image", classes=_classes(names, outputs), num_outputs=outputs, head=head)


def _text(facts: Facts, names: Sequence[str], outputs: int) -> TunedConfig:
    if outputs == 1:
        return ClassifyConfig(modality="text", kind="number", head=SentenceHeadConfig())
    classes = _classes(names, outputs)
    return ClassifyConfig(modality="text", classes=classes, num_outputs=outputs, head=SentenceHeadConfig())


def _audio(facts: Facts, names: Sequence[str], outputs: int) -> TunedConfig:
    head = FrameHeadConfig(pooling=facts.choice("prediction_mode", "lin_softmax", FRAME_POOLINGS))
    classes = _classes(names, outputs)
    return ClassifyConfig(modality="audio", kind="several", classes=classes, num_outputs=outputs, head=head)


@dataclass(frozen=True)
class OfficialTask:
    """One official model class of fine-tuning."""

    name: str
    """Name of the model in official configurations."""
    modality: str
    """Modality of the encoder."""
    prefix: str
    """Prefix of the encoder's parameters."""
    head: Mapping[str, str]
    """Beginnings of the head's parameters: official -> ours."""
    arguments: str
    """Option that holds the configuration of the pretrained model."""
    settings: Callable[[Facts, Sequence[str], int], TunedConfig]

    def our_name(self, official: str) -> str | None:
        """Translate the name of a parameter of the head; None if it is none."""
        for theirs, ours in self.head.items():
            if official.startswith(theirs):
                return ours + official.removeprefix(theirs)
        return None

    def official_name(self, name: str) -> str:
        """Translate back."""
        theirs, ours = next(pair for pair in self.head.items() if name.startswith(pair[1]))
        return theirs + name.removeprefix(ours)


TASKS = {
    "ctc": OfficialTask(
        "wav2vec_ctc", "audio", "w2v_encoder.w2v_model.", {"w2v_encoder.proj.": _PROJ}, "w2v_args", _ctc
    ),
    "patches": OfficialTask(
        "mae_image_classification", "image", "model.", {"fc_norm.": "head.norm.", "head.": _PROJ},
        "pretrained_model_args", _image,
    ),
    "sentence": OfficialTask(
        "data2vec_text_classification", "text", "model.",
        {f"{_SENTENCE}dense.": "head.dense.", f"{_SENTENCE}out_proj.": _PROJ}, "d2v_args", _text,
    ),
    "frames": OfficialTask(
        "audio_classification", "audio", "d2v_model.", {"proj.": _PROJ}, "w2v_args", _audio
    ),
}  # fmt: skip
"""By the name of our task, of classification by the kind of head."""


def official_task(config: TunedConfig) -> OfficialTask:
    """Find the official model class of a task of ours.

    Raises:
        UnsupportedOptionError: there is none.
    """
    if isinstance(config, CtcConfig) and config.units:
        raise UnsupportedOptionError("a recogniser of sentencepiece units: official dictionaries have no model of them")
    kind = config.head.kind if isinstance(config, ClassifyConfig) else config.name
    if kind not in TASKS or TASKS[kind].modality != config.modality:
        raise UnsupportedOptionError(f"no official model has a head of kind {kind} for {config.modality}")
    return TASKS[kind]


def read_head(
    tensors: Mapping[str, Tensor],
    prefix: str,
    modality: str,
    facts: Facts,
    names: Sequence[str],
    trunk: TrunkConfig,
) -> tuple[TunedConfig, Tensors]:
    """Translate the head of an official fine-tuned model.

    Args:
        tensors: everything outside the encoder, by official names.
        prefix: of the encoder's names.
        modality: of the encoder.
        facts: what the file says beside.
        names: letters or classes in the order of the outputs; empty: those of the file, if it has any.
        trunk: settings of the encoder.

    Returns:
        Settings of the task, and the head by our names.

    Raises:
        CheckpointError: the model is no known one, a tensor is unknown, missing or of another shape, or the names do
            not fit the outputs.
        UnsupportedOptionError: the head computes something that ours does not.
    """
    task = next((one for one in TASKS.values() if (one.prefix, one.modality) == (prefix, modality)), None)
    if task is None:
        raise CheckpointError(
            f"expected the head of {', '.join(one.name for one in TASKS.values())}, found an encoder of {modality} "
            f"under {prefix!r}; --encoder-only leaves out everything else"
        )
    found = {task.our_name(official): tensor for official, tensor in tensors.items()}
    last = found.get(f"{_PROJ}weight")
    if last is None or last.ndim != 2 or not len(last):
        shape = "none" if last is None else tuple(last.shape)
        raise CheckpointError(
            f"{task.official_name(_PROJ + 'weight')}: expected (outputs, {trunk.block.width}), as the head of "
            f"{task.name} has it, found {shape}; --encoder-only takes the encoder alone"
        )
    config = _own_settings(task, facts, names, trunk) or task.settings(facts, names, len(last))
    shapes = {name: tuple(one.shape) for name, one in head_state(config, trunk).items()}
    faults = [f"{official}: unknown to this head" for official in tensors if task.our_name(official) not in shapes]
    for name, shape in shapes.items():
        theirs = None if name not in found else tuple(found[name].shape)
        if theirs != shape:
            faults.append(f"{task.official_name(name)}: expected {shape}, found {'none' if theirs is None else theirs}")
    if faults:
        raise CheckpointError(f"not the head of {task.name}:\n  " + "\n  ".join(faults))
    return config, {name: found[name] for name in shapes}


def head_state(config: TunedConfig, trunk: TrunkConfig) -> Tensors:
    """Build the head of a task without memory for its weights; by our names."""
    with torch.device("meta"):
        network = config.build(trunk, 0).build_network(activation_checkpointing=False)
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith(HEAD)}


def tuned_config(settings: Mapping[str, Any], where: str) -> TunedConfig | None:
    """Read the settings of a task; None if they are those of another objective.

    Args:
        settings: plain values.
        where: file and place, for messages.

    Raises:
        CheckpointError: naming the first fields that do not fit.
    """
    name = settings.get("name")
    if name not in list(TASK_CONFIGS):
        return None
    return validate(TASK_CONFIGS[name], dict(settings), where, CheckpointError)


def _own_settings(task: OfficialTask, facts: Facts, names: Sequence[str], trunk: TrunkConfig) -> TunedConfig | None:
    """Read the settings that a file of ours carries; None for other files.

    Raises:
        CheckpointError: they are damaged, or not those of this model.
    """
    if facts.settings is None:
        return None
    where = "settings of the task in cfg"
    config = tuned_config(facts.settings, where)
    if config is None:
        raise CheckpointError(f"{where}: expected those of a task, found {facts.settings.get('name')!r:.40}")
    config = replace(config, freeze=(), outputs=None)  # patterns and paths of a run mean nothing for its weights
    if official_task(config) != task:
        raise CheckpointError(f"{where}: expected those of {task.name}, found those of {official_task(config).name}")
    if names:
        config = config.with_names(tuple(names))
    if problems := config.check(trunk):
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    return config


def official_configuration(config: TunedConfig, section: Mapping[str, Any]) -> dict[str, Any]:
    """Write `cfg.model` of a fine-tuned model.

    Args:
        config: settings of the task.
        section: official fields of the encoder.
    """
    task = official_task(config)
    model: dict[str, Any] = {"_name": task.name, task.arguments: {"model": dict(section)}}
    if isinstance(config, CtcConfig):
        return model | {"normalize": True}
    model["num_classes"] = len(config.classes) or config.num_outputs
    if isinstance(config.head, PatchHeadConfig):
        modes = {ours: theirs for theirs, ours in IMAGE_POOLINGS.items()}
        model |= {"prediction_mode": modes[config.head.pooling], "use_fc_norm": config.head.norm}
    elif isinstance(config.head, FrameHeadConfig):
        pooling = config.head.pooling
        model["prediction_mode"] = next(theirs for theirs, ours in FRAME_POOLINGS.items() if ours == pooling)
    return model
