"""`D2V2DSFeatureExtractor`: recordings -> padded waveforms of zero mean and unit variance."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor


class D2V2DSFeatureExtractor(SequenceFeatureExtractor):
    """Normalises every recording by itself, then pads.

    transformers' own extractor for speech adds 1e-7 to the variance where data2vec 2.0 adds 1e-5, which quiet
    recordings show.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        variance_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            feature_size: 1, a waveform.
            sampling_rate: that the model was trained with (Hz).
            padding_value: written behind shorter recordings.
            variance_eps: added to the variance.
            kwargs: of `SequenceFeatureExtractor`.
        """
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.variance_eps = variance_eps

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[float] | Sequence[np.ndarray] | Sequence[Sequence[float]],
        *,
        sampling_rate: int,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one recording (S,) or several, mono.
            sampling_rate: of the recordings (Hz).
            padding, max_length, truncation, pad_to_multiple_of, return_attention_mask, return_tensors: see
                `SequenceFeatureExtractor.pad`.

        Returns:
            `input_values` (B, S) float32 and `attention_mask` (B, S), 1 = real.

        Raises:
            ValueError: another sampling rate, or more than one channel.
        """
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: the model was trained with {self.sampling_rate} Hz, found {sampling_rate} Hz; "
                "resample the recordings"
            )
        is_batch = np.ndim(raw_speech[0]) > 0
        recordings = [np.asarray(one, dtype=np.float64) for one in (raw_speech if is_batch else [raw_speech])]
        for one in recordings:
            if one.ndim != 1 or not one.size:
                raise ValueError(
                    f"raw_speech: expected recordings (S,) of one channel, found {one.shape}; mix them down"
                )
        return self.pad(
            BatchFeature({"input_values": [self._normalised(one) for one in recordings]}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def _normalised(self, waveform: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (waveform - waveform.mean()) / np.sqrt(waveform.var() + self.variance_eps)
        return scaled.astype(np.float32)
