"""One training step of a golden case: forward, losses, gradients and one teacher update, with all intermediates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v2ds.batch import Batch
from d2v2ds.errors import D2V2Error
from d2v2ds.model.alibi import alibi_slopes, dense_bias
from d2v2ds.model.positions import GridPositions, sin_cos_grid
from d2v2ds.objectives.data2vec2 import Data2Vec2Network, StudentOutput
from d2v2ds.objectives.loss import channel_moments, mean_channel_std
from d2v2ds.verify.case import Case
from d2v2ds.verify.networks import (
    build,
    compare_state,
    ema_step,
    official_loss,
    our_name,
    recorded,
    set_noise,
    total_loss,
    without_grad,
)
from d2v2ds.verify.report import Report


def check_step(case: Case, report: Report) -> None:
    """Compare one step.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
    """
    student, teacher = build(case)
    set_noise(student, case.modality, case.tensors["mid/decoder_noise_full"])
    batch = case.batch()
    with (
        recorded(_watched(student, case.modality)) as of_student,
        recorded(_watched(teacher, case.modality)) as of_teacher,
    ):
        out: StudentOutput = student(batch, without_grad(teacher))
    for side, network in (("student", student), ("teacher", teacher)):
        compare_positions(report, f"{side} positions", network.trunk.encoder(case.modality))
    _compare_layers(report, case, "student", of_student)
    _compare_layers(report, case, "teacher", of_teacher)
    if "mid/student/context_in" in case.tensors:
        report.compare("student context_in", of_student["context_in input"], case.tensors["mid/student/context_in"])
    _compare_masks(report, case, batch, student)
    for name in ("decoder_in", "decoder_out"):
        if f"mid/{name}" in case.tensors:
            report.compare(name, of_student[name], case.tensors[f"mid/{name}"])
    _compare_losses(report, case, batch, out)
    if unseen := case.tensors.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")
    (total_loss(out) / batch.num_masked).backward()
    _compare_gradients(report, student, case)
    ema_step(teacher, student, float(case.grads["ema_after/decay"]))
    compare_state(report, "EMA step", teacher, case.grads, "ema_after/", case.modality)


def _watched(network: Any, modality: str) -> dict[str, nn.Module]:
    """Modules of a network whose outputs are compared."""
    encoder = network.trunk.encoders[modality]
    watched = {"context_in": encoder.prenet}
    watched |= {f"prenet{i}": block for i, block in enumerate(encoder.prenet.blocks)}
    watched |= {f"block{i}": block for i, block in enumerate(network.trunk.blocks)}
    if hasattr(encoder, "positions"):
        watched["positions"] = encoder.positions
    if hasattr(encoder, "local"):
        watched |= {"local_features": encoder.local}
        if hasattr(encoder.local, "convs"):
            watched |= {"front_end": encoder.local.convs}
    if hasattr(network, "decoders"):
        decoder = network.decoders[modality]
        watched |= {"decoder_in": decoder.mask_tokens, "decoder_out": decoder}
    return watched


def _compare_layers(report: Report, case: Case, side: str, outputs: dict[str, Any]) -> None:
    """Compare the intermediates of one network that the case recorded."""
    prenet_depth = case.network.trunk.modalities[case.modality].prenet_depth
    context_out = outputs[f"prenet{prenet_depth - 1}"][0] if prenet_depth else outputs["context_in"]
    local = outputs.get("local_features")
    found = {
        "local_encoder_out": local if "front_end" not in outputs else outputs["front_end"].transpose(1, 2),  # (B, C, T)
        "local_features": local,
        "pos_conv_out": outputs.get("positions"),
        "context_out": context_out,
    }
    for i in range(case.network.trunk.shared_depth):
        found[f"block{i}_out"], found[f"block{i}_target"] = outputs[f"block{i}"]
    for name, value in found.items():
        if value is not None and (expected := case.tensors.get(f"mid/{side}/{name}")) is not None:
            report.compare(f"{side} {name}", value, expected)


def compare_positions(report: Report, name: str, encoder: Any) -> None:
    """Compare a fixed table with its formula, for an input may be shorter than the table."""
    table = getattr(encoder, "fixed_positions", None)
    if isinstance(table, GridPositions):
        report.compare(name, sin_cos_grid(table.table.shape[-1], table.rows, table.columns)[None], table.table)


def _compare_masks(report: Report, case: Case, batch: Batch, student: Data2Vec2Network) -> None:
    """Compare padding, order of the visible tokens, masked share and distance penalty, as far as recorded."""
    masks = batch.required_masks()
    keep, masked = masks.rows()
    noise = case.tensors["mid/decoder_noise_full"]
    seen = noise.gather(1, keep[..., None].expand(-1, -1, noise.shape[-1]))
    report.compare("noise of visible tokens", seen, torch.zeros_like(seen))
    encoder: Any = student.trunk.encoders[case.modality]
    padding = encoder.token_padding(batch.padding, masks.num_tokens)
    if "mid/student/kept_padding_mask" in case.tensors:
        kept = padding.repeat_interleave(masks.num_masks, 0).gather(1, keep)
        kept = F.pad(kept, (encoder.num_extra_tokens, 0))
        report.compare("student kept_padding_mask", kept, case.tensors["mid/student/kept_padding_mask"])
    if "mask/ids_restore" in case.tensors:
        restored = case.tensors["mask/ids_restore"].long().gather(1, keep)
        report.compare("ids_restore", restored, torch.arange(keep.shape[1]).expand_as(keep))
    if "log/masked_pct" in case.tensors:
        share = 1.0 - keep.shape[1] / masked.shape[1]  # of row 0, which alone decides K
        report.compare("masked_pct", share, case.tensors["log/masked_pct"])
    if "mid/student/alibi_bias" in case.tensors:
        is_scaled = len(encoder.alibi.scale) == 1  # with scales of each block the recorded bias is the unscaled one
        slopes = torch.tensor(alibi_slopes(encoder.alibi.num_heads))
        dense = dense_bias(keep, encoder.alibi()[0] if is_scaled else slopes, None)
        assert dense is not None
        report.compare("student alibi_bias", dense, case.tensors["mid/student/alibi_bias"])


def _compare_losses(report: Report, case: Case, batch: Batch, out: StudentOutput) -> None:
    """Compare targets, predictions, losses and the logged spreads."""
    target = out["wanted"]
    report.compare("targets", out["target"], case.tensors["out/targets_full"])
    report.compare("regression target", target, case.tensors["out/regression_target"])
    report.compare("regression prediction", out["pred"], case.tensors["out/regression_pred"])
    for name, loss in out["losses"].items():
        report.compare(f"loss {name}", loss, case.tensors[f"loss/{official_loss(name, case.modality)}"])
    if "out/cls_pred" in case.tensors:
        report.compare("cls_pred", out["cls"], case.tensors["out/cls_pred"])
        # a mean over tokens may cancel to rounding noise: its error is that of what it was taken of
        size = case.tensors["out/targets_full"].abs().max()
        report.compare("cls_target", out["cls_wanted"] + size, case.tensors["out/cls_target"] + size)
    total = total_loss(out)
    report.compare("loss total", total, case.tensors["loss/total"])
    report.compare("sample size", batch.num_masked, case.tensors["loss/sample_size"])
    report.compare("loss per sample", total / batch.num_masked, case.tensors["loss/total_per_sample"])
    for name, value in (("pred_var", out["pred"]), ("target_var", target)):
        if f"log/{name}" in case.tensors:
            report.compare(name, spread(value, batch), case.tensors[f"log/{name}"])


def spread(vectors: Tensor, batch: Batch) -> float:
    """`pred_var` and `target_var` of the official log."""
    return mean_channel_std(channel_moments(vectors), batch.num_masked)


def _compare_gradients(report: Report, student: Data2Vec2Network, case: Case) -> None:
    expected = {
        our_name(key.removeprefix("grad/"), case.modality): value
        for key, value in case.grads.items()
        if key[:5] == "grad/"
    }
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if set(expected) != set(trained):
        raise D2V2Error(f"gradients: the file and the model differ in {sorted(set(expected) ^ set(trained), key=str)}")
    for name, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        report.compare(f"gradient {_group(name)}", found, expected[name].reshape(found.shape))


def _group(name: str) -> str:
    """Name the part of the model under which a parameter's gradient is reported."""
    parts = name.removeprefix("trunk.").split(".")
    return {"blocks": "blocks", "decoders": "decoder"}.get(parts[0], parts[2] if len(parts) > 2 else parts[0])
