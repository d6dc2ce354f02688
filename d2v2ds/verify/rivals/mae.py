"""One training step of a golden case of MAE: masks, forward with all intermediates, targets, loss and gradients."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.mae.keymap import to_ours
from d2v2ds.interop.mae.settings import MODALITY, OfficialMae, network_of
from d2v2ds.masking import masked_count
from d2v2ds.objectives.mae import MaeConfig, MaeNetwork, MaeOutput
from d2v2ds.verify.case import ReadTensors
from d2v2ds.verify.networks import recorded
from d2v2ds.verify.report import Report

_STUDENT, _GRAD = "student/", "grad/"


def check_mae(folder: Path, name: str, report: Report) -> None:
    """Compare one step of a case.

    Raises:
        D2V2Error: the case does not fit its network, or has a tensor that nothing is compared with.
        UnsupportedOptionError: naming an option that our network lacks.
    """
    meta = json.loads((folder / f"{name}.json").read_text())
    network = network_of(meta["model"])
    objective = MaeConfig(modalities={MODALITY: network.objective})
    if problems := network.trunk.check() + objective.check(network.trunk):
        raise D2V2Error("; ".join(problems))
    tensors = ReadTensors(load_file(folder / f"{name}.safetensors"))
    grads = load_file(folder / f"{name}.grads.safetensors")
    student = objective.build(network.trunk, seed=0).build_network(activation_checkpointing=False)
    _compare_positions(report, student, tensors)
    _load(student, tensors)
    batch = _batch(tensors)
    _compare_masks(report, network, batch, tensors)
    with recorded(_watched(student)) as outputs:
        out: MaeOutput = student(batch)
    _compare_layers(report, outputs, tensors)
    report.compare("prediction", out["decoded"], tensors["out/pred"])
    report.compare("target", out["target"], tensors["out/target"])
    loss = out["losses"]["regression"] / batch.num_masked
    report.compare("loss total", loss, tensors["loss/total"])
    report.compare("sample size", batch.num_masked, tensors["loss/sample_size"])
    if unseen := tensors.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")
    loss.backward()
    _compare_gradients(report, student, grads, frozen={_our_name(key) for key in meta["no_gradient"]})


def _our_name(official: str) -> str:
    """Translate the name of an official parameter to that of `MaeNetwork`."""
    name = to_ours(official)
    if name is None:
        raise D2V2Error(f"{official}: the model has no such parameter")
    return name if name.startswith("decoders.") else f"trunk.{name}"


def _tables(student: MaeNetwork) -> dict[str, Tensor]:
    return {name: p for name, p in student.named_parameters() if name.endswith("fixed_positions.table")}


def _compare_positions(report: Report, student: MaeNetwork, tensors: ReadTensors) -> None:
    """Compare our tables of positions with those of the case, which replace them: a step does not read every row."""
    wanted = {_our_name(key): tensors[_STUDENT + key] for key in ("pos_embed", "decoder_pos_embed")}
    for name, table in _tables(student).items():
        report.compare("positions", table, wanted[name])


def _load(student: MaeNetwork, tensors: ReadTensors) -> None:
    state = student.state_dict()
    loaded = {_our_name(key.removeprefix(_STUDENT)): tensors[key] for key in tensors if key.startswith(_STUDENT)}
    if differing := loaded.keys() ^ state.keys():
        raise D2V2Error(f"{_STUDENT}: the file and the model differ in {', '.join(sorted(differing))}")
    for name, value in loaded.items():
        if value.shape != state[name].shape:
            raise D2V2Error(f"{name}: expected {tuple(state[name].shape)}, found {tuple(value.shape)}")
    student.load_state_dict(loaded)


def _batch(tensors: ReadTensors) -> Batch:
    """Build the recorded input; visible patches in the recorded order."""
    source, masked, keep = tensors["in/source"], tensors["mask/mask"].bool(), tensors["mask/ids_keep"].long()
    return Batch(
        modality=MODALITY,
        source=source,
        ids=torch.arange(len(source)),
        masks=MaskSet(keep=keep[:, None], masked=masked[:, None]),
        num_masked=int(masked.sum()),
    )


def _compare_masks(report: Report, network: OfficialMae, batch: Batch, tensors: ReadTensors) -> None:
    """Compare the recorded masks with the recorded noise, and their count with ours."""
    keep, masked = batch.required_masks().rows()
    order = tensors["mask/noise"].argsort(dim=1)
    report.compare("ids_keep", order[:, : keep.shape[1]], keep)
    report.compare("ids_restore", order.argsort(dim=1), tensors["mask/ids_restore"])
    report.compare("mask", torch.ones_like(masked).scatter(1, keep, False), masked)
    counted = masked_count(network.objective.mask, masked.shape[1])
    report.compare("masked patches", torch.full((len(masked),), counted), masked.sum(1))


def _watched(student: MaeNetwork) -> dict[str, nn.Module]:
    """Modules whose outputs are compared, by their names in a case."""
    encoder, decoder = student.trunk.encoder(MODALITY), student.decoders[MODALITY]
    assert isinstance(decoder.blocks, nn.ModuleList)
    watched = {"patch_embed_out": encoder.local, "encoder_in": encoder.prenet, "latent": student.trunk.norm}
    watched |= {f"block{i}_out": block for i, block in enumerate(student.trunk.blocks)}
    watched |= {f"decoder_block{i}_out": block for i, block in enumerate(decoder.blocks)}
    parts = {"decoder_embed_out": "embed", "decoder_in": "fixed_positions", "decoder_norm_out": "norm"}
    return watched | {name: decoder.get_submodule(part) for name, part in parts.items()}


def _compare_layers(report: Report, outputs: dict[str, Any], tensors: ReadTensors) -> None:
    for key in tensors:
        name = key.removeprefix("mid/")
        if key.startswith("mid/") and name in outputs:
            found = outputs[name]
            report.compare(name, found[0] if isinstance(found, tuple) else found, tensors[key])


def _compare_gradients(report: Report, student: MaeNetwork, grads: dict[str, Tensor], frozen: set[str]) -> None:
    wanted = {_our_name(key.removeprefix(_GRAD)): value for key, value in grads.items()}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if differing := wanted.keys() ^ trained.keys() | frozen ^ _tables(student).keys():
        raise D2V2Error(f"gradients: the file and the model differ in {', '.join(sorted(differing))}")
    for name, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        report.compare(f"gradient {name.removeprefix('trunk.')}", found, wanted[name])
