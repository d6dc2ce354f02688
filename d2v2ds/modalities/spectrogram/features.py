"""Waveforms -> log-mel features: Kaldi's filter bank as EAT uses it, and the decibels of BAT.

`fbank` has the parameters and the order of torchaudio's `compliance.kaldi.fbank` as the code of EAT (arXiv 2401.03497)
calls it; it was checked against kaldi-native-fbank, not against torchaudio. kaldi-native-fbank itself refuses 128 bins
of a 512-point spectrum ("num_mel_bins too large"), because the lowest bins are narrower than the spectrum's lines and
some hold none. torchaudio leaves those at the floor, and so does `fbank`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v2ds.bounds import Positive

SAMPLE_RATE_HZ = 16000
HOP = 160
"""Samples from one frame to the next: 10 ms."""
WINDOW = 400
"""Samples of a frame of `fbank`: 25 ms."""
_FFT = 512
_PREEMPHASIS = 0.97
_FLOOR = torch.finfo(torch.float32).eps
SILENCE = math.log(_FLOOR)
"""Log-mel of digital silence, -15.94: the least value of `fbank`."""
_STFT_WINDOW = 1024
_LEAST_POWER = 1e-10
_RANGE_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class FbankFeatures:
    """Settings of Kaldi's log-mel filter bank, normalised by constants of the training data (EAT)."""

    kind: Literal["fbank"] = "fbank"
    mean: float = -4.268
    """Mean of the log-mel values of the training data; AudioSet's."""
    std: Positive = 4.569
    """Their standard deviation; twice it divides, so that features have one of about 0.5."""
    padding: Literal["zero", "silence"] = "zero"
    """Log-mel value behind a short recording: 0, as published, which is louder than most sounds, or `SILENCE`."""

    @property
    def fill(self) -> float:
        """Feature at padded places."""
        return ((0.0 if self.padding == "zero" else SILENCE) - self.mean) / (2 * self.std)

    def num_frames(self, samples: int) -> int:
        """Return the frames of a waveform."""
        return 0 if samples < WINDOW else 1 + (samples - WINDOW) // HOP

    def num_samples(self, frames: int) -> int:
        """Return the fewest samples with so many frames."""
        return WINDOW + HOP * (frames - 1)

    def compute(self, waveform: Tensor, mean: float, mel_bins: int) -> Tensor:
        """Compute normalised features.

        Args:
            waveform: (S,) fp32 in [-1, 1], at 16 kHz.
            mean: of the whole recording, which is subtracted.
            mel_bins: F.

        Returns:
            (F, frames) fp32.
        """
        return (fbank(waveform - mean, mel_bins).T - self.mean) / (2 * self.std)


@dataclass(frozen=True, kw_only=True)
class DecibelFeatures:
    """Settings of mel power in decibels, brought to 0..1 by the range of each clip (BAT, arXiv 2602.16305)."""

    kind: Literal["decibel"] = "decibel"
    top_db: Positive = 80.0
    """Values so far below the largest of the clip are raised (decibels)."""

    @property
    def fill(self) -> float:
        """Feature at padded places: the least value of a clip."""
        return 0.0

    def num_frames(self, samples: int) -> int:
        """Return the frames of a waveform."""
        return 0 if samples <= _STFT_WINDOW // 2 else 1 + samples // HOP

    def num_samples(self, frames: int) -> int:
        """Return the fewest samples with so many frames."""
        return max(_STFT_WINDOW // 2 + 1, HOP * (frames - 1))

    def compute(self, waveform: Tensor, mean: float, mel_bins: int) -> Tensor:
        """Compute features in 0..1; arguments and result as `FbankFeatures.compute`, but `mean` stays in."""
        power = mel_power(waveform, mel_bins)  # (frames, F)
        decibels = 10.0 * power.clamp(min=_LEAST_POWER).log10()
        decibels = decibels.clamp(min=float(decibels.max()) - self.top_db)
        low, high = decibels.min(), decibels.max()
        return ((decibels - low) / (high - low + _RANGE_EPS)).T


Features = FbankFeatures | DecibelFeatures
"""Settings of features; `kind` chooses."""


def fbank(waveform: Tensor, mel_bins: int) -> Tensor:
    """Compute Kaldi's log-mel filter bank: (S,) fp32 -> (frames, F) fp32, floored at `SILENCE`.

    Symmetric Hann window of 25 ms every 10 ms, whole frames only; mean of a frame removed, pre-emphasis 0.97, power of
    a 512-point spectrum, triangles on Kaldi's mel scale from 20 Hz to 8 kHz; no dither, no energy.
    """
    frames = waveform.unfold(0, WINDOW, HOP)  # (frames, 400)
    frames = frames - frames.mean(1, keepdim=True)
    before = F.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]  # the first sample is its own predecessor
    frames = (frames - _PREEMPHASIS * before) * torch.hann_window(WINDOW, periodic=False)
    power = torch.fft.rfft(frames, _FFT).abs().square()  # (frames, 257)
    return (power @ mel_filters(mel_bins, _FFT, 20.0, 1127.0, 700.0)).clamp(min=_FLOOR).log()


def mel_power(waveform: Tensor, mel_bins: int) -> Tensor:
    """Compute the power in mel bins of a centred STFT: (S,) fp32, S > 512 -> (frames, F) fp32.

    Periodic Hann window of 1024 samples every 160, reflected at the ends, HTK's mel scale from 0 to 8 kHz, triangles of
    height 1.
    """
    window = torch.hann_window(_STFT_WINDOW)
    spectrum = torch.stft(waveform, _STFT_WINDOW, HOP, window=window, center=True, return_complex=True)
    power = spectrum.abs().square().T  # (frames, 513)
    return power @ mel_filters(mel_bins, _STFT_WINDOW, 0.0, 2595.0 / math.log(10.0), 700.0, in_hertz=True)


@cache
def mel_filters(
    mel_bins: int, fft: int, low_hz: float, scale: float, corner_hz: float, *, in_hertz: bool = False
) -> Tensor:
    """Compute triangular filters of height 1 between equal steps of the mel scale, up to 8 kHz.

    Args:
        mel_bins: F.
        fft: points of the spectrum.
        low_hz: lower end of the first triangle.
        scale: mel(f) = scale * ln(1 + f / corner_hz).
        corner_hz: see `scale`.
        in_hertz: the sides of a triangle are straight lines over hertz; False: over mel, as in Kaldi.

    Returns:
        (fft / 2 + 1, F) fp32.
    """

    def to_mel(hertz: Tensor) -> Tensor:
        return scale * torch.log1p(hertz / corner_hz)

    lines = torch.arange(fft // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE_HZ / fft)
    low, high = to_mel(torch.tensor([low_hz, SAMPLE_RATE_HZ / 2], dtype=torch.float64)).tolist()
    corners = torch.linspace(low, high, mel_bins + 2, dtype=torch.float64)
    at = lines if in_hertz else to_mel(lines)
    corners = corner_hz * torch.expm1(corners / scale) if in_hertz else corners
    rising = (at[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])  # (lines, F)
    falling = (corners[2:] - at[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()
