"""Plain numbers of a golden case that no tensor shows: settings, counts of parameters, scores that were logged."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.keymap import to_official
from d2v2ds.interop.fairseq.official_config import network_of
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.modalities.text.tokenizers import BOS, EOS
from d2v2ds.objectives.data2vec2 import Data2Vec2Config
from d2v2ds.objectives.ema import EmaConfig
from d2v2ds.objectives.protocol import Losses
from d2v2ds.shapes import PAD_ID
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.scores import confusion_scores
from d2v2ds.tasks.task import Task, bits
from d2v2ds.tasks.vocabulary import SPECIAL, UNKNOWN
from d2v2ds.verify.case import Tensors
from d2v2ds.verify.report import Report

_ONLY_DESCRIBED = {
    "note", "seed", "head_init_std_mean", "head_init_std_absmax", "logging.report_mcc", "logging._world_size",
    "num_updates", "final_missing_means_unchanged", "metrics.f1", "metrics.acc_and_f1",
}  # fmt: skip
"""Values that describe how a case was made; nothing is computed from them. Of `head_init` the tests have the law."""
_HALF_A_DIGIT = 0.00051
"""Largest difference of a score that is recorded with three digits."""


class ReadValues(dict[str, Any]):
    """Values of a case's JSON file that remember which of them were read; inner ones of `logging` and `metrics` too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        nested = {key: ReadValues(values[key]) for key in ("logging", "metrics") if isinstance(values.get(key), dict)}
        super().__init__({**values, **nested})
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default if the case did not record it."""
        self._seen.add(key)
        return super().get(key, default)

    def unread(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of values that nothing was computed from or compared with."""
        for key, value in self.items():
            name = prefix + key
            if isinstance(value, ReadValues):
                yield from value.unread(f"{name}.")
            elif key not in self._seen and name not in _ONLY_DESCRIBED:
                yield name


def refuse_unread(tensors: Any, meta: ReadValues) -> None:
    """Refuse tensors and values that were not read.

    Raises:
        D2V2Error: there are some.
    """
    if unread := [*tensors.unseen(), *meta.unread()]:
        raise D2V2Error(f"nothing to compare with {', '.join(unread)}")


def refuse_dropping(meta: Mapping[str, Any], modality: str) -> None:
    """Refuse dropouts of the pretraining options that the fine-tuning of this task keeps.

    CTC and image classification replace all of them, audio classification some, text none.

    Raises:
        UnsupportedOptionError: one is not 0: what was dropped is unknown.
    """
    kept = {
        "text": ("encoder_dropout", "post_mlp_drop", "attention_dropout", "activation_dropout", "layerdrop"),
        "audio": () if meta["task"].startswith("ctc") else ("encoder_dropout", "post_mlp_drop", "layerdrop"),
    }.get(modality, ())
    options: dict[str, Any] = {name: meta["pretrained_model"].get(name, 0) for name in kept}
    if kept:
        own = meta["pretrained_model"]["modalities"][modality]
        options |= {name: own.get(name, 0) for name in ("prenet_dropout", "prenet_layerdrop", "dropout")}
    if found := [f"{name}={value}" for name, value in options.items() if value]:
        raise UnsupportedOptionError(f"{', '.join(found)} (expected 0: what was dropped is unknown)")


def compare_settings(report: Report, case: Any, task: Task[Any], network: torch.nn.Module) -> None:
    """Compare settings that the case records twice, names and counts of parameters, and special tokens.

    Raises:
        D2V2Error: they contradict each other.
    """
    meta, modality = case.meta, case.modality
    said = meta["pretrained_model"].get("supported_modality", modality)
    report.compare("modality", float(str(said).lower() == modality), 1.0)
    report.compare("name", float(meta["name"] == case.name), 1.0)
    expected = set(_decoder_keys(case))
    dropped = set(meta.get("dropped_checkpoint_keys", expected))
    if dropped != expected:
        raise D2V2Error(f"dropped_checkpoint_keys: differ from the decoder's in {sorted(dropped ^ expected)}")
    names = [name for name, value in network.named_parameters() if value.requires_grad or ".convs." in name]
    report.compare("parameters", len(names), meta.get("trainable_parameters", len(names)))
    groups = meta.get("param_groups", {})
    for name, is_head in (("pretrained", False), ("projection", True)):
        found = sum(one.startswith("head.") == is_head for one in names)
        report.compare(f"parameters {name}", found, groups.get(name, found))
    scales = meta.get("lr_scale")
    if scales is not None:
        recorded = {case.our_name(name): scale for name, scale in scales.items()}
        if set(recorded) != set(network.state_dict()):
            raise D2V2Error(f"lr_scale: names differ in {sorted(set(recorded) ^ set(network.state_dict()))}")
        for name, scale in recorded.items():
            report.compare("lr scale", task.lr_scale(name), scale)
    _compare_specials(report, meta)
    if not meta.get("sentence_avg", True):
        raise UnsupportedOptionError("sentence_avg=False")
    if "effective_audio_options" in meta:
        _compare_effective(report, meta)


