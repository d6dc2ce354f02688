"""Recorded updates of CTC fine-tuning: frozen phase, forward, backward, clipping, schedule, Adam.

Recorded twice: with parameters that the optimizer leaves out while they have no gradient, and with gradients of zero.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d2v2ds.batch import SpanMasks
from d2v2ds.errors import D2V2Error
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.task import Task
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig, parameter_groups
from d2v2ds.train.schedule import LearningRateConfig, learning_rate
from d2v2ds.verify.finetuning.case import TaskCase
from d2v2ds.verify.finetuning.records import compare_settings, refuse_unread
from d2v2ds.verify.finetuning.step import kept_blocks, make_batch
from d2v2ds.verify.networks import clipped, without_keys
from d2v2ds.verify.report import Report


def check_trajectory(case: TaskCase, report: Report) -> None:
    """Run the recorded updates in both ways and compare each of them, then the final weights.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
    """
    if not isinstance(case.config, CtcConfig):
        raise D2V2Error(f"trajectory of {case.meta['task']}: only CTC is known")
    for label, records, final in (
        ("", "trajectory", "final/"),
        ("filled ", "trajectory_zero_filled", "final_zero_filled/"),
    ):
        config = replace(case.config, fill_frozen=bool(label))
        _run(replace(case, config=config), report, label, case.meta[records], final)
    refuse_unread(case.tensors, case.meta)


def _run(case: TaskCase, report: Report, label: str, records: list[dict[str, Any]], final: str) -> None:
    objective, network = case.build()
    compare_settings(report, case, objective, network)
    hyper = case.meta["hyper"]
    groups = parameter_groups(network, objective.lr_scale, objective.held_steps)
    optim = OptimConfig(betas=tuple(hyper["betas"]), eps=hyper["eps"], weight_decay=hyper["weight_decay"])
    optimizer = EarlyEpsilonAdam(groups, lr=0.0, config=optim)
    rate, total = tri_stage(hyper["schedule"])
    batch = make_batch(case, report)
    for number, record in enumerate(records):
        masks = {name: case.tensors.get(f"mask/{name}{number}") for name in ("time", "channel")}
        time, channels = (None if mask is None else mask.bool() for mask in masks.values())
        masked = replace(batch, span_masks=SpanMasks(time=time, channels=channels))
        _set_blocks(objective, record, network)
        report.compare(f"{label}update", number, record["update"])
        report.compare(f"{label}frozen", float(objective.is_frozen(number)), float(record["frozen"]))
        losses = objective.losses(network, masked, number)
        optimizer.zero_grad()
        (losses.sums["ctc"] / losses.count).backward()
        norm = clipped([p for p in network.parameters() if p.grad is not None], hyper["clip_norm"])
        lr = learning_rate(number, rate, total)
        for group in optimizer.param_groups:
            group["is_held"] = group["held_steps"] > number
            group["lr"] = 0.0 if group["is_held"] else lr
            for parameter in group["params"] if label else ():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        report.compare(f"{label}learning rate", lr, record["lr"])
        report.compare(f"{label}loss", losses.sums["ctc"].detach(), record["loss"])
        report.compare(f"{label}loss per sample", losses.sums["ctc"].detach() / losses.count, record["loss_per_sample"])
        report.compare(f"{label}gradient norm", norm, record["grad_norm"])
    _compare_final(report, case, network, final, label)


def _set_blocks(objective: Task[Any], record: dict[str, Any], network: nn.Module) -> None:
    objective.kept_blocks = lambda step: kept_blocks(record, network)  # type: ignore[method-assign]


def tri_stage(settings: Mapping[str, Any]) -> tuple[LearningRateConfig, int]:
    """Translate an official tri-stage schedule; returns the updates of the run too.

    Raises:
        D2V2Error: the ratios do not add up.
    """
    total, ratios = settings["max_update"], settings.get("phase_ratio")
    if ratios is None:
        warm, hold, decay = (settings[f"{name}_steps"] for name in ("warmup", "hold", "decay"))
    else:
        if abs(sum(ratios) - 1.0) > 1e-9:  # the official code asserts it
            raise D2V2Error(f"phase_ratio: expected a sum of 1, found {ratios}")
        warm, hold, decay = (int(total * ratio) for ratio in ratios)
    config = LearningRateConfig(
        shape="tri_stage",
        peak=settings["lr"],
        warmup_steps=warm,
        hold_steps=hold,
        decay_steps=decay,
        start_scale=settings.get("init_lr_scale", 0.01),
        final_scale=settings.get("final_lr_scale", 0.01),
    )
    return config, total


def _compare_final(report: Report, case: TaskCase, network: nn.Module, prefix: str, label: str) -> None:
    """Compare all parameters; one that is absent from the file is as it was."""
    found = dict(network.named_parameters())
    expected: dict[str, Tensor] = {
        case.our_name(key.removeprefix("model/")): case.tensors[key] for key in case.tensors if key[:6] == "model/"
    }
    moved = [key for key in case.tensors if key.startswith(prefix)]
    expected |= {case.our_name(key.removeprefix(prefix)): case.tensors[key] for key in moved}
    for name, value in found.items():
        mine, wanted = value.detach(), expected[name].reshape(value.shape)
        if name.endswith("attn.qkv.bias"):  # see `compare_state`
            mine, wanted = without_keys(mine), without_keys(wanted)
        report.compare(f"{label}final weights", mine, wanted)
