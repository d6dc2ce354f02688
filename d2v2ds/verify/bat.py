"""Golden cases of BAT (arXiv 2602.16305): gate, end-of-block targets, transformer decoder and mean losses.

They have key names of their own, losses that are means, and no official configuration: NAME.json gives the sizes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.bat_names import our_bat_name
from d2v2ds.masking import MaskConfig
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.model.block import BlockConfig
from d2v2ds.model.transformer_decoder import TransformerDecoderConfig
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.objectives.data2vec2 import Data2Vec2Network, ModalityConfig, StudentOutput
from d2v2ds.objectives.loss import LossConfig
from d2v2ds.objectives.targets import TargetConfig
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.verify.case import ReadTensors, Tensors
from d2v2ds.verify.networks import ema_step, recorded, without_grad
from d2v2ds.verify.report import Report
from d2v2ds.verify.step import compare_positions

_NAME = "spectrogram"
_PATCH = 16


def is_bat(folder: Path, name: str) -> bool:
    """Return True if NAME.json says that a case is one of BAT."""
    try:
        values = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "(bat)" in str(values.get("modality")).lower()


def settings_of(meta: dict[str, Any]) -> tuple[TrunkConfig, ModalityConfig]:
    """Settings of the network and of the objective of a case."""
    model, (rows, columns) = meta["model"], meta["grid_time_mel"]
    width = model["dim"]
    block = BlockConfig(
        width=width, num_heads=model["num_heads"], mlp_ratio=model["mlp_ratio"], norm_eps=model["norm_eps"],
        attention_dropout=0.0, attention_output_dropout=0.0, mlp_dropout=0.0, attention_gate=True,
    )  # fmt: skip
    network = SpectrogramNetwork(
        prenet_depth=0, mel_bins=columns * _PATCH, target_length=rows * _PATCH, patch_size=_PATCH, positions="swapped"
    )
    decoder = TransformerDecoderConfig(
        width=model["decoder_dim"], depth=model["decoder_depth"], num_heads=model["decoder_heads"],
        mlp_ratio=model["decoder_mlp_ratio"], attention_gate=True, norm_eps=model["norm_eps"],
    )  # fmt: skip
    target = TargetConfig(
        num_layers=model["depth"], layer="block", layer_norms=("instance",), final_norms=("layer",), norm_eps=1e-6
    )
    objective = ModalityConfig(
        share_local_encoder=False,
        mask=MaskConfig(masked_fraction=0.5, num_masks=model["clone_batch"], kind="random"),
        decoder=decoder,
        target=target,
        loss=LossConfig(scale=1.0 / width, cls_weight=1.0, cls_rows=1),
    )
    return TrunkConfig(block=block, shared_depth=model["depth"], modalities={_NAME: network}), objective


def check_bat_case(folder: Path, name: str, report: Report) -> None:
    """Compare one step: forward, losses, gradients and one teacher update, with all intermediates.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
    """
    trunk, objective = settings_of(json.loads((folder / f"{name}.json").read_text()))
    tensors = ReadTensors(load_file(folder / f"{name}.safetensors"))
    grads = load_file(folder / f"{name}.grads.safetensors")
    student = Data2Vec2Network(trunk, {_NAME: objective})
    teacher = TeacherNetwork(trunk, {_NAME: objective.target}, {_NAME: False}).eval()
    _load(student, tensors, "student/")
    _load(teacher, tensors, "teacher/")
    for side, network in (("student", student), ("teacher", teacher)):
        compare_positions(report, f"{side} positions", network.trunk.encoder(_NAME))
    batch = _batch(tensors, objective.mask.num_masks)
    with recorded(_watched(student)) as of_student, recorded(_watched(teacher)) as of_teacher:
        out: StudentOutput = student(batch, without_grad(teacher))
    _compare_layers(report, tensors, "student", of_student)
    _compare_layers(report, tensors, "teacher", of_teacher)
    _compare_outputs(report, tensors, of_student, out, batch)
    if unseen := tensors.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")
    (torch.stack(list(out["losses"].values())).sum() / batch.num_masked).backward()
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in _trained(student).items()}
    _compare(report, "gradient", found, grads, "grad/")
    ema_step(teacher, student, float(grads["ema_after/decay"]))
    _compare(report, "EMA step", dict(teacher.named_parameters()), grads, "ema_after/")


def _our_name(official: str) -> str | None:
    """Translate a name, with or without the prefix of encoder or decoder, to that of an objective's network."""
    if official.startswith("decoder."):
        return our_bat_name(official.removeprefix("decoder."), is_of_decoder=True)
    name = our_bat_name(official.removeprefix("encoder."))
    return None if name is None else f"trunk.{name}"


