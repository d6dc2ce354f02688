"""A second implementation of one training step of MAE, from the text of the specification alone.

It shares no code with `d2v2ds`: weights stay in a dict under their official names, heads and patches are looped over.
Results are named as in the files of golden vectors. It computes in float64.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.official_model import Draw, linear, norm

Weights = dict[str, Tensor]
GIVEN = ("in/", "student/", "mask/noise")
"""Beginnings of the names that a step starts from; it computes the others."""
DEFAULTS = {
    "_name": "mae", "img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3, "mlp_ratio": 2, "norm_pix_loss": True,
    "norm_eps": 1e-6, "mask_ratio": 0.75,
}  # fmt: skip
"""Model of a case, if it changes nothing."""
FROZEN = ("pos_embed", "decoder_pos_embed")


def table(width: int, side: int) -> Tensor:
    """Positions (1, 1 + side * side, width), number by number."""
    rows = [[0.0] * width]
    for r in range(side):
        for c in range(side):
            row = []
            for place in (c, r):
                rates = [10000.0 ** (-j / (width / 4)) for j in range(width // 4)]
                row += [math.sin(place * w) for w in rates] + [math.cos(place * w) for w in rates]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)[None]


def patches(image: Tensor, size: int) -> Tensor:
    """(3, Y, X) -> (L, 3 * size * size), colours last."""
    side = image.shape[-1] // size
    found = []
    for r in range(side):
        for c in range(side):
            patch = image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
            found.append(torch.stack([patch[k, y, x] for y in range(size) for x in range(size) for k in range(3)]))
    return torch.stack(found)


def block(w: Weights, name: str, x: Tensor, heads: int, eps: float) -> Tensor:
    """Pre-norm transformer block."""
    rows, n, width = x.shape
    qkv = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x, eps)).view(rows, n, 3, heads, width // heads)
    out = []
    for h in range(heads):
        q, k, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        out.append((q @ k.transpose(1, 2) * (width // heads) ** -0.5).softmax(-1) @ v)
    x = x + linear(w, f"{name}.attn.proj", torch.cat(out, -1))
    hidden = F.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x, eps)))
    return x + linear(w, f"{name}.mlp.fc2", hidden)


def compute(model: Mapping[str, Any], given: Weights) -> tuple[Weights, Weights]:
    """Compute everything that a case records, from what it is given; returns tensors and gradients."""
    m, out = dict(model), Weights()
    w = {k.removeprefix("student/"): v.double() for k, v in given.items() if k.startswith("student/")}
    w = {k: v.requires_grad_(k not in FROZEN) for k, v in w.items()}
    source, noise, eps, size = given["in/source"].double(), given["mask/noise"], m["norm_eps"], m["patch_size"]
    samples, length = noise.shape
    kept = int(length * (1 - m["mask_ratio"]))
    order = torch.tensor([sorted(range(length), key=row.__getitem__) for row in noise.tolist()])
    keep, restore = order[:, :kept], order.argsort(1)
    mask = torch.ones(samples, length, dtype=torch.uint8)
    for row, visible in zip(mask, keep, strict=True):
        row[visible] = 0
    out |= {"mask/ids_keep": keep, "mask/ids_restore": restore, "mask/mask": mask}
    pixels = torch.stack([patches(image, size) for image in source])  # (B, L, P)
    kernel = w["patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)  # colours last, as the patches
    embedded = pixels @ kernel.T + w["patch_embed.proj.bias"]
    x = torch.stack([(embedded + w["pos_embed"][:, 1:])[b, keep[b]] for b in range(samples)])
    first = (w["cls_token"] + w["pos_embed"][:, :1]).expand(samples, -1, -1)
    x = torch.cat((first, x), 1)
    out |= {"mid/patch_embed_out": embedded, "mid/encoder_in": x}
    for i in range(m["depth"]):
        x = out[f"mid/block{i}_out"] = block(w, f"blocks.{i}", x, m["num_heads"], eps)
    x = out["mid/latent"] = norm(w, "norm", x, eps)
    x = out["mid/decoder_embed_out"] = linear(w, "decoder_embed", x)
    hidden = w["mask_token"].expand(samples, length - kept, -1)
    shuffled = torch.cat((x[:, 1:], hidden), 1)
    unshuffled = torch.stack([shuffled[b, restore[b]] for b in range(samples)])
    x = out["mid/decoder_in"] = torch.cat((x[:, :1], unshuffled), 1) + w["decoder_pos_embed"]
    for i in range(m["decoder_depth"]):
        x = block(w, f"decoder_blocks.{i}", x, m["decoder_num_heads"], eps)
        out[f"mid/decoder_block{i}_out"] = x
    x = out["mid/decoder_norm_out"] = norm(w, "decoder_norm", x, eps)
    pred = out["out/pred"] = linear(w, "decoder_pred", x)[:, 1:]
    if m["norm_pix_loss"]:
        centred = pixels - pixels.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (pixels.shape[-1] - 1)
        pixels = centred / (variance + 1e-6).sqrt()
    out["out/target"] = pixels
    per_patch = (pred - pixels).square().mean(-1)
    loss = out["loss/total"] = (per_patch * mask).sum() / mask.sum()
    out["loss/sample_size"] = mask.sum()
    trained = {name: value for name, value in w.items() if value.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()))
    return out, {f"grad/{name}": grad for name, grad in zip(trained, grads, strict=True)}


def write_case(folder: Path, name: str, changes: Mapping[str, Any] | None = None, seed: int = 3) -> None:
    """Draw weights, images and noise of a model, compute one step and write NAME.json and its tensors."""
    m = DEFAULTS | dict(changes or {})
    width, inner, size = m["embed_dim"], m["decoder_embed_dim"], m["patch_size"]
    side, draw = m["img_size"] // size, Draw(seed)
    draw.linear("patch_embed.proj", width, 3, size, size)
    for prefix, depth, own in (("", m["depth"], width), ("decoder_", m["decoder_depth"], inner)):
        for i in range(depth):
            draw.block(f"{prefix}blocks.{i}", own, m["mlp_ratio"])
        draw.norm(f"{prefix}norm", own)
    draw.linear("decoder_embed", inner, width)
    draw.linear("decoder_pred", 3 * size * size, inner)
    w = {key: value.float() for key, value in draw.weights.items()}
    w |= {"cls_token": draw.normal(1, 1, width).float(), "mask_token": draw.normal(1, 1, inner).float()}
    w |= {"pos_embed": table(width, side).float(), "decoder_pos_embed": table(inner, side).float()}
    source = draw.normal(2, 3, m["img_size"], m["img_size"]).float()
    generator = torch.Generator().manual_seed(seed)
    given = {f"student/{key}": value for key, value in w.items()}
    given |= {"in/source": source, "mask/noise": torch.rand(2, side * side, generator=generator)}
    out, grads = compute(m, given)
    meta = {"name": name, "modality": "image", "model": m, "no_gradient": list(FROZEN)}
    (folder / f"{name}.json").write_text(json.dumps(meta, indent=1) + "\n")
    save_file(given | {key: _stored(value) for key, value in out.items()}, folder / f"{name}.safetensors")
    save_file({key: _stored(value) for key, value in grads.items()}, folder / f"{name}.grads.safetensors")


def _stored(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).contiguous()
