"""A second implementation of one training step, from the text of the specification alone.

It shares no code with `d2v2ds.model`: weights stay in a dict under their official names, options under theirs with the
defaults of the published networks, and heads are looped over. Its results are named as in the files of golden vectors,
so that recorded cases and this step can be compared key by key, and so that it can write cases that the records lack.
All dropouts are taken to be 0. It computes in float64, so that what differs is the rounding of the other side.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
DECAY = 0.909
GIVEN = ("in/", "student/", "teacher/", "mask/", "mid/decoder_noise_full")
"""Beginnings of the names that a step starts from; it computes the others."""


@dataclass(frozen=True)
class Step:
    """What a step is given, and in `out` what it has computed so far."""

    modality: str
    model: Mapping[str, Any]
    given: Weights
    out: Weights = field(default_factory=dict)

    def option(self, name: str, default: Any) -> Any:
        """An option of the model, or of the modality where only that has it."""
        own = self.model["modalities"][self.modality]
        return own.get(name, self.model.get(name, default))

    def decoder(self, name: str, default: Any) -> Any:
        """An option of the decoder."""
        return self.model["modalities"][self.modality].get("decoder", {}).get(name, default)

    @property
    def prefix(self) -> str:
        """Of the names of everything that belongs to the modality."""
        return f"modality_encoders.{self.modality.upper()}."

    @property
    def is_spectrogram(self) -> bool:
        """True for images of one channel, as EAT calls its spectrograms."""
        return int(self.option("in_chans", 3)) == 1

    @property
    def columns(self) -> int | None:
        """Patches in a row of a spectrogram; None for square images."""
        return 128 // int(self.option("patch_size", 16)) if self.is_spectrogram else None

    @property
    def depth(self) -> int:
        """Blocks in the prenet and after it."""
        return self.option("prenet_depth", 0) + self.model["depth"]


def slopes(heads: int) -> list[float]:
    """ALiBi slopes."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    own = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    double = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
    return own + double[::2][: heads - power]


def strides(spec: str) -> list[tuple[int, int, int]]:
    """Layers (channels, kernel, stride) of a list such as ``[(32, 10, 5)] + [(32, 3, 2)] * 2``."""
    layers: list[tuple[int, int, int]] = []
    for inner, times in re.findall(r"\[([^]]*)\](?: *\* *(\d+))?", spec):
        triples = [(int(a), int(b), int(c)) for a, b, c in re.findall(r"\((\d+), *(\d+), *(\d+)\)", inner)]
        layers += triples * int(times or 1)
    return layers


def frames(samples: int, layers: list[tuple[int, int, int]]) -> int:
    """Frames that a conv stack makes of so many samples."""
    for _, kernel, stride in layers:
        samples = (samples - kernel) // stride + 1
    return samples


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """The layer of that name."""
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """The affine layer norm of that name."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def conv(w: Weights, name: str, x: Tensor, groups: int, columns: int | None = None) -> Tensor:
    """Convolution, trim, plain norm over channels and GELU; x: (R, L, C), a grid where the kernel is 2-D.

    The grid is square unless the number of its columns is given.
    """
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    kernel, rows = weight.shape[-1], len(x)
    y = x.transpose(1, 2)
    if weight.dim() == 4:
        side = columns or math.isqrt(x.shape[1])
        lines = x.shape[1] // side
        y = F.conv2d(y.reshape(rows, -1, lines, side), weight, bias, padding=kernel // 2, groups=groups)
        y = y[:, :, :lines, :side].flatten(2)  # the last row and column go if the kernel is even
    else:
        y = F.conv1d(y, weight, bias, padding=kernel // 2, groups=groups)[..., : x.shape[1]]
    y = y.transpose(1, 2)
    return F.gelu(F.layer_norm(y, y.shape[-1:]))


def block(
    w: Weights, name: str, x: Tensor, bias: Tensor | None, padding: Tensor | None, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Transformer block: its output and its target."""
    rows, n, width = x.shape
    qkv = linear(w, f"{name}.attn.qkv", x).view(rows, n, 3, heads, width // heads)
    out = []
    for h in range(heads):
        q, k, v = qkv[:, :, 0, h], qkv[:, :, 1, h], qkv[:, :, 2, h]
        logits = q @ k.transpose(1, 2) * (width // heads) ** -0.5
        if bias is not None:
            logits = logits + bias[:, h]
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, :], float("-inf"))
        out.append(logits.softmax(-1) @ v)
    r = norm(w, f"{name}.norm1", x + linear(w, f"{name}.attn.proj", torch.cat(out, -1)), eps)
    t = linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", r)))
    return norm(w, f"{name}.norm2", r + t, eps), t