def _decoder_keys(case: Any) -> list[str]:
    """Official names of the parameters of the pretraining decoder."""
    official, modality = case.meta["pretrained_model"], case.modality
    pretraining = network_of(official, modality, case.meta.get("vocab_size"))
    any_ema = EmaConfig(start_decay=0.999, end_decay=0.999, anneal_steps=0)
    objective = Data2Vec2Config(ema=any_ema, modalities={modality: pretraining.objective()})
    network = objective.build(pretraining.trunk, seed=0).build_network(activation_checkpointing=False)
    return [str(to_official(name)) for name, _ in network.named_parameters() if name.startswith("decoders.")]


def _compare_specials(report: Report, meta: Mapping[str, Any]) -> None:
    """Compare special tokens of text, and the first symbols of a recogniser."""
    if "special_ids" in meta:
        ours = {"<s>": BOS, "<pad>": PAD_ID, "</s>": EOS, "<unk>": UNKNOWN, "<mask>": meta["vocab_size"] - 1}
        report.compare("special tokens", float(meta["special_ids"] == ours), 1.0)
    if "dictionary" in meta:
        report.compare("special symbols", float(tuple(meta["dictionary"][: len(SPECIAL)]) == SPECIAL), 1.0)


def _compare_effective(report: Report, meta: Mapping[str, Any]) -> None:
    """Compare the options that the encoder had in the end with those of pretraining and fine-tuning."""
    tuned, own = meta["finetune"], meta["pretrained_model"]["modalities"]["audio"]
    ours = {
        "mask_prob": tuned.get("mask_prob", 0.5),
        "mask_length": tuned.get("mask_length", 10),
        "mask_noise_std": own.get("mask_noise_std", 0.01),
        "mask_dropout": tuned.get("mask_dropout", 0),
        "mask_channel_prob": tuned.get("mask_channel_prob", 0),
        "mask_channel_length": tuned.get("mask_channel_length", 10),
        "encoder_zero_mask": tuned.get("zero_mask", False),
        "local_grad_mult": tuned.get("feature_grad_mult", 0),
        "prenet_layerdrop": tuned.get("layerdrop", 0),
        "prenet_dropout": tuned.get("dropout", 0),
        "add_masks": own.get("add_masks", False),
        "learned_alibi_scale": tuned.get("update_alibi", True) and own.get("learned_alibi_scale", False),
    }
    for name, value in meta["effective_audio_options"].items():
        if name not in ours:
            raise D2V2Error(f"effective_audio_options: {name} is unknown")
        report.compare("effective options", float(ours[name]), float(value))


def compare_masks(report: Report, case: Any) -> None:
    """Compare which draws a case has with its options: masks and noise in training, mixing."""
    meta, tensors = case.meta, case.tensors
    options, is_training = meta.get("finetune", {}), meta["training"]
    is_masked = is_training and case.is_audio and options.get("apply_mask", True)
    for name, share in (("time", options.get("mask_prob", 0.5)), ("channel", options.get("mask_channel_prob", 0))):
        report.compare(f"{name} masks are drawn", float(f"mask/{name}" in tensors), float(bool(is_masked and share)))
    # audio classification keeps `encoder_zero_mask` of pretraining, whose default is True
    is_zero = not isinstance(case.config, CtcConfig) or options.get("zero_mask", False)
    has_noise = "mask/time" in tensors and not is_zero
    report.compare("noise is drawn", float("mask/noise" in tensors), float(has_noise))
    if has_noise and "mask/noise" in tensors:
        elsewhere = tensors["mask/noise"][~tensors["mask/time"].bool()]
        report.compare("noise elsewhere", torch.zeros_like(elsewhere), elsewhere)
    mixing = meta.get("mixup")
    if mixing is not None and case.is_audio:
        (own,) = mixing["r"]
        report.compare("mixing share is possible", float(max(1e-6, options["source_mixup"]) <= own <= 1.0), 1.0)
    elif case.is_image:
        side = meta["pretrained_model"]["modalities"]["image"].get("input_size", 224)
        report.compare("image size", torch.tensor(tensors["in/imgs"].shape[-2:]), torch.tensor([side, side]))
        is_mixed = is_training and bool(options.get("mixup", 0.8) or options.get("cutmix", 1.0))
        report.compare("mixing is drawn", float(mixing is not None), float(is_mixed))
        if mixing is not None:
            _compare_box(report, mixing, tuple(tensors["in/imgs"].shape[-2:]))
        rates = meta.get("drop_path_rate_per_block", {"prenet": [], "main": []})
        used = [rate for rate in (*rates["prenet"], *rates["main"]) for _ in range(2) if rate and is_training]
        called = torch.tensor(meta.get("drop_path_rates_in_call_order", used), dtype=torch.float64)
        report.compare("drop path rates", torch.tensor(used, dtype=torch.float64), called)


