"""`Batch` and `MaskSet`: input of the model, built by the data workers on the CPU.

Their shapes are checked here, once. Dimension letters are those of `d2v2ds.shapes`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        masks = self.masks
        return replace(
            self,
            source=move(self.source),
            padding=None if self.padding is None else move(self.padding),
            ids=move(self.ids),
            masks=None if masks is None else MaskSet(keep=move(masks.keep), masked=move(masks.masked)),
        )
