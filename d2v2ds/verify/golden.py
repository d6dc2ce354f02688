"""Compare our model with golden vectors of the official implementation.

    python -m d2v2ds.verify FOLDER [--modality audio] [--tolerance 1e-4]

Every case NAME of the folder (NAME.json, NAME.safetensors, NAME.grads.safetensors, optionally NAME.traj.*) is
loaded under its official key names and run through our student, teacher network, losses, gradients, EMA step
and, where recorded, six whole optimizer steps. Each quantity is printed with its worst relative error, that is
the largest absolute difference over the largest absolute expected value. Exit code 0 only if every case passes;
a case with an option that this project lacks is `unsupported` and counts as failed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.errors import D2V2Error
from d2v2ds.interop.fairseq.keymap import to_ours
from d2v2ds.interop.fairseq.official_config import OfficialNetwork, UnsupportedOptionError, network_of
from d2v2ds.model.alibi import alibi_slopes, dense_bias
from d2v2ds.objectives.data2vec2 import Data2Vec2Config, Data2Vec2Network, StudentOutput
from d2v2ds.objectives.ema import EmaConfig, ema_decay
from d2v2ds.objectives.loss import channel_moments, mean_channel_std
from d2v2ds.objectives.teacher_network import TeacherNetwork
from d2v2ds.train.optim import EarlyEpsilonAdam, OptimConfig
from d2v2ds.train.schedule import LearningRateConfig, learning_rate

Tensors = dict[str, Tensor]
_ANY_EMA = EmaConfig(start_decay=0.999, end_decay=0.999, anneal_steps=0)
"""Cases name the decay of each update themselves."""


class _Read(Tensors):
    """Tensors of a case that remember which were looked at, so that none passes unseen."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.seen: set[str] = {"in/id"}  # it seeds the in-model sampler of masks, which are given here

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        if key not in self:
            raise D2V2Error(f"expected {key} in the case, found none")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def unseen(self) -> list[str]:
        """Names of tensors that nothing was compared with."""
        return sorted(set(self) - self.seen)


@dataclass
class Report:
    """Worst relative error of every quantity of one case."""

    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, found: Tensor | float, expected: Tensor | float) -> None:
        """Record one quantity; a shape that differs or a value that is not finite counts as infinitely wrong."""
        found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
        if found.shape != expected.shape:
            error = float("inf")
        else:
            finite = torch.isfinite(expected)
            if not torch.equal(finite, torch.isfinite(found)):
                error = float("inf")
            else:
                found, expected = found[finite], expected[finite]
                largest = expected.abs().max().item() if expected.numel() else 0.0
                difference = (found - expected).abs().max().item() if expected.numel() else 0.0
                error = difference / largest if largest else difference
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    @property
    def passed(self) -> bool:
        """Whether anything was compared and everything is within the tolerance."""
        return bool(self.errors) and all(error <= self.tolerance for error in self.errors.values())


@dataclass(frozen=True)
class Case:
    """One golden case as read from disk."""

    name: str
    modality: str
    network: OfficialNetwork
    tensors: _Read
    grads: Tensors

    @staticmethod
    def read(folder: Path, name: str) -> "Case":
        """Load NAME.json and its tensors."""
        meta = json.loads((folder / f"{name}.json").read_text())
        modality = meta["modality"].lower()
        network = network_of(meta["model"], modality, meta.get("vocab_size"))
        if dropping := list(_dropping(asdict(network))):
            raise UnsupportedOptionError(f"{', '.join(dropping)} (expected 0: what was dropped is not recorded)")
        return Case(
            name,
            modality,
            network,
            _Read(load_file(folder / f"{name}.safetensors")),
            load_file(folder / f"{name}.grads.safetensors"),
        )

    def batch(self, mask: Tensor | None = None) -> Batch:
        """The recorded input; with another mask (R, T) the visible tokens are taken in ascending order."""
        source, padding = self.tensors["in/source"], self.tensors.get("in/padding_mask")
        samples = source.shape[0]
        if mask is None:
            masked, keep = self.tensors["mask/mask"].bool(), self.tensors["mask/ids_keep"].long()
        else:
            masked = mask.bool()
            visible = int(masked.shape[1] - masked[0].sum())  # only row 0 defines K (spec section 6.5)
            keep = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]
        return Batch(
            modality=self.modality,
            source=source,
            padding=None if padding is None else padding.bool(),
            ids=torch.arange(samples),
            masks=MaskSet(keep=keep.view(samples, -1, keep.shape[1]), masked=masked.view(samples, -1, masked.shape[1])),
            num_masked=int(masked.sum()),
        )


_OFFICIAL_DROPOUTS = {
    "attention_output_dropout": "encoder_dropout",
    "mlp_dropout": "post_mlp_drop",
    "layer_drop": "layerdrop",
    "embedding_dropout": "dropout",
}


