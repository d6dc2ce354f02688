"""One training step of a golden case of data2vec 1.0: forward, losses, gradients and one teacher update."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.data2vec1_keymap import is_buffer, translate
from d2v2ds.model.block import TargetLayer
from d2v2ds.model.positions import relative_index
from d2v2ds.objectives.data2vec1 import Data2Vec1, Data2Vec1Network, WholeOutput, student_batch
from d2v2ds.objectives.ema import ema_decay
from d2v2ds.objectives.loss import channel_moments, mean_channel_std, regression_loss
from d2v2ds.objectives.targets import make_targets
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.shapes import PAD_ID
from d2v2ds.verify.data2vec1.case import FirstCase
from d2v2ds.verify.networks import recorded, total_loss, without_grad
from d2v2ds.verify.report import Report

TARGETS: dict[str, TargetLayer] = {
    "attn": "attention",
    "ffn": "feed_forward",
    "fc": "feed_forward",
    "ffn_residual": "feed_forward_residual",
    "end": "block",
}
"""Our name of a target layer by that of the recorded tensors."""


def check_first_case(folder: Path, name: str, report: Report) -> None:
    """Compare one case; see `check_first_step`."""
    check_first_step(FirstCase.read(folder, name), report)


def check_first_step(case: FirstCase, report: Report) -> None:
    """Compare one step.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
    """
    objective, student, teacher = case.build()
    batch = case.batch()
    with recorded(_watched(student)) as of_student, recorded(_watched(teacher)) as of_teacher:
        out: WholeOutput = student(batch, without_grad(teacher))
    _compare_layers(report, case, "student", of_student, student)
    _compare_layers(report, case, "teacher", of_teacher, teacher)
    _compare_candidates(report, case, teacher, out["local"])
    _compare_inputs(report, case, student)
    _compare_losses(report, case, out)
    _compare_gradients(report, case, student, "grad/", total_loss(out) / batch.num_masked)
    for prefix, target in _other_gradients(case):
        own = case.network.own
        changed = replace(own, target=replace(own.target, layer=target))
        other = replace(case.network.objective, modalities={case.network.modality: changed})
        other_teacher = other.build(case.network.trunk, seed=0).build_teacher_network().eval()
        other_teacher.load_state_dict(teacher.state_dict())
        loss = total_loss(student(batch, without_grad(other_teacher)))
        _compare_gradients(report, case, student, prefix, loss / batch.num_masked)
    _compare_update(report, case, objective, student, teacher)
    if unseen := case.tensors.unseen() + case.grads.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")


def _watched(network: Any) -> dict[str, nn.Module]:
    """Modules whose outputs are compared."""
    (encoder,) = network.trunk.encoders.values()
    watched: dict[str, nn.Module] = {"prenet": encoder.prenet}
    for i, block in enumerate(network.trunk.blocks):
        watched |= {f"block{i}": block, f"block{i} attention": block.attn}
    for name in ("positions", "relative", "local"):
        if hasattr(encoder, name):
            watched[name] = getattr(encoder, name)
    if hasattr(getattr(encoder, "local", None), "convs"):
        watched["convs"] = encoder.local.convs
    if hasattr(network.trunk, "norm"):
        watched["norm"] = network.trunk.norm
    for vector in getattr(network, "mask_vectors", {}).values():
        watched["masked"] = vector
    return watched


def _compare_layers(report: Report, case: FirstCase, side: str, outputs: dict[str, Any], network: Any) -> None:
    """Compare the intermediates of one network that the case recorded."""
    found: dict[str, Any] = {
        "local_features": outputs.get("local"),
        "masked_features": outputs.get("masked"),
        "pos_conv_out": outputs.get("positions"),
        "norm_out": outputs.get("norm"),
    }
    (encoder,) = network.trunk.encoders.values()
    if "convs" in outputs:
        found["local_encoder_out"] = outputs["convs"].transpose(1, 2)  # (B, C, T)
    if "relative" in outputs:
        found["rel_pos_bias"] = outputs["relative"][0]
    found["encoder_in"] = outputs["prenet"]
    found["embedding_out"] = outputs.get("local")
    for i in range(case.network.trunk.shared_depth):
        found[f"block{i}_end"], branch = outputs[f"block{i}"]
        if side == "student":
            found[f"block{i}_fc"] = branch
        found[f"block{i}_attn_raw"] = outputs[f"block{i} attention"]
    for name, value in found.items():
        key = f"mid/{side}/{name}"
        if value is not None and key in case.tensors:
            report.compare(f"{side} {name}", value, case.tensors[key])


def _compare_candidates(report: Report, case: FirstCase, teacher: TeacherNetwork, local: Tensor) -> None:
    """Compare every tensor of the teacher from which targets may be made, and the targets and losses of each."""
    own, batch = case.network.own, case.batch()
    masked = batch.span_masks.time  # type: ignore[union-attr]
    read = batch
    if own.teacher_input == "masked_tokens":
        read = replace(batch, source=batch.source.masked_fill(~masked, PAD_ID), padding=~masked)  # type: ignore[operator]
    pred = case.tensors["out/regression_pred"]
    for name, target in TARGETS.items():
        blocks = {f"block{i}": block for i, block in enumerate(teacher.trunk.blocks)}
        with torch.no_grad(), recorded(blocks) as outputs:
            layers = teacher.trunk.target_layers(read, local, target, clear_padding=True)
        for i in range(len(blocks)):  # with the CLS token, which targets leave out
            if (expected := case.tensors.get(f"mid/teacher/block{i}_{name}")) is not None:
                report.compare(f"teacher block{i}_{name}", outputs[f"block{i}"][1], expected)
        if f"variant/{name}/loss_total" not in case.tensors:
            continue
        made = make_targets(layers, replace(own.target, layer=target))[masked]
        report.compare(f"{name} targets", made, case.tensors[f"variant/{name}/regression_target"])
        loss = regression_loss(pred, made, own.loss)
        report.compare(f"{name} loss", loss, case.tensors[f"variant/{name}/loss_total"])
        if f"variant/{name}/target_var" in case.tensors:
            report.compare(f"{name} target_var", spread(made), case.tensors[f"variant/{name}/target_var"])


def spread(vectors: Tensor) -> float:
    """`pred_var` and `target_var` of the official log."""
    return mean_channel_std(channel_moments(vectors), len(vectors))


def _compare_inputs(report: Report, case: FirstCase, student: Data2Vec1Network) -> None:
    """Compare masked ids, padding and tables of offsets."""
    batch, own = case.batch(), case.network.own
    encoder: Any = student.trunk.encoders[case.network.modality]
    masked = batch.span_masks.time  # type: ignore[union-attr]
    read = student_batch(batch, masked, own)  # type: ignore[arg-type]
    report.compare("source", read.source, case.tensors["in/source"])
    if "mid/frame_padding_mask" in case.tensors:
        padding = encoder.token_padding(batch.padding, masked.shape[1])  # type: ignore[union-attr]
        report.compare("frame padding", padding, case.tensors["mid/frame_padding_mask"])
    if batch.padding is not None and own.mask_token is not None:
        report.compare("padding", batch.source == PAD_ID, case.tensors["in/padding_mask"])
    for key, value in case.buffers().items():
        case.tensors.seen.add(key)
        case.grads.seen.add(key)
        if key.endswith("relative_position_index"):
            report.compare(
                "relative position index", relative_index(encoder.relative.rows, encoder.relative.columns), value
            )
        else:
            report.compare("version", value, torch.full_like(value, float(_VERSION)))


_VERSION = 3.0
"""Constant of fairseq's sentence encoder."""


