"""Rows of one micro-batch -> `Batch` with its masks.

In: a `MicroBatch` (row numbers and a size). Out: their inputs, which the modality's reader crops or pads to one size,
and M masks for each, drawn for exactly the T tokens that the model makes of them. Runs in the data workers.

Rows that cannot be read are skipped and reported in `Batch.faults`; `train.guard` ends a run with too many. They depend
on the data alone, so that the batch is the same on every rank and for any number of workers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from d2v2ds.batch import Batch, MaskSet, SpanMasks
from d2v2ds.data.mixture import DATASET_BITS, split_row_numbers
from d2v2ds.data.order import MicroBatch
from d2v2ds.data.reader import Examples, Reader
from d2v2ds.errors import ShardError
from d2v2ds.masking import MaskConfig, draw_masks, draw_span_masks, masked_count, visible_positions
from d2v2ds.whole_masks import draw_whole_masks

STAND_IN_TRIES = 1000
"""Most rows tried in place of a micro-batch without any readable row."""
_STAND_IN_CANDIDATES = 10_000
"""Rows of each dataset that are searched for a fitting size."""


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Reads and masks the rows of a micro-batch."""

    reader: Reader
    seed: int

    def __call__(self, micro: MicroBatch) -> Batch:
        """
        Raises:
            ShardError: no row can be read, and no other row either.
            ValueError: the input is too short for the model or for the mask settings.
        """
        faults: tuple[str, ...] = ()
        try:
            examples, labels = self.reader.read(micro, self.seed), self.reader.read_labels(micro.rows)
        except ShardError:
            micro, faults = self._without_faulty(micro)
            examples, labels = self.reader.read(micro, self.seed), self.reader.read_labels(micro.rows)
        masks, num_masked = self._masks(micro)
        span_masks = self._span_masks(micro, examples)
        if span_masks is not None and span_masks.time is not None:
            num_masked = int(span_masks.time.sum())
        return Batch(
            modality=self.reader.modality,
            source=examples.source,
            padding=examples.padding,
            ids=torch.from_numpy(micro.rows),
            masks=masks,
            num_masked=num_masked,
            span_masks=span_masks,
            labels=labels,
            loss_weight=micro.weight,
            faults=faults,
        )

    def _masks(self, micro: MicroBatch) -> tuple[MaskSet | None, int]:
        """Draw masks that remove tokens, and count the masked ones."""
        mask = self.reader.mask
        if not isinstance(mask, MaskConfig):
            return None, 0
        num_tokens = self.reader.network.num_tokens(micro.size)
        num_masked = masked_count(mask, num_tokens)
        masked = draw_masks(mask, num_tokens, seed=self.seed, epoch=micro.epoch, sample_ids=micro.rows)  # (B, M, T)
        masks = MaskSet(keep=torch.from_numpy(visible_positions(masked)), masked=torch.from_numpy(masked))
        return masks, len(micro.rows) * mask.num_masks * num_masked

    def _span_masks(self, micro: MicroBatch, examples: Examples) -> SpanMasks | None:
        """Draw masks of whole inputs: those of the objective, or of a task in training."""
        mask, labelled = self.reader.mask, self.reader.labelled
        is_of_task = labelled is not None and self.reader.augments
        if isinstance(mask, MaskConfig | None) and not is_of_task:
            return None
        padding = examples.padding
        sizes = [micro.size] * len(micro.rows) if padding is None else (~padding).sum(1).tolist()
        tokens = np.array([self.reader.network.num_tokens(size) for size in sizes])
        seed, epoch, rows = self.seed, micro.epoch, micro.rows
        channels = None
        if isinstance(mask, MaskConfig | None):
            assert labelled is not None
            width = labelled.width
            time, channels = draw_span_masks(labelled.spans, tokens, width, seed=seed, epoch=epoch, sample_ids=rows)
        else:
            time = draw_whole_masks(mask, tokens, seed=seed, epoch=epoch, sample_ids=rows)
        if time is not None:  # a batch may be padded beyond its longest row
            time = np.pad(time, ((0, 0), (0, self.reader.network.num_tokens(micro.size) - time.shape[1])))
        return SpanMasks(
            time=None if time is None else torch.from_numpy(time),
            channels=None if channels is None else torch.from_numpy(channels),
        )

    def _without_faulty(self, micro: MicroBatch) -> tuple[MicroBatch, tuple[str, ...]]:
        """Skip rows that cannot be read; return the others, and a message for each skipped row."""
        found = [self._fault(micro, row) for row in micro.rows]
        good = micro.rows[[fault is None for fault in found]]
        faults = tuple(fault for fault in found if fault is not None)
        reported = faults if micro.weight else ()  # the rows of a filler belong to another rank, which reports them
        micro = replace(micro, rows=good) if len(good) else self._stand_in(micro, faults)
        return micro, reported

    def _fault(self, micro: MicroBatch, row: int) -> str | None:
        """Return the error of reading a row, None if there is none."""
        try:
            self.reader.read(replace(micro, rows=np.array([row])), self.seed)
            self.reader.read_labels(np.array([row]))
        except ShardError as error:
            return str(error)
        return None

    def _stand_in(self, micro: MicroBatch, faults: tuple[str, ...]) -> MicroBatch:
        """Return another row with weight 0, so that this rank runs the model like all others.

        Raises:
            ShardError: none of the tried rows can be read.
        """
        tried = 0
        for row, size in self._others(micro):
            tried += 1
            other = replace(micro, rows=np.array([row]), size=size, weight=0.0)
            if self._fault(other, row) is None:
                return other
        raise ShardError(f"{faults[-1]}; {tried} other rows of the data were tried, none of them can be read")

    def _others(self, micro: MicroBatch) -> Iterator[tuple[int, int]]:
        """Yield rows after the last one of a micro-batch, then those of other datasets, with their sizes in a batch.

        The size stays that of the micro-batch unless no row fits. Rows are spread over each dataset, because
        neighbouring ones may lie in the same damaged file.
        """
        config, datasets = self.reader.plan_config(), self.reader.datasets
        first, last = (int(number) for number in split_row_numbers(micro.rows[-1]))
        for dataset in (first, *(number for number in range(len(datasets)) if number != first)):
            own = int(dataset == first)
            others = len(datasets[dataset].sizes) - own
            count = min(others, _STAND_IN_CANDIDATES)
            rows = ((last + 1) * own + np.arange(count) * (others // max(count, 1))) % (others + own)
            sizes = datasets[dataset].sizes[rows]
            usable = config.usable(sizes)
            rows, sizes = rows[usable], np.minimum(sizes[usable], config.max_size)
            sizes = np.minimum(sizes, micro.size) if config.crops else np.maximum(sizes, micro.size)
            order = np.argsort(sizes != micro.size, kind="stable")
            order = order[:: max(1, math.ceil(len(order) * len(datasets) / STAND_IN_TRIES))]
            yield from zip(((dataset << DATASET_BITS) | rows[order]).tolist(), sizes[order].tolist(), strict=True)
