"""Inference: load an exported model, and turn recordings, pictures and texts into features of every layer.

    from d2v2ds import FeatureExtractor

    extractor = FeatureExtractor("my-model")              # a folder written by d2v2ds.export
    features = extractor(["a.wav", waveform], sample_rate=44100)
    features.layers[12], features.padding                 # (B, T, D) and (B, T), True = padding

`load_model` gives the bare network, for fine-tuning code of your own.
"""

from d2v2ds.inference.extractor import FeatureExtractor, Features, load_model

__all__ = ["FeatureExtractor", "Features", "load_model"]
