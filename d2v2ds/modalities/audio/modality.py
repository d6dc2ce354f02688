"""Speech, as one object."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d2v2ds.data.reader import DataSettings
from d2v2ds.data.schema import Index
from d2v2ds.modalities.audio.demo import prepare
from d2v2ds.modalities.audio.inference import AudioInference
from d2v2ds.modalities.audio.network import AudioNetwork
from d2v2ds.modalities.audio.reader import SECONDS, AudioDataConfig, AudioReader
from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.demo import Prepared
from d2v2ds.modalities.inference import GraphInput, HubInput
from d2v2ds.modalities.modality import Modality, ProbeDefaults
from d2v2ds.shapes import AUDIO_NORM_EPS, shortest_input

PUBLISHED_RATE_HZ = 16000
"""Sample rate of every published speech model."""


def _hub_files(preprocessing: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        "feature_extractor": {
            "auto_map": {"AutoFeatureExtractor": "feature_extraction_d2v2ds.D2V2DSFeatureExtractor"},
            "feature_extractor_type": "D2V2DSFeatureExtractor",
            "sampling_rate": preprocessing["sample_rate_hz"],
            "variance_eps": preprocessing["variance_eps"],
            "padding_value": 0.0,
            "return_attention_mask": True,
        }
    }


class Audio(Modality):
    """Speech: mono waveforms, cropped; amounts in seconds."""

    name = "audio"
    shards = AudioShards
    must_be_equal = ("sample_rate_hz",)
    packer = "python -m preprocessing.pack_audio"
    network = AudioNetwork
    data = AudioDataConfig
    reader = AudioReader
    unit = SECONDS
    probe = ProbeDefaults(c=1.0, neighbours=5, uses_middle_block=True)
    hub = HubInput(
        argument="input_values",
        example='features = extractor(["speech.wav"])',
        modules=lambda preprocessing: ["feature_extraction_d2v2ds"],
        files=_hub_files,
    )
    graph = GraphInput(
        axes=("batch", "samples"),
        padding=0.0,
        sizes=lambda network, tokens: [shortest_input(n, network.conv_layers) + i for i, n in enumerate(tokens)],
        draw=lambda network, rows, size, generator: torch.randn(rows, size, generator=generator),
    )

    def run_length(self, run: Any) -> float | None:
        """Seconds of `run.hours`."""
        return None if run.hours is None else run.hours * 3600

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Recordings of the model's rate."""
        rate = preprocessing["sample_rate_hz"]
        return AudioDataConfig(shards=folder, sample_rate_hz=rate, global_batch_seconds=1, micro_batch_seconds=1)

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """Mono at `sample_rate_hz`, zero mean and unit variance over the recording."""
        rate = PUBLISHED_RATE_HZ if data is None else data.sample_rate_hz
        return {"sample_rate_hz": rate, "variance_eps": AUDIO_NORM_EPS}

    def prepare_demo(self, runs: Path, data: Path | None) -> Prepared:
        """Pack a sample, or the user's own data."""
        return prepare(runs, data)

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> AudioInference:
        """Sound files and samples."""
        return AudioInference(network, preprocessing)


AUDIO = Audio()
