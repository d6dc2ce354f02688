"""Mixing of inputs and labels in one batch: mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899).

Draws come from torch's generator, which every micro-batch seeds: the same on any number of ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v2ds.bounds import PositiveOrZero, Share

Box = tuple[int, int, int, int]
"""First row, one past the last, first column, one past the last."""


@dataclass(frozen=True, kw_only=True)
class ImageMixingConfig:
    """Settings of mixup and cutmix; each image is mixed with the one at the opposite place of the batch."""

    mixup: PositiveOrZero = 0.8
    """Mixup's share of an image is drawn from Beta(a, a) with this a; 0 for no mixup."""
    cutmix: PositiveOrZero = 1.0
    """The same for cutmix."""
    share: Share = 1.0
    """Batches that are mixed."""
    cutmix_share: Share = 0.5
    """Share of the mixed batches that cutmix mixes; used only if both are on."""


@dataclass(frozen=True)
class ImageMix:
    """Draw for one batch of images."""

    own: float
    """Share of the image's own label."""
    box: Box | None
    """Part that the partner fills; None: the pixels are averaged."""


def draw_image_mix(config: ImageMixingConfig, height: int, width: int) -> ImageMix:
    """Draw what happens to a batch of images."""
    if not (config.mixup or config.cutmix) or float(torch.rand(())) >= config.share:
        return ImageMix(1.0, None)
    is_cut = float(torch.rand(())) < config.cutmix_share if config.mixup and config.cutmix else bool(config.cutmix)
    alpha = config.cutmix if is_cut else config.mixup
    own = float(torch.distributions.Beta(alpha, alpha).sample())
    if not is_cut:
        return ImageMix(own, None)
    centre = (int(torch.randint(height, ())), int(torch.randint(width, ())))
    box = _box(own, height, width, centre)
    return ImageMix(1.0 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width), box)


def _box(own: float, height: int, width: int, centre: tuple[int, int]) -> Box:
    """Box of the partner's share around a centre, clipped to the image."""
    side = (1.0 - own) ** 0.5
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    row, column = centre
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def mix_images(images: Tensor, mix: ImageMix) -> Tensor:
    """Mix (B, C, Y, X) with the batch in reverse order."""
    if mix.box is not None:
        top, bottom, left, right = mix.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        return mixed
    return images if mix.own == 1.0 else images * mix.own + images.flip(0) * (1.0 - mix.own)


def mix_classes(classes: Tensor, num_classes: int, smoothing: float, mix: ImageMix) -> Tensor:
    """Convert (B,) classes to (B, C) fp32 shares, smoothed, then mixed with the batch in reverse order."""
    rest = smoothing / num_classes
    shares = torch.full((len(classes), num_classes), rest, device=classes.device)
    shares.scatter_(1, classes[:, None], 1.0 - smoothing + rest)
    return mix.own * shares + (1.0 - mix.own) * shares.flip(0)


@dataclass(frozen=True, kw_only=True)
class WaveformMixingConfig:
    """Settings of mixing recordings; each is mixed with another one of the batch, at most its own length of it."""

    least: Share
    """The share of a recording is drawn between this and 1, once for the batch."""
    rows: Share = 1.0
    """Recordings that are mixed."""
    labels: bool = True
    """Mix the labels in the same shares; False keeps the recording's own."""


@dataclass(frozen=True)
class WaveformMix:
    """Draw for one batch of recordings."""

    own: float
    """Share of a recording's own samples, before both are scaled to keep the power."""
    partners: Tensor
    """(B,) int64."""
    rows: Tensor
    """(B,) bool, recordings that are mixed."""


def draw_waveform_mix(config: WaveformMixingConfig, num_rows: int) -> WaveformMix:
    """Draw what happens to a batch of recordings."""
    least = max(1e-6, config.least)
    own = least + (1.0 - least) * float(torch.rand(()))
    return WaveformMix(own, torch.randperm(num_rows), torch.rand(num_rows) < config.rows)


def mix_waveforms(waveforms: Tensor, padding: Tensor | None, mix: WaveformMix) -> Tensor:
    """Mix (B, S); padding (B, S) is that of the row, so that a longer partner is cut; None cuts nothing."""
    own, other = mix.own, 1.0 - mix.own
    partners, rows = mix.partners.to(waveforms.device), mix.rows.to(waveforms.device)
    mixed = (own * waveforms + other * waveforms[partners]) / (own**2 + other**2) ** 0.5
    mixed = torch.where(rows[:, None], mixed, waveforms)
    return mixed if padding is None else mixed.masked_fill(padding, 0)


def mix_labels(labels: Tensor, mix: WaveformMix) -> Tensor:
    """Mix (B, C) shares of classes."""
    partners, rows = mix.partners.to(labels.device), mix.rows.to(labels.device)
    return torch.where(rows[:, None], mix.own * labels + (1.0 - mix.own) * labels[partners], labels)
