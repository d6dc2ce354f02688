"""A second implementation of one speech step, from the text of the specification alone.

It shares no code with `d2v2ds.model`, keeps weights in a dict under their official names, loops where it can, and
writes golden cases in the format that `d2v2ds.verify` reads. So shapes and options that the recorded vectors lack
(padding, even kernels, 6 and 12 heads, one mask per sample, the teacher's own front end, scales per block) are compared
as well; that both implementations read the specification alike is what the recorded vectors prove.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
A = "modality_encoders.AUDIO."
DECAY = 0.909


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a case varies; sizes stay tiny."""

    width: int = 48
    heads: int = 6
    prenet: int = 1
    depth: int = 2
    masks: int = 3
    samples: int = 2
    length: int = 900
    convs: tuple[tuple[int, int, int], ...] = ((32, 10, 5), (32, 4, 2), (32, 2, 2))
    position_kernel: int = 10
    decoder_width: int = 24
    decoder_kernel: int = 4
    scale_shape: str = "head"
    """head, one, block (per head and block) or none (no ALiBi)."""
    learned_scale: bool = True
    own_front_end: bool = False
    real_samples: tuple[int, ...] | None = None
    """Unpadded length of each sample."""
    uneven: bool = False
    beta: float = 0.0
    layer_norm: str = "instance"
    final_norm: str | None = None


def _slopes(heads: int) -> list[float]:
    power = 1
    while power * 2 <= heads:
        power *= 2
    own = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    double = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
    return own + double[::2][: heads - power]


def _frames(samples: int, options: Options) -> int:
    for _, kernel, stride in options.convs:
        samples = (samples - kernel) // stride + 1
    return samples