def _compare_losses(report: Report, case: FirstCase, out: WholeOutput) -> None:
    """Compare targets, predictions, losses and the logged spreads."""
    tensors, count = case.tensors, len(out["pred"])
    report.compare("targets", out["target"], tensors["out/targets_full"])
    report.compare("regression target", out["wanted"], tensors["out/regression_target"])
    report.compare("regression prediction", out["pred"], tensors["out/regression_pred"])
    report.compare("sample size", float(count), tensors["loss/sample_size"])
    total = total_loss(out)
    if case.network.layout == "image of BEiT":  # recorded as a mean
        report.compare("loss total", total / count, tensors["loss/total"])
    else:
        report.compare("loss total", total, tensors["loss/total"])
        name = "main" if "loss/main" in tensors else "regression"
        report.compare(f"loss {name}", out["losses"]["regression"], tensors[f"loss/{name}"])
        report.compare("loss per sample", total / count, tensors["loss/total_per_sample"])
    for name, value in (("pred_var", out["pred"]), ("target_var", out["wanted"])):
        if f"log/{name}" in tensors:
            report.compare(name, spread(value), tensors[f"log/{name}"])


def _other_gradients(case: FirstCase) -> Iterator[tuple[str, TargetLayer]]:
    """Yield the prefix of gradients that were recorded for another target layer."""
    for name, target in TARGETS.items():
        if any(key.startswith(f"grad_{name}/") for key in case.grads):
            yield f"grad_{name}/", target


