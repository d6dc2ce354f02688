"""`Batch` and `MaskSet`: input of the model, built by the data workers on the CPU.

Their shapes are checked here, once. Dimension letters are those of `d2v2ds.shapes`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MaskSet:
    """M masks for each of B samples."""

    keep: Tensor
    """(B, M, K) int64, positions of the visible tokens in the order of the encoder's input."""
    masked: Tensor
    """(B, M, T) bool, True = masked, scored by the loss."""

    def __post_init__(self) -> None:
        if self.keep.dim() != 3 or self.masked.dim() != 3:
            raise ValueError(
                f"MaskSet: keep must be (B, M, K) and masked (B, M, T), found "
                f"{tuple(self.keep.shape)} and {tuple(self.masked.shape)}"
            )
        if self.keep.shape[:2] != self.masked.shape[:2]:
            raise ValueError(
                f"MaskSet: keep {tuple(self.keep.shape)} and masked {tuple(self.masked.shape)} disagree on (B, M)"
            )
        if self.masked.dtype != torch.bool or self.keep.dtype != torch.int64:
            raise ValueError(
                f"MaskSet: expected int64 keep and bool masked, found {self.keep.dtype} and {self.masked.dtype}"
            )

    @property
    def num_masks(self) -> int:
        """M, number of masks of each sample."""
        return self.masked.shape[1]

    @property
    def num_tokens(self) -> int:
        """T, number of tokens."""
        return self.masked.shape[2]

    @property
    def num_visible(self) -> int:
        """K, number of visible tokens."""
        return self.keep.shape[2]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return sample-major student rows: keep (R, K) and masked (R, T)."""
        return self.keep.flatten(0, 1), self.masked.flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class SpanMasks:
    """Masks of whole inputs, as in fine-tuning: masked tokens stay in the sequence."""

    time: Tensor | None = None
    """(B, T) bool, True = the token's features are replaced; None for none."""
    channels: Tensor | None = None
    """(B, D) bool, True = the channel is zero in all tokens; None for none."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Wanted output of each sample."""

    values: Tensor
    """(B, U) int64 sequences, padded at the end; (B,) int64 classes; (B, C) float32 shares of classes; or (B,) float32
    numbers."""
    lengths: Tensor | None = None
    """(B,) int64 lengths of sequences; None for other labels."""

    def __post_init__(self) -> None:
        if self.lengths is not None and self.lengths.shape != self.values.shape[:1]:
            raise ValueError(
                f"Labels: lengths {tuple(self.lengths.shape)} and values {tuple(self.values.shape)} disagree on B"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one modality on one rank."""

    modality: str
    """Name of the modality, the key of its encoder in the trunk."""
    source: Tensor
    """(B, ...), last axis S. Audio: (B, S) float32 waveforms, normalised. Image: (B, C, Y, X) uint8 pixels, or
    normalised float32. Text: (B, S) int64 token ids."""
    padding: Tensor | None = None
    """(B, S) bool, True = pad: samples or tokens. None if nothing is padded."""
    ids: Tensor
    """(B,) int64, row numbers of the samples in their dataset."""
    masks: MaskSet | None = None
    """Masks; None for an objective without masks."""
    span_masks: SpanMasks | None = None
    """Masks of whole inputs; None for an objective without them."""
    labels: Labels | None = None
    """Wanted outputs; None for an objective without them."""
    num_masked: int = 0
    """Masked tokens over all rows, counted in the worker to avoid a device sync."""
    loss_weight: float = 1.0
    """0.0 for a filler, which a rank runs if it has no micro-batch left or could read none of its rows."""
    faults: tuple[str, ...] = ()
    """One message for each row that could not be read: file, row, expected, found."""

    def __post_init__(self) -> None:
        if self.source.shape[0] != self.ids.shape[0]:
            raise ValueError(f"Batch: source {tuple(self.source.shape)} and ids {tuple(self.ids.shape)} disagree on B")
        if self.masks is not None and self.source.shape[0] != self.masks.keep.shape[0]:
            raise ValueError(
                f"Batch: source {tuple(self.source.shape)} and masks {tuple(self.masks.keep.shape)} disagree on B"
            )
        if self.labels is not None and len(self.labels.values) != len(self.source):
            raise ValueError(
                f"Batch: source {tuple(self.source.shape)} and labels {tuple(self.labels.values.shape)} disagree on B"
            )
        if self.padding is not None and self.padding.shape != (len(self.source), self.source.shape[-1]):
            raise ValueError(
                f"Batch: padding {tuple(self.padding.shape)} does not fit source {tuple(self.source.shape)}"
            )

    def required_masks(self) -> MaskSet:
        """Return the masks of this batch.

        Raises:
            ValueError: the batch has none.
        """
        if self.masks is None:
            raise ValueError(f"Batch of {self.modality}: expected masks, found none; the objective must ask for them")
        return self.masks

    def required_labels(self) -> Labels:
        """Return the labels of this batch.

        Raises:
            ValueError: the batch has none.
        """
        if self.labels is None:
            raise ValueError(f"Batch of {self.modality}: expected labels, found none; the objective must ask for them")
        return self.labels

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """Return the same batch on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory; the DataLoader calls this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> "Batch":
        """Return the same batch in memory that other processes can read.

        Raises:
            RuntimeError: there is not enough of it.
        """
        return self._mapped(lambda tensor: tensor.share_memory_())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            source=move(self.source),
            padding=None if self.padding is None else move(self.padding),
            ids=move(self.ids),
            masks=_moved(self.masks, move),
            span_masks=_moved(self.span_masks, move),
            labels=_moved(self.labels, move),
        )


_Part = TypeVar("_Part", bound=Any)


def _moved(part: _Part, move: Callable[[Tensor], Tensor]) -> _Part:
    """Move every tensor of a part of a batch, if there is one."""
    if part is None:
        return part
    tensors: dict[str, Any] = {one.name: getattr(part, one.name) for one in fields(part)}
    return replace(part, **{name: value if value is None else move(value) for name, value in tensors.items()})