def _load(module: nn.Module, tensors: ReadTensors, prefix: str) -> None:
    loaded = {str(_our_name(key.removeprefix(prefix))): tensors[key] for key in tensors if key.startswith(prefix)}
    try:
        module.load_state_dict(loaded)
    except RuntimeError as error:
        raise D2V2Error(f"{prefix}: {error}") from error


def _batch(tensors: ReadTensors, num_masks: int) -> Batch:
    keep, masked = tensors["mask/ids_keep"].long(), tensors["mask/mask"].bool()
    if not torch.equal(masked, torch.ones_like(masked).scatter(1, keep, False)):
        raise D2V2Error("mask/mask and mask/ids_keep: expected the same masks")
    source = tensors["in/source"][:, 0].transpose(1, 2)  # (B, 1, S, F) -> (B, F, S)
    masks = MaskSet(keep=keep.unflatten(0, (-1, num_masks)), masked=masked.unflatten(0, (-1, num_masks)))
    ids = torch.arange(len(source))
    return Batch(modality=_NAME, source=source, ids=ids, masks=masks, num_masked=int(masked.sum()))


def _watched(network: Any) -> dict[str, nn.Module]:
    """Modules of a network whose outputs are compared."""
    watched: dict[str, nn.Module] = {"context": network.trunk.encoder(_NAME).prenet}
    for i, block in enumerate(network.trunk.blocks):
        watched |= {f"block{i}": block, f"block{i}_attn": block.attn, f"block{i}_gate": block.attn.gate}
    if hasattr(network, "decoders"):
        decoder = network.decoders[_NAME]
        watched |= {"decoder_in": decoder.positions, "decoder_out": decoder}
        watched |= {f"decoder_block{i}": block for i, block in enumerate(decoder.blocks)}
    return watched


def _compare_layers(report: Report, tensors: ReadTensors, side: str, found: dict[str, Any]) -> None:
    """Compare the intermediates of one network that the case recorded."""
    values: dict[str, Tensor] = {"context_out": found["context"]}
    for name in [name for name in found if name.startswith("block") and name[5:].isdigit()]:
        values |= {f"{name}_out": found[name][0], f"{name}_attn_out": found[f"{name}_attn"]}
        values[f"{name}_gate_logits"] = found[f"{name}_gate"]
    for name, value in values.items():
        if (expected := tensors.get(f"mid/{side}/{name}")) is not None:
            report.compare(f"{side} {name}", value, expected)


def _compare_outputs(
    report: Report, tensors: ReadTensors, found: dict[str, Any], out: StudentOutput, batch: Batch
) -> None:
    """Compare decoder, predictions, targets and losses."""
    report.compare("decoder_in", found["decoder_in"], tensors["mid/decoder_in"])
    report.compare("decoder_out", found["decoder_out"], tensors["out/decoder_out"])
    for name in [key for key in tensors if key.startswith("mid/decoder_block")]:
        block = name.removeprefix("mid/").removesuffix("_out")
        report.compare(block, found[block][0], tensors[name])
    report.compare("targets", out["target"], tensors["out/targets_full"])
    size = tensors["out/targets_full"].abs().max()  # a mean over tokens may cancel to rounding noise
    report.compare("cls_pred", out["cls"], tensors["out/cls_pred"])
    report.compare("cls_target", out["cls_wanted"] + size, tensors["out/cls_target"] + size)
    means = {name: loss / batch.num_masked for name, loss in out["losses"].items()}
    report.compare("loss frame", means["regression"], tensors["loss/frame"])
    report.compare("loss cls", means["cls"], tensors["loss/cls"])
    report.compare("loss total", means["regression"] + means["cls"], tensors["loss/total"])


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _compare(report: Report, label: str, found: dict[str, Any], grads: Tensors, prefix: str) -> None:
    """Compare tensors with all those under a prefix but the decay."""
    expected = {
        _our_name(key.removeprefix(prefix)): value
        for key, value in grads.items()
        if key.startswith(prefix) and key != f"{prefix}decay"
    }
    if set(expected) != set(found):
        raise D2V2Error(f"{prefix}: the file and the model differ in {sorted(set(expected) ^ set(found), key=str)}")
    for name, value in found.items():
        report.compare(f"{label} {_part(name)}", value.detach(), expected[name])


def _part(name: str) -> str:
    """Name the part of the model under which a parameter is reported."""
    parts = name.removeprefix("trunk.").split(".")
    return {"blocks": "blocks", "decoders": "decoder"}.get(parts[0], parts[2] if len(parts) > 2 else parts[0])
