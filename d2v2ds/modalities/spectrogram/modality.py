"""Spectrograms, as one object."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v2ds.data.reader import DataSettings
from d2v2ds.data.schema import Index
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.modality import Modality, ProbeDefaults
from d2v2ds.modalities.spectrogram.features import SAMPLE_RATE_HZ, FbankFeatures
from d2v2ds.modalities.spectrogram.inference import SpectrogramInference, features_of, written
from d2v2ds.modalities.spectrogram.network import SpectrogramNetwork
from d2v2ds.modalities.spectrogram.reader import CLIPS, SpectrogramDataConfig, SpectrogramReader


class Spectrogram(Modality):
    """Recordings as log-mel spectrograms, read from the packed folders of speech; amounts in clips."""

    name = "spectrogram"
    shards = AudioShards
    must_be_equal = ("sample_rate_hz",)
    packer = "python -m preprocessing.pack_audio"
    network = SpectrogramNetwork
    data = SpectrogramDataConfig
    reader = SpectrogramReader
    unit = CLIPS
    probe = ProbeDefaults(c=1.0, neighbours=5)

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Recordings with the model's features."""
        return SpectrogramDataConfig(
            shards=folder, global_batch_clips=1, micro_batch_clips=1, features=features_of(preprocessing)
        )

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """Mono at `sample_rate_hz`, then `features`; those of EAT on AudioSet for weights from elsewhere."""
        features = FbankFeatures() if data is None else data.features
        return {"sample_rate_hz": SAMPLE_RATE_HZ, "features": written(features)}

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> SpectrogramInference:
        """Sound files and samples."""
        return SpectrogramInference(network, preprocessing)


SPECTROGRAM = Spectrogram()
