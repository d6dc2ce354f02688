"""Sound files that are unusual, damaged or hostile, as bytes."""

import io
from typing import Any

import numpy as np
import soundfile

RATE = 16000


def hum(seconds: float = 1.0, sigma: float = 0.1, seed: int = 0) -> np.ndarray:
    """(S,) float64 noise."""
    return np.random.default_rng(seed).normal(0, sigma, int(seconds * RATE))


def encoded(samples: np.ndarray, format: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    """Content of a sound file of (S,) or (S, C)."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


def with_number(data: bytes, offset: int, value: int, width: int = 4, order: Any = "little") -> bytes:
    """The bytes with a number in place of those at an offset."""
    return data[:offset] + value.to_bytes(width, order) + data[offset + width :]


def with_size(wav: bytes, size: int) -> bytes:
    """A WAV file whose header says another size of its samples."""
    return with_number(wav, wav.index(b"data") + 4, size)


def with_rate(wav: bytes, rate: int) -> bytes:
    """A WAV file whose header says another sampling rate."""
    return with_number(wav, 24, rate)


def with_flac_length(flac: bytes, samples: int) -> bytes:
    """A FLAC file whose header says another length."""
    packed = int.from_bytes(flac[18:26], "big") >> 36 << 36 | samples
    return with_number(flac, 18, packed, 8, "big")