def _draw_weights(o: Options, g: torch.Generator) -> Weights:
    w: Weights = {}

    def linear(name: str, *shape: int) -> None:
        w[f"{name}.weight"] = torch.randn(*shape, generator=g) / math.sqrt(math.prod(shape[1:]))
        w[f"{name}.bias"] = torch.randn(shape[0], generator=g) * 0.2

    def norm(name: str, width: int) -> None:
        w[f"{name}.weight"] = 1 + torch.randn(width, generator=g) * 0.2
        w[f"{name}.bias"] = torch.randn(width, generator=g) * 0.2

    channels = 1
    for i, (width, kernel, _) in enumerate(o.convs):
        linear(f"{A}local_encoder.conv_layers.{i}.0", width, channels, kernel)
        del w[f"{A}local_encoder.conv_layers.{i}.0.bias"]
        norm(f"{A}local_encoder.conv_layers.{i}.2.1", width)
        channels = width
    norm(f"{A}project_features.1", channels)
    linear(f"{A}project_features.2", o.width, channels)
    for i in (1, 2):
        linear(f"{A}relative_positional_encoder.{i}.0", o.width, o.width // 8, o.position_kernel)
    shapes = {"head": (1, 1, o.heads, 1, 1), "one": (1, 1, 1, 1, 1), "block": (o.prenet + o.depth, 1, o.heads, 1, 1)}
    if o.scale_shape in shapes:
        w[f"{A}alibi_scale"] = 1 + torch.randn(shapes[o.scale_shape], generator=g) * 0.4
        if o.scale_shape != "one":
            w[f"{A}alibi_scale"].view(-1)[1] = -0.3  # clamped, without gradient
    norm(f"{A}context_encoder.norm", o.width)
    for name in [f"{A}context_encoder.blocks.{i}" for i in range(o.prenet)] + [f"blocks.{i}" for i in range(o.depth)]:
        linear(f"{name}.attn.qkv", 3 * o.width, o.width)
        linear(f"{name}.attn.proj", o.width, o.width)
        linear(f"{name}.mlp.fc1", 4 * o.width, o.width)
        linear(f"{name}.mlp.fc2", o.width, 4 * o.width)
        norm(f"{name}.norm1", o.width)
        norm(f"{name}.norm2", o.width)
    for i, width in enumerate((o.width, o.decoder_width)):
        linear(f"{A}decoder.blocks.{i}.0", o.decoder_width, width // 8, o.decoder_kernel)
    linear(f"{A}decoder.proj", o.width, o.decoder_width)
    return w


def _local(w: Weights, source: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    x = source[:, None]
    for i, (_, _, stride) in enumerate(o.convs):
        name = f"{A}local_encoder.conv_layers.{i}"
        x = F.conv1d(x, w[f"{name}.0.weight"], stride=stride).transpose(1, 2)
        x = F.layer_norm(x, x.shape[-1:], w[f"{name}.2.1.weight"], w[f"{name}.2.1.bias"])
        x = F.gelu(x).transpose(1, 2)
    y = x.transpose(1, 2)
    y = F.layer_norm(y, y.shape[-1:], w[f"{A}project_features.1.weight"], w[f"{A}project_features.1.bias"])
    return x, F.linear(y, w[f"{A}project_features.2.weight"], w[f"{A}project_features.2.bias"])


def _conv(w: Weights, name: str, x: Tensor) -> Tensor:
    kernel = w[f"{name}.weight"].shape[-1]
    y = F.conv1d(x.transpose(1, 2), w[f"{name}.weight"], w[f"{name}.bias"], padding=kernel // 2, groups=8)
    y = (y[..., :-1] if kernel % 2 == 0 else y).transpose(1, 2)
    return F.gelu(F.layer_norm(y, y.shape[-1:]))


def _positions(w: Weights, x: Tensor) -> Tensor:
    for i in (1, 2):
        x = _conv(w, f"{A}relative_positional_encoder.{i}.0", x)
    return x


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _block(
    w: Weights, name: str, x: Tensor, bias: Tensor | None, padding: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    rows, n, width = x.shape
    qkv = F.linear(x, w[f"{name}.attn.qkv.weight"], w[f"{name}.attn.qkv.bias"]).view(rows, n, 3, heads, width // heads)
    out = []
    for h in range(heads):
        q, k, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        logits = q @ k.transpose(1, 2) * (width // heads) ** -0.5
        if bias is not None:
            logits = logits + bias[:, h]
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, :], float("-inf"))
        out.append(logits.softmax(-1) @ v)
    attended = F.linear(torch.cat(out, -1), w[f"{name}.attn.proj.weight"], w[f"{name}.attn.proj.bias"])
    r = _norm(w, f"{name}.norm1", x + attended)
    t = F.gelu(F.linear(r, w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
    t = F.linear(t, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])
    return _norm(w, f"{name}.norm2", r + t), t


def _biases(w: Weights, places: Tensor, o: Options) -> tuple[list[Tensor | None], Tensor | None]:
    """Bias of every block, and the one that a case records."""
    if f"{A}alibi_scale" not in w:
        return [None] * (o.prenet + o.depth), None
    distance = (places[:, :, None] - places[:, None, :]).abs().float()
    base = -torch.tensor(_slopes(o.heads))[None, :, None, None] * distance[:, None]
    scaled = [base * scale for scale in w[f"{A}alibi_scale"].clamp(min=0)]
    return (scaled, base) if len(scaled) > 1 else (scaled * (o.prenet + o.depth), scaled[0])


def _normalise(x: Tensor, kind: str | None) -> Tensor:
    if kind == "instance":
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return F.layer_norm(x, x.shape[-1:]) if kind == "layer" else x


def write_case(folder: Path, name: str, o: Options, model_changes: dict | None = None) -> None:
    """Compute one step and write NAME.json, NAME.safetensors and NAME.grads.safetensors."""
    g = torch.Generator().manual_seed(7)
    w = _draw_weights(o, g)
    shared = ("local_encoder", "project_features")
    in_teacher = [n for n in w if ".decoder." not in n and (o.own_front_end or not any(s in n for s in shared))]
    teacher = {n: w[n] + torch.randn(w[n].shape, generator=g) * 0.05 for n in in_teacher}
    for n, value in w.items():
        value.requires_grad_(o.learned_scale or not n.endswith("alibi_scale"))
    source = torch.randn(o.samples, o.length, generator=g)
    frames, rows = _frames(o.length, o), o.samples * o.masks
    rec: Weights = {"in/source": source}
    padding = None
    if o.real_samples is not None:
        rec["in/padding_mask"] = torch.arange(o.length)[None] >= torch.tensor(o.real_samples)[:, None]
        padding = torch.arange(frames)[None] >= torch.tensor([_frames(n, o) for n in o.real_samples])[:, None]
        padding = padding if padding.any() else None
    mask = torch.zeros(rows, frames, dtype=torch.uint8)
    for row in range(rows):
        extra = int(torch.randint(-3, 4, (1,), generator=g)) if o.uneven and row else 0
        mask[row, torch.randperm(frames, generator=g)[: frames // 2 + extra]] = 1
    order = mask.argsort(dim=1, stable=True)
    keep = order[:, : frames - int(mask[0].sum())]
    at = keep[..., None].expand(-1, -1, o.width)
    noise = (torch.randn(rows, frames, o.width, generator=g) * 0.5).scatter(1, at, 0.0)
    rec |= {"mask/mask": mask, "mask/ids_keep": keep.int(), "mask/ids_restore": order.argsort(1).int()}
    rec["mid/decoder_noise_full"] = noise

    rec["mid/student/local_encoder_out"], local = _local(w, source, o)
    rec["mid/student/local_features"] = local
    with torch.no_grad():
        seen = _local(teacher, source, o)[1] if o.own_front_end else local.detach()
        rec["mid/teacher/pos_conv_out"] = _positions(teacher, seen)
        x = _norm(teacher, f"{A}context_encoder.norm", seen + rec["mid/teacher/pos_conv_out"])
        biases, _ = _biases(teacher, torch.arange(frames)[None], o)
        for i in range(o.prenet):
            x, _ = _block(teacher, f"{A}context_encoder.blocks.{i}", x, biases[i], padding, o.heads)
        rec["mid/teacher/context_out"] = x
        layers = []
        for i in range(o.depth):
            x, t = _block(teacher, f"blocks.{i}", x, biases[o.prenet + i], padding, o.heads)
            rec[f"mid/teacher/block{i}_out"], rec[f"mid/teacher/block{i}_target"] = x, t
            layers.append(_normalise(t, o.layer_norm))
        rec["out/targets_full"] = target = _normalise(sum(layers) / len(layers), o.final_norm)

    cloned = local.repeat_interleave(o.masks, 0)
    places = _positions(w, cloned * (1 - mask.float())[..., None])
    rec["mid/student/pos_conv_out"] = places
    rec["mid/student/context_in"] = x = cloned.gather(1, at) + places.gather(1, at)
    kept_padding = None if padding is None else padding.repeat_interleave(o.masks, 0).gather(1, keep)
    if kept_padding is not None and kept_padding.any():
        rec["mid/student/kept_padding_mask"] = kept_padding.to(torch.uint8)
    else:
        kept_padding = None
    biases, recorded = _biases(w, keep, o)
    if recorded is not None:
        rec["mid/student/alibi_bias"] = recorded
    x = _norm(w, f"{A}context_encoder.norm", x)
    for i in range(o.prenet):
        x, _ = _block(w, f"{A}context_encoder.blocks.{i}", x, biases[i], kept_padding, o.heads)
    rec["mid/student/context_out"] = x
    for i in range(o.depth):
        x, _ = _block(w, f"blocks.{i}", x, biases[o.prenet + i], kept_padding, o.heads)
        rec[f"mid/student/block{i}_out"] = x
    rec["mid/decoder_in"] = y = noise.scatter(1, at, x)
    for i in range(2):
        z = _conv(w, f"{A}decoder.blocks.{i}.0", y)
        y = z + y if z.shape == y.shape else z
    rec["mid/decoder_out"] = y = F.linear(y, w[f"{A}decoder.proj.weight"], w[f"{A}decoder.proj.bias"])
    pred, wanted = y[mask.bool()], target.repeat_interleave(o.masks, 0)[mask.bool()]
    gap = (pred - wanted).abs()
    error = gap**2 if o.beta == 0 else torch.where(gap < o.beta, 0.5 * gap**2 / o.beta, gap - o.beta / 2)
    loss, count = error.sum() / math.sqrt(o.width), int(mask.sum())
    (loss / count).backward()
    rec |= {"out/regression_pred": pred, "out/regression_target": wanted, "loss/AUDIO_regression": loss}
    rec |= {"loss/total": loss, "loss/sample_size": torch.tensor(count), "loss/total_per_sample": loss / count}
    rec |= {"log/pred_var": (pred.var(0) + 1e-6).sqrt().mean(), "log/target_var": (wanted.var(0) + 1e-6).sqrt().mean()}

    grads = {f"grad/{n}": value.grad for n, value in w.items() if value.requires_grad}
    after = {n: DECAY * e + (1 - DECAY) * w[n] if w[n].requires_grad else w[n] for n, e in teacher.items()}
    grads |= {"ema_after/decay": torch.tensor(DECAY)} | {f"ema_after/{n}": value for n, value in after.items()}
    rec |= {f"student/{n}": value for n, value in w.items()} | {f"teacher/{n}": value for n, value in teacher.items()}
    for suffix, tensors in (("", rec), (".grads", grads)):
        plain = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
        save_file(plain, folder / f"{name}{suffix}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"modality": "audio", "model": _model(o) | (model_changes or {})}))


def _model(o: Options) -> dict:
    audio = {
        "feature_encoder_spec": str(list(o.convs)), "conv_pos_depth": 2, "conv_pos_width": 2 * o.position_kernel,
        "conv_pos_groups": 8, "prenet_depth": o.prenet, "mask_noise_std": 0.5, "ema_local_encoder": o.own_front_end,
        "use_alibi_encoder": o.scale_shape != "none", "learned_alibi_scale": o.learned_scale,
        "learned_alibi_scale_per_head": o.scale_shape in ("head", "block"),
        "learned_alibi_scale_per_layer": o.scale_shape == "block",
        "decoder": {"input_dropout": 0, "decoder_dim": o.decoder_width, "decoder_groups": 8,
                    "decoder_kernel": o.decoder_kernel, "decoder_layers": 2},
    }  # fmt: skip
    return {
        "loss_beta": o.beta, "loss_scale": None, "depth": o.depth, "embed_dim": o.width, "num_heads": o.heads,
        "clone_batch": o.masks, "average_top_k_layers": o.depth, "norm_eps": 1e-5, "mlp_ratio": 4,
        "instance_norm_target_layer": o.layer_norm == "instance", "layer_norm_target_layer": o.layer_norm == "layer",
        "layer_norm_targets": o.final_norm == "layer", "instance_norm_targets": o.final_norm == "instance",
        "encoder_dropout": 0, "post_mlp_drop": 0, "attention_dropout": 0, "modalities": {"audio": audio},
    }  # fmt: skip