def _local(s: Step, w: Weights) -> tuple[Tensor, Tensor]:
    """Output of the module `local_encoder` and the local features (B, L, D)."""
    source, name = s.given["in/source"], f"{s.prefix}local_encoder"
    if s.modality == "image":
        inner = f"{name}.0.proj" if f"{name}.1.weight" in w else f"{name}.proj"
        weight = w[f"{inner}.weight"]
        x = F.conv2d(source, weight, w[f"{inner}.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = linear(w, f"{name}.1", x) if f"{name}.1.weight" in w else x
        return x, x
    if s.modality == "text":
        x = F.embedding(source, w[f"{name}.embed_tokens.weight"], padding_idx=1)
        if not s.option("no_token_positional_embeddings", False):
            is_token = (source != 1).long()
            places = 1 + is_token.cumsum(1) * is_token  # 2, 3, .. for tokens, 1 for padding
            x = x + F.embedding(places, w[f"{name}.embed_positions.weight"], padding_idx=1)
        x = norm(w, f"{name}.layernorm_embedding", x)
        return x, x
    x = source[:, None]
    for i, (_, _, stride) in enumerate(strides(s.option("feature_encoder_spec", ""))):
        x = F.conv1d(x, w[f"{name}.conv_layers.{i}.0.weight"], stride=stride).transpose(1, 2)
        x = F.gelu(norm(w, f"{name}.conv_layers.{i}.2.1", x)).transpose(1, 2)
    return x, linear(w, f"{s.prefix}project_features.2", norm(w, f"{s.prefix}project_features.1", x.transpose(1, 2)))


def _padding(s: Step, length: int) -> Tensor | None:
    """Padding of the positions (B, L), None where nothing is padded."""
    padding = s.given.get("in/padding_mask")
    if padding is None:
        return None
    if s.modality == "audio":
        layers = strides(s.option("feature_encoder_spec", ""))
        real = torch.tensor([frames(int(n), layers) for n in (~padding.bool()).sum(1)])
        padding = torch.arange(length)[None] >= real[:, None]
    return padding.bool() if padding.any() else None


def _biases(s: Step, w: Weights, places: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    """Bias of every block, and the one that a case records; places: (R, K) original positions."""
    if not s.option("use_alibi_encoder", False):
        return [None] * s.depth, None
    distance = (places[:, :, None] - places[:, None, :]).abs().double()
    base = -torch.tensor(slopes(s.option("num_heads", 12))).double()[None, :, None, None] * distance[:, None]
    extra = s.option("num_extra_tokens", 0)
    base = F.pad(base, (extra, 0, extra, 0))
    scaled = [base * scale for scale in w[f"{s.prefix}alibi_scale"].clamp(min=0)]
    return (list(scaled), base) if len(scaled) > 1 else (list(scaled * s.depth), scaled[0])


def _encode(s: Step, w: Weights, local: Tensor, keep: Tensor, mask: Tensor, side: str) -> tuple[Tensor, list[Tensor]]:
    """Output of the last block (R, X+K, D) and the targets of the main blocks; records intermediates of a side."""
    rows, length = mask.shape
    extra, heads, eps = s.option("num_extra_tokens", 0), s.option("num_heads", 12), s.model["norm_eps"]
    if f"{s.prefix}fixed_positional_encoder.positions" in w:
        local = local + w[f"{s.prefix}fixed_positional_encoder.positions"][:, : local.shape[1]]
    cloned = local.repeat_interleave(rows // len(local), 0)
    at = keep[..., None].expand(-1, -1, local.shape[-1])
    x = cloned.gather(1, at)
    if s.modality == "audio":
        places, i = cloned * (1 - mask.double())[..., None], 1
        while f"{s.prefix}relative_positional_encoder.{i}.0.weight" in w:
            name = f"{s.prefix}relative_positional_encoder.{i}.0"
            places, i = conv(w, name, places, s.option("conv_pos_groups", 16)), i + 1
        s.out[f"mid/{side}/pos_conv_out"] = places
        x = x + places.gather(1, at)
    if extra:
        x = torch.cat([w[f"{s.prefix}extra_tokens"].expand(rows, -1, -1), x], 1)
    biases, recorded = _biases(s, w, keep)
    padding = _padding(s, length)
    if padding is not None:
        padding = F.pad(padding.repeat_interleave(rows // len(padding), 0).gather(1, keep), (extra, 0))
        padding = padding if padding.any() else None
    if side == "student":
        s.out["mid/student/context_in"] = x
        if recorded is not None:
            s.out["mid/student/alibi_bias"] = recorded
        if padding is not None:
            s.out["mid/student/kept_padding_mask"] = padding.to(torch.uint8)
    pre = s.option("prenet_depth", 0)
    if s.modality != "text" or pre:
        x = norm(w, f"{s.prefix}context_encoder.norm", x, eps)
    for i in range(pre):
        x, _ = block(w, f"{s.prefix}context_encoder.blocks.{i}", x, biases[i], padding, heads, eps)
    if side == "student" or not s.model.get("ema_encoder_only", True):
        s.out[f"mid/{side}/context_out"] = x
    targets = []
    for i in range(s.model["depth"]):
        x, t = block(w, f"blocks.{i}", x, biases[pre + i], padding, heads, eps)
        s.out[f"mid/{side}/block{i}_out"] = x
        targets.append(t)
    return x, targets


def _standard(x: Tensor, over: int | tuple[int, int]) -> Tensor:
    return (x - x.mean(over, keepdim=True)) / (x.var(over, keepdim=True, unbiased=False) + 1e-5).sqrt()


def _targets(s: Step, layers: list[Tensor]) -> Tensor:
    """Average of the top layers (B, L, D); extra positions are gone already."""

    def normalise(x: Tensor, over: dict[str, int | tuple[int, int]]) -> Tensor:
        for name, dims in over.items():
            x = _standard(x, dims) if s.model.get(name, False) else x
        return x

    each: dict[str, int | tuple[int, int]] = {
        "instance_norm_target_layer": 1, "layer_norm_target_layer": 2, "batch_norm_target_layer": (0, 1),
    }  # fmt: skip
    top = [normalise(t, each) for t in layers[-s.model["average_top_k_layers"] :]]
    return normalise(torch.stack(top).mean(0), {"layer_norm_targets": 2, "instance_norm_targets": 1})


def _decode(s: Step, w: Weights, x: Tensor, keep: Tensor) -> Tensor:
    """Predictions (R, L, D) from encoder outputs without extra tokens."""
    y = s.given["mid/decoder_noise_full"].scatter(1, keep[..., None].expand_as(x), x)
    s.out["mid/decoder_in"] = y
    for i in range(s.decoder("decoder_layers", 5)):
        z = conv(w, f"{s.prefix}decoder.blocks.{i}.0", y, s.decoder("decoder_groups", 16), s.columns)
        y = z + y if s.decoder("decoder_residual", True) and z.shape == y.shape else z
    proj, count = f"{s.prefix}decoder.proj", 1 if s.modality == "image" else s.decoder("projection_layers", 1)
    for i in range(count):
        y = linear(w, proj if count == 1 else f"{proj}.{2 * i}", F.gelu(y) if i else y)
    s.out["mid/decoder_out"] = y
    return y


def _error(s: Step, pred: Tensor, wanted: Tensor) -> Tensor:
    """Scaled error, summed."""
    gap, beta, scale = (pred - wanted).abs(), s.model.get("loss_beta", 0), s.model.get("loss_scale")
    error = gap**2 if beta == 0 else torch.where(gap < beta, 0.5 * gap**2 / beta, gap - beta / 2)
    return error.sum() * (1 / math.sqrt(pred.shape[-1]) if scale is None else scale)


def compute(modality: str, model: Mapping[str, Any], given: Weights) -> tuple[Weights, Weights]:
    """One forward and backward pass and one teacher update.

    Args:
        modality: audio, image (spectrograms too) or text.
        model: section `model` of an official configuration.
        given: the names of `GIVEN` as in a file of golden vectors, weights of student and teacher among them.

    Returns:
        everything else that such a file holds, and what its companion of gradients holds.
    """
    given = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    s = Step(modality, model, given)
    fixed = [f"{s.prefix}fixed_positional_encoder.positions"]
    fixed += [] if s.option("learned_alibi_scale", False) else [f"{s.prefix}alibi_scale"]
    w = {n[8:]: v.detach().clone().requires_grad_(n[8:] not in fixed) for n, v in given.items() if n[:8] == "student/"}
    own = {n.removeprefix("teacher/"): v for n, v in given.items() if n.startswith("teacher/")}
    bare = "blocks." if model.get("ema_encoder_only", True) else ""  # the prefix that the teacher's names lack
    # What the teacher lacks is computed with the student's weights: local features of audio and text, and, where only
    # blocks are averaged, whatever lies before them.
    whole = {n: v.detach() for n, v in w.items()} | {bare + n: v for n, v in own.items()}
    mask, keep = given["mask/mask"], given["mask/ids_keep"].long()
    extra = s.option("num_extra_tokens", 0)

    raw, local = _local(s, w)
    with torch.no_grad():
        seen = _local(s, whole)[1]
        samples, length = seen.shape[:2]
        everywhere = torch.arange(length).expand(samples, -1)
        _, layers = _encode(s, whole, seen, everywhere, torch.zeros(samples, length), "teacher")
        s.out.update({f"mid/teacher/block{i}_target": t for i, t in enumerate(layers)})
        s.out["out/targets_full"] = target = _targets(s, [t[:, extra:] for t in layers])
        if any(n.startswith(f"{s.prefix}local_encoder") for n in own):
            s.out["mid/teacher/local_features"] = seen
    if not s.is_spectrogram:
        s.out["mid/student/local_encoder_out"] = raw
    if modality != "image" or s.is_spectrogram:
        s.out["mid/student/local_features"] = local
    x, _ = _encode(s, w, local, keep, mask, "student")
    pred = _decode(s, w, x[:, extra:], keep)[mask.bool()]
    many = target.repeat_interleave(len(mask) // samples, 0)
    wanted, count = many[mask.bool()], int(mask.sum())
    loss = s.out[f"loss/{modality.upper()}_regression"] = _error(s, pred, wanted)
    if model.get("cls_loss", 0):
        s.out.update({"out/cls_pred": x[:, extra - 1], "out/cls_target": many.mean(1)})
        # Assumption: the same elementwise error (beta, scale) as for patches; the text names the plain square only.
        s.out["loss/cls"] = _error(s, x[:, extra - 1], many.mean(1)) * model["cls_loss"] * count
        loss = loss + s.out["loss/cls"]
    s.out.update({"out/regression_pred": pred, "out/regression_target": wanted, "loss/total": loss})
    s.out.update({"loss/sample_size": torch.tensor(count), "loss/total_per_sample": loss / count})
    s.out["log/masked_pct"] = torch.tensor(1 - keep.shape[1] / length).double()
    s.out["log/pred_var"] = (pred.var(0) + 1e-6).sqrt().mean()
    s.out["log/target_var"] = (wanted.var(0) + 1e-6).sqrt().mean()

    (loss / count).backward()
    grads = {f"grad/{n}": v.grad for n, v in w.items() if v.grad is not None}
    for n, e in own.items():
        p = w[bare + n]
        grads[f"ema_after/{n}"] = DECAY * e + (1 - DECAY) * p if p.requires_grad else p
    grads["ema_after/decay"] = torch.tensor(DECAY, dtype=torch.float64)
    return s.out, grads


class Draw:
    """Random weights, inputs and masks of a case, in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers with unit variance."""
        return torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, *shape: int) -> None:
        """Weight of that shape, output channels first, and bias."""
        self.weights[f"{name}.weight"] = self.normal(*shape) / math.sqrt(math.prod(shape[1:]))
        self.weights[f"{name}.bias"] = self.normal(shape[0]) * 0.2

    def norm(self, name: str, width: int) -> None:
        """Gain and bias."""
        self.weights[f"{name}.weight"] = 1 + self.normal(width) * 0.2
        self.weights[f"{name}.bias"] = self.normal(width) * 0.2

    def block(self, name: str, width: int, ratio: float = 4) -> None:
        """Weights of one transformer block."""
        hidden = int(width * ratio)
        self.linear(f"{name}.attn.qkv", 3 * width, width)
        self.linear(f"{name}.attn.proj", width, width)
        self.linear(f"{name}.mlp.fc1", hidden, width)
        self.linear(f"{name}.mlp.fc2", width, hidden)
        self.norm(f"{name}.norm1", width)
        self.norm(f"{name}.norm2", width)

    def alibi_scale(self, name: str, *shape: int) -> None:
        """Scale of the given shape with, if there are several, one that is clamped and gets no gradient."""
        scale = 1 + self.normal(*shape) * 0.4
        if scale.numel() > 1:
            scale.view(-1)[1] = -0.3
        self.weights[name] = scale

    def teacher(self, is_averaged: Callable[[str], bool], bare: str = "") -> Weights:
        """Weights near the student's of those outside the decoder for which `is_averaged`, less the prefix `bare`."""
        names = [n for n in self.weights if ".decoder." not in n and is_averaged(n)]
        return {n.removeprefix(bare): self.weights[n] + self.normal(*self.weights[n].shape) * 0.05 for n in names}

    def given(
        self,
        source: Tensor,
        teacher: Weights,
        masks: int,
        length: int,
        num_masked: Sequence[int],
        always: Tensor | None = None,
    ) -> Weights:
        """What a step starts from: samples x `masks` rows, of which row r has num_masked[r] (and round again) masked.

        Positions of `always` (B, L) are masked in all rows of their sample.
        """
        rows, width = len(source) * masks, len(self.weights["blocks.0.norm1.weight"])
        mask = torch.zeros(rows, length, dtype=torch.uint8)
        for row in range(rows):
            urgency = torch.rand(length, generator=self.generator)
            urgency += 0 if always is None else always[row // masks]
            mask[row, urgency.argsort(descending=True)[: num_masked[row % len(num_masked)]]] = 1
        order = mask.argsort(dim=1, stable=True)
        keep = order[:, : length - int(mask[0].sum())]
        noise = (self.normal(rows, length, width) * 0.5).scatter(1, keep[..., None].expand(-1, -1, width), 0.0)
        given = {f"student/{n}": v for n, v in self.weights.items()} | {f"teacher/{n}": v for n, v in teacher.items()}
        return given | {
            "in/source": source, "mask/mask": mask, "mask/ids_keep": keep.int(),
            "mask/ids_restore": order.argsort(1).int(), "mid/decoder_noise_full": noise,
        }  # fmt: skip


def _stored(key: str, value: Tensor) -> Tensor:
    value = value.detach().contiguous().clone()
    return value.float() if value.is_floating_point() and key != "ema_after/decay" else value


def write(folder: Path, name: str, modality: str, model: Mapping[str, Any], given: Weights) -> None:
    """Compute one step and write NAME.json, NAME.safetensors and NAME.grads.safetensors."""
    out, grads = compute(modality, model, given)
    for suffix, tensors in (("", given | out), (".grads", grads)):
        plain = {key: _stored(key, value) for key, value in tensors.items()}
        save_file(plain, folder / f"{name}{suffix}.safetensors")
    vocabulary = given.get("student/modality_encoders.TEXT.local_encoder.embed_tokens.weight")
    kind = "spectrogram" if model["modalities"][modality].get("in_chans", 3) == 1 else modality
    meta = {"modality": kind, "model": model, "vocab_size": None if vocabulary is None else len(vocabulary)}
    (folder / f"{name}.json").write_text(json.dumps(meta))
