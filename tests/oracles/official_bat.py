"""One training step of BAT (arXiv 2602.16305) from the text of its specification, and cases computed by it.

Shares no code with `d2v2ds.model`; weights stay in a dict under BAT's names. It computes in float64.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.official_image_text import positions_2d
from tests.oracles.official_model import DECAY, Draw, Weights, linear, norm

PATCH = 16
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BatCase:
    """Sizes of a case."""

    dim: int = 16
    num_heads: int = 4
    depth: int = 2
    mlp_ratio: float = 2
    norm_eps: float = EPS
    decoder_dim: int = 16
    decoder_heads: int = 2
    decoder_depth: int = 2
    decoder_mlp_ratio: float = 3
    clone_batch: int = 3
    rows: int = 3
    columns: int = 2
    masked: int = 4
    samples: int = 2


def block(w: Weights, name: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gated post-norm block: its output, that of its attention, and the gate's logits."""
    rows, n, width = x.shape
    qkv = linear(w, f"{name}.attn.qkv", x).view(rows, n, 3, heads, width // heads)
    mixed = []
    for h in range(heads):
        q, k, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        mixed.append((q @ k.transpose(1, 2) * (width // heads) ** -0.5).softmax(-1) @ v)
    gate = linear(w, f"{name}.attn.gate", x)
    attended = linear(w, f"{name}.attn.proj", torch.cat(mixed, -1) * torch.sigmoid(gate))
    r = norm(w, f"{name}.norm1", x + attended, EPS)
    fed = linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", r)))
    return norm(w, f"{name}.norm2", r + fed, EPS), attended, gate


def _embed(w: Weights, source: Tensor) -> Tensor:
    x = F.conv2d(source, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    return x.flatten(2).transpose(1, 2) + w["pos_embed"]


def _encode(c: BatCase, w: Weights, tokens: Tensor, out: Weights, side: str) -> list[Tensor]:
    x = torch.cat([w["cls_token"].expand(len(tokens), -1, -1), tokens], 1)
    x = norm(w, "pre_norm", x, EPS)
    if side == "student":
        out["mid/student/context_out"] = x
    found = []
    for i in range(c.depth):
        x, attended, gate = block(w, f"blocks.{i}", x, c.num_heads)
        out[f"mid/{side}/block{i}_out"] = x
        if side == "student":
            out |= {f"mid/student/block{i}_attn_out": attended, f"mid/student/block{i}_gate_logits": gate}
        found.append(x)
    return found


def _targets(layers: list[Tensor]) -> Tensor:
    each = [
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + EPS).sqrt()
        for x in (layer[:, 1:] for layer in layers)
    ]
    mean = torch.stack(each).mean(0)
    return (mean - mean.mean(2, keepdim=True)) / (mean.var(2, keepdim=True, unbiased=False) + EPS).sqrt()


def _decode(c: BatCase, w: Weights, visible: Tensor, keep: Tensor, out: Weights) -> Tensor:
    rows, length = len(visible), c.rows * c.columns
    x = w["mask_token"].expand(rows, length, -1).scatter(1, keep[..., None].expand_as(visible), visible)
    x = out["mid/decoder_in"] = x + w["pos_embed"]
    for i in range(c.decoder_depth):
        x, _, _ = block(w, f"blocks.{i}", x, c.decoder_heads)
        out[f"mid/decoder_block{i}_out"] = x
    return x @ w["out_proj.weight"].T


def compute(c: BatCase, given: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """One forward and backward pass and one teacher update; names as in the recorded case."""
    given = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    is_fixed = "student/encoder.pos_embed"
    w = {n: v.clone().requires_grad_(n != is_fixed) for n, v in given.items() if n.startswith("student/")}
    encoder = {n.removeprefix("student/encoder."): v for n, v in w.items() if n.startswith("student/encoder.")}
    decoder = {n.removeprefix("student/decoder."): v for n, v in w.items() if n.startswith("student/decoder.")}
    teacher = {n.removeprefix("teacher/"): v for n, v in given.items() if n.startswith("teacher/")}
    source, keep, mask = given["in/source"], given["mask/ids_keep"].long(), given["mask/mask"].bool()
    out: Weights = {}
    target = out["out/targets_full"] = _targets(_encode(c, teacher, _embed(teacher, source), out, "teacher"))
    tokens = _embed(encoder, source).repeat_interleave(c.clone_batch, 0)
    visible = tokens.gather(1, keep[..., None].expand(-1, -1, c.dim))
    x = _encode(c, encoder, visible, out, "student")[-1]
    pred = out["out/decoder_out"] = _decode(c, decoder, x[:, 1:], keep, out)
    many = target.repeat_interleave(c.clone_batch, 0)
    out |= {"out/cls_pred": x[:, 0], "out/cls_target": many.mean(1)}
    out["loss/frame"] = ((pred - many) ** 2).mean(2)[mask].mean()
    out["loss/cls"] = ((x[:, 0] - many.mean(1)) ** 2).mean()
    loss = out["loss/total"] = out["loss/frame"] + out["loss/cls"]
    loss.backward()
    grads = {f"grad/{n.removeprefix('student/')}": v.grad for n, v in w.items() if v.grad is not None}
    grads |= {f"ema_after/{n}": DECAY * v + (1 - DECAY) * encoder[n].detach() for n, v in teacher.items()}
    return out, grads | {"ema_after/decay": torch.tensor(DECAY)}


def _draw(c: BatCase) -> dict[str, Tensor]:
    draw, weights = Draw(5), {}
    table = positions_2d(c.columns, c.rows, c.dim)  # made for rows of mel bins, read by rows of times
    for part, width, depth, ratio in (
        ("encoder", c.dim, c.depth, c.mlp_ratio),
        ("decoder", c.decoder_dim, c.decoder_depth, c.decoder_mlp_ratio),
    ):
        for i in range(depth):
            draw.block(f"{part}.blocks.{i}", width, ratio)
            draw.linear(f"{part}.blocks.{i}.attn.gate", width, width)
    draw.linear("encoder.patch_embed.proj", c.dim, 1, PATCH, PATCH)
    draw.norm("encoder.pre_norm", c.dim)
    weights |= draw.weights | {"encoder.cls_token": draw.normal(1, 1, c.dim)}
    weights |= {"decoder.mask_token": draw.normal(1, 1, c.decoder_dim)}
    weights["decoder.pos_embed"] = table + draw.normal(*table.shape) * 0.1
    weights["decoder.out_proj.weight"] = draw.normal(c.dim, c.decoder_dim) * 0.2
    given = {f"student/{name}": value for name, value in weights.items()}
    for name, value in weights.items():
        if name.startswith("encoder."):
            given[f"teacher/{name.removeprefix('encoder.')}"] = value + draw.normal(*value.shape) * 0.05
    given |= {"student/encoder.pos_embed": table, "teacher/pos_embed": table.clone()}
    length = c.rows * c.columns
    order = torch.rand(c.samples * c.clone_batch, length, generator=draw.generator).argsort(1)
    keep = order[:, : length - c.masked].sort(1).values
    mask = torch.ones(order.shape, dtype=torch.uint8).scatter(1, keep, 0)
    source = draw.normal(c.samples, 1, c.rows * PATCH, c.columns * PATCH)
    return given | {"in/source": source, "mask/ids_keep": keep.int(), "mask/mask": mask}


def write_case(folder: Path, name: str, case: BatCase) -> None:
    """Compute one step and write NAME.json, NAME.safetensors and NAME.grads.safetensors."""
    given = _draw(case)
    out, grads = compute(case, given)
    for suffix, tensors in (("", given | out), (".grads", grads)):
        plain = {key: v.detach().float() if v.is_floating_point() else v for key, v in tensors.items()}
        save_file({key: v.contiguous().clone() for key, v in plain.items()}, folder / f"{name}{suffix}.safetensors")
    model = {key: v for key, v in asdict(case).items() if key not in ("rows", "columns", "masked", "samples")}
    meta = {"modality": "spectrogram (BAT)", "grid_time_mel": [case.rows, case.columns], "model": model}
    (folder / f"{name}.json").write_text(json.dumps(meta))
