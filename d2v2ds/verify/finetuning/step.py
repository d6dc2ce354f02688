"""One forward and backward pass of a golden case of fine-tuning, with all intermediates."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.batch import Batch, Labels, SpanMasks
from d2v2ds.errors import D2V2Error
from d2v2ds.modalities.audio.inference import normalised
from d2v2ds.modalities.text.sentences import join_sentences
from d2v2ds.model.alibi import alibi_slopes, dense_bias
from d2v2ds.model.block import drop_path_rates
from d2v2ds.shapes import AUDIO_NORM_EPS
from d2v2ds.tasks.classify import Classify, ClassifyConfig
from d2v2ds.tasks.ctc import Ctc, CtcConfig, ctc_losses, greedy
from d2v2ds.tasks.mixing import ImageMix, WaveformMix, mix_classes, mix_images, mix_labels, mix_waveforms
from d2v2ds.tasks.words import edit_counts
from d2v2ds.verify.finetuning.case import TaskCase
from d2v2ds.verify.finetuning.records import (
    compare_log,
    compare_masks,
    compare_padding,
    compare_settings,
    refuse_unread,
)
from d2v2ds.verify.networks import recorded
from d2v2ds.verify.report import Report


def check_task(case: TaskCase, report: Report) -> None:
    """Compare one step of a case.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
    """
    objective, network = case.build()
    compare_settings(report, case, objective, network)
    compare_masks(report, case)
    batch = make_batch(case, report)
    if isinstance(objective, Classify):  # the batch is mixed already
        objective = Classify(replace(objective.config, image_mixing=None, waveform_mixing=None), case.trunk, 0)
    _set_draws(case, network)
    step = _step_of(case)
    objective.kept_blocks = lambda step: kept_blocks(case.meta, network)  # type: ignore[method-assign]
    with recorded(_watched(case, network)) as outputs, torch.set_grad_enabled(step is not None):
        losses = objective.losses(network, batch, step)
    _compare_encoder(report, case, network, batch, outputs)
    total = torch.stack(list(losses.sums.values())).sum()
    if isinstance(objective, Ctc):
        _compare_ctc(report, case, objective, batch, losses.output)
    else:
        _compare_classification(report, case, outputs, losses.output["logits"])
    report.compare("loss total", total.detach(), case.tensors["loss/total"])
    report.compare("sample size", losses.count, case.tensors["loss/sample_size"])
    report.compare("loss per sample", total.detach() / losses.count, case.tensors["loss/total_per_sample"])
    compare_log(report, case, batch.source, batch.required_labels().lengths, losses)
    if case.grads is not None:
        (total / losses.count).backward()
        compare_gradients(report, case, network)
    refuse_unread(case.tensors, case.meta)


def _step_of(case: TaskCase) -> int | None:
    """Number of finished updates; None in evaluation."""
    return int(case.meta.get("num_updates", 0)) if case.meta["training"] else None


def kept_blocks(meta: dict[str, Any], network: Any) -> list[bool] | None:
    """Return the blocks that ran, prenet first; None if all did."""
    if "blocks_run" not in meta:
        return None
    shared = len(network.trunk.blocks)
    (encoder,) = network.trunk.encoders.values()
    ran = meta.get("prenet_blocks_run", [])
    prenet = [i in ran for i in range(len(encoder.prenet.blocks))]
    return prenet + [i in meta["blocks_run"] for i in range(shared)]


def make_batch(case: TaskCase, report: Report) -> Batch:
    """Build the input of a case from what it was made of, and compare it with what is recorded."""
    tensors, meta = case.tensors, case.meta
    if case.is_image:
        return _image_batch(case, report)
    source, padding = tensors["in/source"], tensors.get("in/padding_mask")
    if case.is_audio:
        compare_padding(report, source, padding)
    if isinstance(case.config, CtcConfig):
        _compare_waves(report, case, source, padding)
        labels = _ctc_labels(case, report)
    elif case.is_audio:
        source, labels = _tagged(case, report, source, padding)
    else:
        _compare_sentences(report, case, source)
        labels = Labels(values=tensors["in/target"].reshape(len(source)))
        report.compare("targets", labels.values, torch.tensor(meta["targets"]))
    masks = None
    time, channels = tensors.get("mask/time"), tensors.get("mask/channel")
    if time is not None or channels is not None:
        masks = SpanMasks(
            time=None if time is None else time.bool(), channels=None if channels is None else channels.bool()
        )
    return Batch(
        modality=case.modality,
        source=source,
        padding=None if padding is None else padding.bool(),
        ids=torch.arange(len(source)),
        span_masks=masks,
        labels=labels,
    )


def _image_batch(case: TaskCase, report: Report) -> Batch:
    tensors, mixing = case.tensors, case.meta.get("mixup")
    images, classes = tensors["in/imgs"], tensors["in/labels"].long()
    labels = Labels(values=classes)
    if mixing is not None:
        box = mixing.get("cutmix_box_y0_y1_x0_x1")
        mix = ImageMix(mixing["lam_corrected"] if box else mixing["lam_drawn"], tuple(box) if box else None)
        if box:
            area = (box[1] - box[0]) * (box[3] - box[2]) / (images.shape[-1] * images.shape[-2])
            report.compare("mixing coefficient", 1.0 - area, mixing["lam_corrected"])
        assert isinstance(case.config, ClassifyConfig)
        soft = mix_classes(classes, case.num_outputs, case.config.label_smoothing, mix)
        images = mix_images(images, mix)
        report.compare("mixed images", images, tensors["mixup/imgs"])
        report.compare("mixed labels", soft, tensors["mixup/targets"])
        labels = Labels(values=soft)
    return Batch(modality="image", source=images, ids=torch.arange(len(images)), labels=labels)


def _compare_waves(report: Report, case: TaskCase, source: Tensor, padding: Tensor | None) -> None:
    """Compare normalisation and padding with the waveforms before both."""
    made = torch.zeros_like(source)
    real = torch.zeros_like(source, dtype=torch.bool)
    for row in range(len(source)):
        if (wave := case.tensors.get(f"in/wave{row}")) is not None:
            made[row, : len(wave)] = normalised(wave.numpy(), AUDIO_NORM_EPS)
            real[row, : len(wave)] = True
    if real.any():
        report.compare("normalised waveforms", made, source)
        if padding is not None:
            report.compare("padding", ~real, padding)


def _ctc_labels(case: TaskCase, report: Report) -> Labels:
    letters, lengths = case.tensors["in/target"].long(), case.tensors["in/target_lengths"].long()
    if "labels" in case.meta:
        objective = case.config.build(case.trunk, 0)
        assert isinstance(objective, Ctc)
        texts = ["".join(label.split()).replace("|", " ") for label in case.meta["labels"]]
        spelled = [torch.tensor(objective.vocabulary.encode(text)) for text in texts]
        made = nn.utils.rnn.pad_sequence(spelled, batch_first=True, padding_value=1)
        report.compare("letters", made, letters)
        report.compare("numbers of letters", torch.tensor([len(one) for one in spelled]), lengths)
    return Labels(values=letters, lengths=lengths)


def _tagged(case: TaskCase, report: Report, source: Tensor, padding: Tensor | None) -> tuple[Tensor, Labels]:
    """Labels of recordings with several each, and both after mixing."""
    labels, mixing = case.tensors["in/label"], case.meta.get("mixup")
    made = torch.zeros_like(labels)
    for row, indices in zip(made, case.meta["labels"], strict=True):
        row[indices] = 1.0
    report.compare("labels", made, labels)
    if mixing is not None:
        assert isinstance(case.config, ClassifyConfig) and case.config.waveform_mixing is not None
        rows = torch.tensor([i in mixing.get("mixed_rows", range(len(source))) for i in range(len(source))])
        (own,) = mixing["r"]
        mix = WaveformMix(own, torch.tensor(mixing["permutation"]), rows)
        source = mix_waveforms(source, None, mix)
        labels = mix_labels(labels, mix) if case.config.waveform_mixing.labels else labels
    report.compare("mixed waveforms", source, case.tensors["mixup/source"])
    report.compare("mixed labels", labels, case.tensors["mixup/label"])
    return source, Labels(values=labels)


def _compare_sentences(report: Report, case: TaskCase, source: Tensor) -> None:
    sentences = case.meta.get("sentences_without_specials")
    if sentences is not None:
        parts = [one if isinstance(one[0], list) else [one] for one in sentences]
        rows = [torch.from_numpy(join_sentences(*one)) for one in parts]
        made = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        report.compare("tokens", made, source)


def _set_draws(case: TaskCase, network: Any) -> None:
    """Replace what is drawn at random by what the case recorded."""
    noise = case.tensors.get("mask/noise")
    if noise is not None:
        network.masked.noise = lambda like: noise
    rates = case.meta.get("drop_path_rate_per_block")
    blocks = network.blocks(case.modality)
    if rates is not None:
        made = drop_path_rates(len(rates["prenet"]), len(rates["main"]), case.config.drop_path)
        if made != [block.mlp_drop_path.rate for block in blocks] or any(
            abs(a - b) > 1e-6 for a, b in zip(made, [*rates["prenet"], *rates["main"]], strict=True)
        ):
            raise D2V2Error(f"drop path: expected the rates {rates}, found {made}")
    number = 0
    for block in blocks:
        for path in (block.attention_drop_path, block.mlp_drop_path):
            if path.rate and case.meta["training"]:
                factors = case.tensors[f"mask/drop_path{number}"]
                path.factors = lambda like, factors=factors: factors
                number += 1


def _watched(case: TaskCase, network: Any) -> dict[str, nn.Module]:
    """Modules whose outputs are compared."""
    encoder = network.trunk.encoders[case.modality]
    watched = {"context_in": encoder.prenet, "head": network.head, "local": encoder.local}
    watched |= {"masked": network.masked}
    watched |= {f"prenet_block{i}_out": block for i, block in enumerate(encoder.prenet.blocks)}
    watched |= {f"block{i}_out": block for i, block in enumerate(network.trunk.blocks)}
    if hasattr(encoder, "positions"):
        watched["pos_conv_out"] = encoder.positions
    if hasattr(encoder.local, "convs"):
        watched["convs"] = encoder.local.convs
    for name in ("norm", "dense", "proj"):
        if hasattr(network.head, name):
            watched[f"head.{name}"] = getattr(network.head, name)
    return watched


def _compare_encoder(report: Report, case: TaskCase, network: Any, batch: Batch, outputs: dict[str, Any]) -> None:
    """Compare what the case recorded between input and head."""
    tensors = case.tensors
    encoder = network.trunk.encoders[case.modality]
    extra = encoder.num_extra_tokens
    ran = [name for name in outputs if name.startswith("prenet_block") and name.endswith("_out")]
    head_in = outputs["head input"]  # (B, E + T, D), or (B, T, D) for CTC
    is_cls = getattr(network.head, "pooling", "") == "cls"
    found = {
        "local_encoder_out": outputs["convs"].transpose(1, 2) if "convs" in outputs else outputs["local"],
        "local_features": outputs["local"],
        "masked_features": outputs["masked"],
        "pos_conv_out": outputs.get("pos_conv_out"),
        "context_in": outputs["context_in input"],
        "context_out": outputs[ran[-1]][0] if ran else outputs["context_in"],
        "encoder_out": head_in if isinstance(case.config, CtcConfig) or is_cls else head_in[:, extra:],
    }
    found |= {name: value[0] for name, value in outputs.items() if "block" in name and name.endswith("_out")}
    for name, value in found.items():
        if f"mid/{name}" in tensors and value is not None:
            report.compare(name, value.detach(), tensors[f"mid/{name}"])
    length = outputs["local"].shape[1]
    if "mid/frame_padding_mask" in tensors:
        padding = encoder.token_padding(batch.padding, length)
        full = torch.zeros(len(batch.source), length) if padding is None else padding
        report.compare("frame padding", full, tensors["mid/frame_padding_mask"])
    if "mid/alibi_bias" in tensors:
        is_scaled = len(encoder.alibi.scale) == 1
        penalty = encoder.alibi()[0] if is_scaled else torch.tensor(alibi_slopes(encoder.alibi.num_heads))
        bias = dense_bias(torch.arange(length)[None], penalty.detach(), None)
        assert bias is not None
        wanted = tensors["mid/alibi_bias"]
        report.compare("alibi bias", bias.expand_as(wanted), wanted)


def _compare_ctc(report: Report, case: TaskCase, objective: Ctc, batch: Batch, out: Any) -> None:
    """Compare logits, losses of each utterance and greedy decoding."""
    tensors, labels = case.tensors, batch.required_labels()
    assert labels.lengths is not None
    logits, frames = out["logits"].detach(), out["frames"]
    report.compare("logits", logits, tensors["out/logits_before_padding"])
    padded = torch.arange(logits.shape[1]) >= frames[:, None]  # (B, T)
    of_padding = torch.full((logits.shape[-1],), -torch.inf)
    of_padding[0] = 0.0
    hidden = torch.where(padded[..., None], of_padding, logits)
    report.compare("logits, padding overwritten", hidden, tensors["out/logits"])
    if "out/log_probs" in tensors:
        report.compare("log probabilities", F.log_softmax(hidden.float(), -1), tensors["out/log_probs"])
    report.compare("frames", frames, tensors["out/input_lengths"])
    each = ctc_losses(logits, frames, labels.values, labels.lengths)
    report.compare("loss of each utterance", each, tensors["loss/per_utterance"])
    report.compare("letters in all", labels.lengths.sum(), tensors["loss/ntokens"])
    if "greedy_tokens" in case.meta:
        found = greedy(logits, frames)
        for mine, wanted in zip(found, case.meta["greedy_tokens"], strict=True):
            report.compare("greedy letters", torch.tensor(mine), torch.tensor(wanted))
        words = [" ".join(objective.vocabulary.words(one)) for one in found]
        report.compare("greedy words", float(words == case.meta["greedy_words"]), 1.0)
        _compare_error_rates(report, case, objective, batch, found)


def _compare_error_rates(report: Report, case: TaskCase, objective: Ctc, batch: Batch, found: list[list[int]]) -> None:
    labels = batch.required_labels()
    assert labels.lengths is not None
    wanted = [row[:n] for row, n in zip(labels.values.tolist(), labels.lengths.tolist(), strict=True)]
    spell = objective.vocabulary.words
    words = [edit_counts(spell(a), spell(b)) for a, b in zip(wanted, found, strict=True)]
    letters = [edit_counts(a, b) for a, b in zip(wanted, found, strict=True)]
    log = case.meta["logging"]
    for name, counts in (("w", words), ("c", letters)):
        errors, total = sum(one.errors for one in counts), sum(one.wanted for one in counts)
        report.compare(f"{name}_errors", errors, log[f"{name}_errors"])
        report.compare(f"{name}_total", total, log[f"{name}_total"])
        rate = case.meta["wer" if name == "w" else "uer"]
        report.compare("word error rate" if name == "w" else "letter error rate", 100 * errors / total, rate)


def _compare_classification(report: Report, case: TaskCase, outputs: dict[str, Any], logits: Tensor) -> None:
    """Compare pooling, head and logits."""
    tensors, logits = case.tensors, logits.detach()
    found: dict[str, Tensor] = {}
    if case.is_image:
        found = {"pooled": outputs["head.norm input"], "head_in": outputs["head.proj input"]}
    elif case.is_text:
        found = {"dense_out": outputs["head.dense"]}
    else:
        found = {"encoder_out_padding_zeroed": outputs["head.proj input"], "proj_out": outputs["head.proj"]}
    for name, value in found.items():
        if f"mid/{name}" in tensors:
            report.compare(name, value.detach(), tensors[f"mid/{name}"])
    shares = logits.sigmoid()
    for name, value in (("logits", logits), ("predictions", shares), ("probabilities", shares)):
        if f"out/{name}" in tensors:
            report.compare(name, value, tensors[f"out/{name}"])


def compare_gradients(report: Report, case: TaskCase, network: nn.Module) -> None:
    """Compare the gradient of every parameter that has one.

    Raises:
        D2V2Error: another set of parameters has gradients.
    """
    assert case.grads is not None
    expected = {case.our_name(key.removeprefix("grad/")): value for key, value in case.grads.items()}
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    if set(found) != set(expected):
        raise D2V2Error(f"gradients: the file and the model differ in {sorted(set(expected) ^ set(found))}")
    if len(found) != case.meta.get("parameters_with_gradient", len(found)):
        raise D2V2Error(
            f"parameters_with_gradient: expected {case.meta['parameters_with_gradient']}, found {len(found)}"
        )
    for name, grad in found.items():
        report.compare(f"gradient {_part(name)}", grad, expected[name].reshape(grad.shape))


def _part(name: str) -> str:
    """Name the part of the model under which a parameter's gradient is reported."""
    parts = name.removeprefix("trunk.").split(".")
    return {"blocks": "blocks", "head": "head"}.get(parts[0], parts[2] if len(parts) > 2 else parts[0])
