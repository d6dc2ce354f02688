"""The clips of one micro-batch -> `Batch` with its masks.

In: a `MicroBatch` (row numbers and a crop length). Out: waveforms (B, S) without padding, and M masks for each
clip, drawn for exactly the T tokens that the front end makes of S samples. Runs in the data workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from d2v2ds.batch import Batch, MaskSet
from d2v2ds.data.audio import AudioSource, crop_starts, decode
from d2v2ds.data.sampler import MicroBatch
from d2v2ds.masking import MaskConfig, draw_masks, masked_count, visible_positions
from d2v2ds.shapes import ConvLayer, conv_output_length


@dataclass(frozen=True, kw_only=True)
class AudioCollator:
    """Reads, crops, normalises and masks the clips of a micro-batch."""

    source: AudioSource
    mask: MaskConfig
    conv_layers: Sequence[ConvLayer]
    """The front end of the model, which decides how many tokens a crop has."""
    seed: int
    modality: str = "audio"
    """The model's name for this input."""

    def __call__(self, micro: MicroBatch) -> Batch:
        """
        Raises:
            ShardError: a row cannot be read.
            ValueError: the crop is too short for the front end or for the mask settings.
        """
        rows = micro.rows
        num_tokens = conv_output_length(micro.num_samples, self.conv_layers)
        num_masked = masked_count(self.mask, num_tokens)

        lengths = np.asarray(self.source.num_samples[rows])  # (B,)
        starts = crop_starts(lengths, micro.num_samples, seed=self.seed, epoch=micro.epoch, rows=rows)
        waveforms = torch.empty(len(rows), micro.num_samples)  # (B, S)
        for row, start, out in zip(rows.tolist(), starts.tolist(), waveforms.numpy(), strict=True):
            decode(self.source, row, start, out)

        masked = draw_masks(self.mask, num_tokens, seed=self.seed, epoch=micro.epoch, sample_ids=rows)  # (B, M, T)
        return Batch(
            modality=self.modality,
            source=waveforms,
            ids=torch.from_numpy(rows),
            masks=MaskSet(keep=torch.from_numpy(visible_positions(masked)), masked=torch.from_numpy(masked)),
            num_masked=len(rows) * self.mask.num_masks * num_masked,
            loss_weight=micro.weight,
        )