def _dropping(config: dict[str, Any]) -> Iterator[str]:
    """Options, by their official names, by which a training step drops something at random."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _dropping(value)
        elif value and name.endswith(("dropout", "layer_drop")):
            yield f"{_OFFICIAL_DROPOUTS.get(name, name)}={value}"


def load_official(module: nn.Module, tensors: Tensors, prefix: str) -> None:
    """Copy the tensors under `prefix` into `module`.

    Raises:
        D2V2Error: if a name is missing on either side or a shape differs.
    """
    state = module.state_dict()
    loaded = {}
    for key in tensors:
        if not key.startswith(prefix):
            continue
        value = tensors[key]
        name = ours(key.removeprefix(prefix))
        if name is None or name not in state:
            raise D2V2Error(f"{key}: the model has no such parameter")
        if value.numel() != state[name].numel():
            raise D2V2Error(f"{key}: expected {tuple(state[name].shape)}, found {tuple(value.shape)}")
        loaded[name] = value.reshape(state[name].shape)
    missing = sorted(set(state) - set(loaded))
    if missing:
        raise D2V2Error(f"{prefix}: the file lacks {', '.join(missing)}")
    module.load_state_dict(loaded)


def ours(official: str) -> str | None:
    """Our name of an official parameter in an objective's network, None if there is none."""
    name = to_ours(official)
    return name if name is None or name.startswith("decoders.") else f"trunk.{name}"


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Outputs of the named modules, collected by forward hooks while the context is open."""
    outputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def received(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """First argument of the named modules, collected while the context is open."""
    inputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _watched(net: Any, modality: str) -> dict[str, nn.Module]:
    encoder = net.trunk.encoders[modality]
    watched = {"context_in": encoder.prenet}
    watched |= {f"prenet{i}": block for i, block in enumerate(encoder.prenet.blocks)}
    watched |= {f"block{i}": block for i, block in enumerate(net.trunk.blocks)}
    if hasattr(encoder, "positions"):
        watched["positions"] = encoder.positions
    if hasattr(encoder, "local"):
        watched |= {"local_features": encoder.local}
        if hasattr(encoder.local, "convs"):
            watched |= {"front_end": encoder.local.convs}
    if hasattr(net, "decoders"):
        watched |= {"decoder_in": net.decoders[modality].mask_tokens, "decoder_out": net.decoders[modality]}
    return watched


def _compare_middle(report: Report, case: Case, side: str, outputs: dict[str, Any]) -> None:
    """Intermediates of one network, as far as the case recorded them."""
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


def _set_noise(student: Data2Vec2Network, modality: str, noise: Tensor) -> None:
    student.decoders[modality].mask_tokens.noise = lambda like, shape: noise.view(shape).to(like)  # type: ignore[union-attr]


def _build(case: Case) -> tuple[Data2Vec2Network, TeacherNetwork]:
    objective = Data2Vec2Config(ema=_ANY_EMA, modalities={case.modality: case.network.objective()})
    built = objective.build(case.network.trunk, seed=0)
    student, teacher = built.build_network(activation_checkpointing=False), built.build_teacher_network().eval()
    load_official(student, case.tensors, "student/")
    load_official(teacher, case.tensors, "teacher/")
    return student, teacher


def _no_grad(teacher: TeacherNetwork) -> Any:
    return torch.no_grad()(teacher.__call__)


def check_step(case: Case, report: Report) -> None:
    """Forward, losses, gradients and one teacher update."""
    student, teacher = _build(case)
    _set_noise(student, case.modality, case.tensors["mid/decoder_noise_full"])
    batch = case.batch()
    with (
        recorded(_watched(student, case.modality)) as mine,
        recorded(_watched(teacher, case.modality)) as theirs,
        received({"prenet": student.trunk.encoders[case.modality].prenet}) as given,  # type: ignore[dict-item]
    ):
        out: StudentOutput = student(batch, _no_grad(teacher))
    _compare_middle(report, case, "student", mine)
    _compare_middle(report, case, "teacher", theirs)
    keep, masked = batch.required_masks().rows()
    encoder: Any = student.trunk.encoders[case.modality]
    if "mid/student/context_in" in case.tensors:
        report.compare("student context_in", given["prenet"], case.tensors["mid/student/context_in"])
    padding = encoder.token_padding(batch.padding, batch.required_masks().num_tokens)
    if "mid/student/kept_padding_mask" in case.tensors:
        kept = padding.repeat_interleave(batch.required_masks().num_masks, 0).gather(1, keep)
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
    for name in ("decoder_in", "decoder_out"):
        if f"mid/{name}" in case.tensors:
            report.compare(name, mine[name], case.tensors[f"mid/{name}"])
    target = out["wanted"]
    report.compare("targets", out["target"], case.tensors["out/targets_full"])
    report.compare("regression target", target, case.tensors["out/regression_target"])
    report.compare("regression prediction", out["pred"], case.tensors["out/regression_pred"])
    for name, loss in out["losses"].items():
        report.compare(f"loss {name}", loss, case.tensors[f"loss/{_official_loss(name, case.modality)}"])
    _compare_cls(report, case, out)
    report.compare("loss total", _total(out), case.tensors["loss/total"])
    report.compare("sample size", batch.num_masked, case.tensors["loss/sample_size"])
    report.compare("loss per sample", _total(out) / batch.num_masked, case.tensors["loss/total_per_sample"])
    for name, value in (("pred_var", out["pred"]), ("target_var", target)):
        if f"log/{name}" in case.tensors:
            found = mean_channel_std(channel_moments(value), batch.num_masked)
            report.compare(name, found, case.tensors[f"log/{name}"])
    unseen = case.tensors.unseen()
    if unseen:
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")
    (_total(out) / batch.num_masked).backward()
    _compare_gradients(report, student, case)
    _ema_step(teacher, student, float(case.grads["ema_after/decay"]))
    _compare_state(report, "EMA step", teacher, case.grads, "ema_after/")


def _total(out: StudentOutput) -> Tensor:
    return torch.stack(list(out["losses"].values())).sum()


def _official_loss(name: str, modality: str) -> str:
    return name if name == "cls" else f"{modality.upper()}_{name}"


def _compare_cls(report: Report, case: Case, out: StudentOutput) -> None:
    """The CLS prediction and its target, as far as the case recorded them."""
    if "out/cls_pred" in case.tensors:
        report.compare("cls_pred", out["cls"], case.tensors["out/cls_pred"])
        # a mean over tokens may cancel to rounding noise: its error is that of what it was taken of
        size = case.tensors["out/targets_full"].abs().max()
        report.compare("cls_target", out["cls_wanted"] + size, case.tensors["out/cls_target"] + size)


def _compare_gradients(report: Report, student: Data2Vec2Network, case: Case) -> None:
    expected = {ours(key.removeprefix("grad/")): value for key, value in case.grads.items() if key[:5] == "grad/"}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if set(expected) != set(trained):
        raise D2V2Error(f"gradients: the file and the model differ in {sorted(set(expected) ^ set(trained), key=str)}")
    for name, parameter in trained.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        report.compare(f"gradient {_group(name)}", found, expected[name].reshape(found.shape))


def _group(name: str) -> str:
    """The part of the model a parameter is reported under."""
    parts = name.removeprefix("trunk.").split(".")
    return {"blocks": "blocks", "decoders": "decoder"}.get(parts[0], parts[2] if len(parts) > 2 else parts[0])


@torch.no_grad()
def _ema_step(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    weights = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        if weights[name].requires_grad:
            value.lerp_(weights[name], 1.0 - decay)
        else:
            value.copy_(weights[name])  # spec section 9


def _compare_state(report: Report, label: str, module: nn.Module, tensors: Tensors, prefix: str) -> None:
    state = dict(module.named_parameters())
    expected = {key: value for key, value in tensors.items() if key.startswith(prefix) and key != f"{prefix}decay"}
    names = {ours(key.removeprefix(prefix)): value for key, value in expected.items()}
    if set(names) != set(state):
        raise D2V2Error(f"{prefix}: the file and the model differ in {sorted(set(names) ^ set(state), key=str)}")
    for name, value in state.items():
        found, wanted = value.detach(), names[name].reshape(value.shape)
        if label.startswith("traj") and name.endswith("attn.qkv.bias"):
            found, wanted = _without_keys(found), _without_keys(wanted)
        report.compare(label, found, wanted)


def _without_keys(bias: Tensor) -> Tensor:
    """(3D,) -> (2D,): the bias of the keys shifts all logits of a query alike, so its true gradient is 0 and Adam
    walks along rounding noise."""
    queries, _, values = bias.chunk(3)
    return torch.cat((queries, values))


def check_trajectory(case: Case, folder: Path, report: Report) -> None:
    """Six whole training steps: teacher update, forward, backward, clipping, schedule, Adam."""
    meta = json.loads((folder / f"{case.name}.traj.json").read_text())
    tensors = load_file(folder / f"{case.name}.traj.safetensors")
    hyper, changes = meta["hyper"], meta["config_changes"]
    student, teacher = _build(case)
    if changes["mask_noise_std"] != 0.0:
        raise UnsupportedOptionError(f"trajectory with mask_noise_std={changes['mask_noise_std']}")
    _set_noise(student, case.modality, torch.zeros_like(case.tensors["mid/decoder_noise_full"]))
    rate = LearningRateConfig(peak=hyper["lr"], warmup_steps=hyper["warmup"])
    ema = EmaConfig(
        start_decay=changes["ema_decay"],
        end_decay=changes["ema_end_decay"],
        anneal_steps=changes["ema_anneal_end_step"],
    )
    config = OptimConfig(
        betas=tuple(hyper["betas"]), eps=hyper["eps"], weight_decay=hyper["wd"], clip_norm=hyper["clip"]
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = EarlyEpsilonAdam(trained, lr=0.0, config=config)
    for step, expected in enumerate(meta["trajectory"]):
        if step:
            _ema_step(teacher, student, ema_decay(step, ema))
            report.compare("traj decay", ema_decay(step, ema), expected["teacher_decay_before_forward"])
        batch = case.batch(tensors[f"mask{step}"])
        out = student(batch, _no_grad(teacher))
        optimizer.zero_grad()
        (_total(out) / batch.num_masked).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        for p in trained:
            if p.grad is not None and hyper["clip"]:
                p.grad.mul_(torch.clamp(hyper["clip"] / (norm + 1e-6), max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, rate, hyper["max_update"])
        optimizer.step()
        target = out["wanted"]
        report.compare("traj sample size", batch.num_masked, expected["sample_size"])
        report.compare("traj learning rate", optimizer.param_groups[0]["lr"], expected["lr"])
        report.compare("traj loss", _total(out).detach() / batch.num_masked, expected["loss_per_sample"])
        for name, loss in out["losses"].items():
            wanted = expected["losses_sum"][_official_loss(name, case.modality)]
            report.compare(f"traj loss {name}", loss.detach(), wanted)
        report.compare("traj gradient norm", norm, expected["grad_norm_before_clip"])
        for name, value in (("pred_var", out["pred"]), ("target_var", target)):
            report.compare(f"traj {name}", mean_channel_std(channel_moments(value), batch.num_masked), expected[name])
    _compare_state(report, "traj final student", student, tensors, "final_student/")
    _compare_state(report, "traj final teacher", teacher, tensors, "final_teacher/")


def case_names(folder: Path, modality: str | None) -> list[str]:
    """Names of the cases in a folder, those of one modality if it is given.

    Any file that only a case has makes one: a case of which some files are gone must fail, not vanish. One whose
    modality cannot be read is of every modality, for the same reason.
    """
    names = set()
    for path in folder.glob("*"):
        ending = next((ending for ending in _ONLY_OF_CASES if path.name.endswith(ending)), None)
        if ending is not None:
            names.add(path.name.removesuffix(ending))
        elif path.suffix == ".json" and _is_case(folder, path.stem):
            names.add(path.stem)
    return sorted(name for name in names if modality is None or _modality_of(folder, name) in (modality, None))


_ONLY_OF_CASES = (".grads.safetensors", ".traj.json", ".traj.safetensors")


def _is_case(folder: Path, name: str) -> bool:
    """Whether NAME.json describes a case, or nobody can tell what it is and weights lie beside it."""
    try:
        values = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return (folder / f"{name}.safetensors").exists()
    return isinstance(values, dict) and "modality" in values


def _modality_of(folder: Path, name: str) -> str | None:
    try:
        return str(json.loads((folder / f"{name}.json").read_text())["modality"]).lower()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify_case(folder: Path, name: str, tolerance: float) -> tuple[Report, str]:
    """Run one case.

    Returns:
        The errors, and an empty string or why the case could not be compared.
    """
    report = Report(tolerance)
    try:
        case = Case.read(folder, name)
        check_step(case, report)
        if any((folder / f"{name}.traj{ending}").exists() for ending in (".json", ".safetensors")):
            check_trajectory(case, folder, report)
    except UnsupportedOptionError as error:
        return report, f"unsupported: {error}"
    except (D2V2Error, SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        return report, f"{type(error).__name__}: {error}"
    return report, ""


def main(arguments: list[str] | None = None) -> int:
    """Print a table per case and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="golden vectors, e.g. tests/golden/micro")
    parser.add_argument("--modality", help="only the cases of this modality, e.g. audio")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="worst relative error that passes (1e-4)")
    options = parser.parse_args(arguments)
    names = case_names(options.folder, options.modality)
    if not names:
        print(f"{options.folder}: no golden cases (NAME.json with NAME.grads.safetensors) found", file=sys.stderr)
        return 2
    failed = []
    for name in names:
        report, problem = verify_case(options.folder, name, options.tolerance)
        for quantity, error in report.errors.items():
            mark = "" if error <= options.tolerance else "   <-- FAIL"
            print(f"  {quantity:32s} {error:9.2e}{mark}")
        passed = report.passed and not problem
        print(f"{'pass' if passed else 'FAIL'} {name}{': ' + problem if problem else ''}")
        if not passed:
            failed.append(name)
    print(f"{len(names) - len(failed)} of {len(names)} cases pass at tolerance {options.tolerance:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
