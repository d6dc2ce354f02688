"""Whole training steps of a golden case: teacher update, forward, backward, clipping, schedule, Adam."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from d2v2ds.batch import Batch
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.objectives.data2vec2 import StudentOutput
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig
from d2v2ds.train.schedule import LearningRateConfig, learning_rate
from d2v2ds.verify.case import Case
from d2v2ds.verify.networks import (
    build,
    clipped,
    compare_state,
    ema_step,
    official_loss,
    set_noise,
    total_loss,
    without_grad,
)
from d2v2ds.verify.report import Report
from d2v2ds.verify.step import spread


def check_trajectory(case: Case, folder: Path, report: Report) -> None:
    """Run the recorded steps and compare each of them, then the final weights.

    Raises:
        UnsupportedOptionError: the steps were made with mask noise, which is not recorded.
    """
    meta = json.loads((folder / f"{case.name}.traj.json").read_text())
    tensors = load_file(folder / f"{case.name}.traj.safetensors")
    hyper, changes = meta["hyper"], meta["config_changes"]
    if changes["mask_noise_std"] != 0.0:
        raise UnsupportedOptionError(f"trajectory with mask_noise_std={changes['mask_noise_std']}")
    student, teacher = build(case)
    set_noise(student, case.modality, torch.zeros_like(case.tensors["mid/decoder_noise_full"]))
    ema = EmaConfig(
        start_decay=changes["ema_decay"],
        end_decay=changes["ema_end_decay"],
        anneal_steps=changes["ema_anneal_end_step"],
    )
    rate = LearningRateConfig(peak=hyper["lr"], warmup_steps=hyper["warmup"])
    optimizer = _optimizer(student, hyper)
    for step, expected in enumerate(meta["trajectory"]):
        if step:
            ema_step(teacher, student, ema_decay(step, ema))
            report.compare("traj decay", ema_decay(step, ema), expected["teacher_decay_before_forward"])
        batch = case.batch(tensors[f"mask{step}"])
        out = student(batch, without_grad(teacher))
        optimizer.zero_grad()
        (total_loss(out) / batch.num_masked).backward()
        norm = clipped([p for p in student.parameters() if p.grad is not None], hyper["clip"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, rate, hyper["max_update"])
        optimizer.step()
        report.compare("traj learning rate", optimizer.param_groups[0]["lr"], expected["lr"])
        report.compare("traj gradient norm", norm, expected["grad_norm_before_clip"])
        _compare_losses(report, case, batch, out, expected)
    compare_state(report, "traj final student", student, tensors, "final_student/", case.modality, with_key_bias=False)
    compare_state(report, "traj final teacher", teacher, tensors, "final_teacher/", case.modality, with_key_bias=False)


def _optimizer(student: nn.Module, hyper: Mapping[str, Any]) -> EarlyEpsilonAdam:
    config = OptimConfig(
        betas=tuple(hyper["betas"]), eps=hyper["eps"], weight_decay=hyper["wd"], clip_norm=hyper["clip"]
    )
    return EarlyEpsilonAdam([p for p in student.parameters() if p.requires_grad], lr=0.0, config=config)


def _compare_losses(report: Report, case: Case, batch: Batch, out: StudentOutput, expected: Mapping[str, Any]) -> None:
    report.compare("traj sample size", batch.num_masked, expected["sample_size"])
    report.compare("traj loss", total_loss(out).detach() / batch.num_masked, expected["loss_per_sample"])
    for name, loss in out["losses"].items():
        wanted = expected["losses_sum"][official_loss(name, case.modality)]
        report.compare(f"traj loss {name}", loss.detach(), wanted)
    for name, value in (("pred_var", out["pred"]), ("target_var", out["wanted"])):
        report.compare(f"traj {name}", spread(value, batch), expected[name])