def _compare_box(report: Report, mixing: Mapping[str, Any], size: tuple[int, ...]) -> None:
    """Compare the sides of a cutmix box with the drawn coefficient; a side at the border may be cut off."""
    box = mixing.get("cutmix_box_y0_y1_x0_x1")
    report.compare("cutmix", float(box is not None), float(mixing["use_cutmix"]))
    for (first, last), side in zip(((box[0], box[1]), (box[2], box[3])) if box else (), size, strict=False):
        half = int(side * math.sqrt(1.0 - mixing["lam_drawn"])) // 2
        is_cut = first == 0 or last == side
        fits = half <= last - first <= 2 * half if is_cut else last - first == 2 * half
        report.compare("cutmix box", float(fits), 1.0)


def compare_log(report: Report, case: Any, source: Tensor, letters: Tensor | None, losses: Losses) -> None:
    """Compare what the official criterion logs and the metrics that follow from it.

    Args:
        report: takes the errors.
        case: with what was logged.
        source: inputs, as in `Batch`.
        letters: (B,) numbers of letters; None if there are none.
        losses: of the batch.
    """
    log, rows = case.meta.get("logging", {}), len(source)
    total = float(torch.stack(list(losses.sums.values())).sum().detach())
    tokens = int((source != PAD_ID).sum()) if case.is_text else rows
    statistics = losses.statistics
    found: dict[str, float] = {
        "loss": total,
        "sample_size": losses.count,
        "nsentences": rows,
        "ntokens": tokens if letters is None else int(letters.sum()),
    }
    if "correct" in statistics:
        found |= {"correct": float(statistics["correct"]), "ncorrect": float(statistics["correct"])}
    for name in [name for name in found if name in log]:
        report.compare(f"logged {name}", found[name], log[name])
    if "wv_errors" in log:  # of the decoder; without one the greedy words
        report.compare("logged wv_errors", log["wv_errors"], log["w_errors"])
    if "pred" in log:
        report.compare("found classes", losses.output["logits"].argmax(-1), torch.tensor(log["pred"]))
        report.compare("right classes", torch.tensor(log["targ"]), torch.tensor(case.meta["targets"]))
    _compare_metrics(report, case.meta, found, statistics)


def _compare_metrics(report: Report, meta: Mapping[str, Any], found: Mapping[str, float], statistics: Tensors) -> None:
    """Compare metrics, which are recorded with three digits."""
    metrics = meta.get("metrics", {})
    scores = {
        "loss": bits(found["loss"] / found["sample_size"]),
        "nll_loss": bits(found["loss"] / found["ntokens"]),
    }
    if "correct" in statistics:
        scores["accuracy"] = 100 * float(statistics["correct"]) / found["nsentences"]
    if "confusion" in statistics:
        scores["mcc"] = 100 * confusion_scores(statistics["confusion"])["mcc"]
    for name in [name for name in scores if name in metrics]:
        report.allow(f"metric {name}", abs(scores[name] - metrics[name]) / _HALF_A_DIGIT)


def compare_padding(report: Report, source: Tensor, padding: Tensor | None) -> None:
    """Compare padding with what it hides: zeros of recordings, at the end of their rows."""
    if padding is None:
        return
    ends = all(not (before & ~after).any() for before, after in pairwise(padding.bool().unbind(1)))
    report.compare("padding is at the end", float(ends), 1.0)
    report.compare("padding is zero", source[padding.bool()], torch.zeros(int(padding.sum())))