def _compare_gradients(report: Report, case: FirstCase, student: Data2Vec1Network, prefix: str, loss: Tensor) -> None:
    """Compare every gradient; that of the keys' bias, which is rounding noise, on the scale of the queries'."""
    student.zero_grad()
    loss.backward()
    expected = case.of_student(case.part(prefix, of_grads=True))
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if set(expected) != set(trained):
        raise D2V2Error(f"gradients: the file and the model differ in {sorted(set(expected) ^ set(trained))[:5]}")
    for name, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        report.compare(f"{prefix[:-1]} {_group(name)}", found, expected[name].reshape(found.shape))


def _group(name: str) -> str:
    """Name the part of the model under which a parameter's gradient is reported."""
    parts = name.removeprefix("trunk.").split(".")
    return parts[2] if parts[0] == "encoders" else parts[0]


def _compare_update(
    report: Report, case: FirstCase, objective: Data2Vec1, student: Data2Vec1Network, teacher: TeacherNetwork
) -> None:
    """Compare the teacher after one update with the unchanged student."""
    decay = float(case.grads["ema_after/decay"])
    after = case.part("ema_after/", of_grads=True)
    del after["decay"]
    weights = dict(student.named_parameters())
    expected = case.of_teacher(after, {name: p.detach() for name, p in weights.items()})
    copied = set(case.meta.get("ema_copied_keys", [])) - {"version"}
    ours = {name for name in expected if objective.is_copied(name)}
    of_file = to_names(case, copied) | {name for name in ours if name not in to_names(case, after)}
    report.compare("copied parameters", float(ours == of_file), 1.0)
    for name, parameter in teacher.named_parameters():
        mine = weights[name].detach()
        found = mine if objective.is_copied(name) else parameter.detach().lerp(mine, 1.0 - decay)
        report.compare("EMA step", found, expected[name].reshape(parameter.shape))
    before, trained = case.part("teacher/"), case.part("student/")
    for key, value in after.items():  # entries of the official teacher without effect: their arithmetic alone
        if case.is_idle(key):
            moved = before[key].lerp(trained[f"{case.network.teacher_prefix}{key}"], 1.0 - decay)
            report.compare("EMA step, idle entries", moved, value)
    if "ema_decay" in case.meta["model"] and case.meta["model"].get("ema_end_decay") is not None:
        report.compare("1 - decay", 1.0 - ema_decay(1, case.network.objective.ema), 1.0 - decay)


def to_names(case: FirstCase, keys: Mapping[str, Tensor] | set[str]) -> set[str]:
    """Return our names of entries of the official teacher."""
    found = set()
    for key in keys:
        official = f"{case.network.teacher_prefix}{key}"
        if not is_buffer(official) and (translated := translate(official, case.network.layout)) is not None:
            found.add(translated[0])
    return found
