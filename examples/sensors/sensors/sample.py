"""A small labelled corpus that needs no network: ``python -m sensors.sample --output DIR``.

SYNTHETIC recordings, made to resemble EEG and no measurement of anybody. Sources of 1/f noise are mixed into channels
by a head of each subject's own. Short bursts of an oscillation come from one of three places in one of three bands, at
random times. The label is place and band. The exact frequency and strength of bursts differ from subject to subject,
and slow drifts and mains hum lie over everything. Band powers without any model tell three quarters of the recordings
apart: the corpus shows the path from files to features, and is no benchmark.

Written are ``SUBJECT/NUMBER.npy`` (C, S), ``manifest.tsv`` with label and subject, and the same options give the same
bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHANNELS = 8
SAMPLE_RATE_HZ = 128
SECONDS = 8.0
_BANDS = (6.0, 11.0, 20.0)
"""Middle of each band (Hz)."""
_PLACES = 3
_NOISE_SOURCES = 12
_BURSTS, _OTHER_BURSTS = 5, 3
"""Bursts of the labelled place and band in a recording, and of any."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sensors.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--subjects", type=int, default=8, metavar="N", help="people (%(default)s)")
    add("--recordings", type=int, default=90, metavar="N", help="recordings of each (%(default)s)")
    add("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    lines = ["path\tlabel\tsubject"]
    for number in range(options.subjects):
        name = f"subject{number:02d}"
        (options.output / name).mkdir(parents=True, exist_ok=True)
        subject = Subject(rng)
        for recording in range(options.recordings):
            place, band = divmod(recording % (_PLACES * len(_BANDS)), len(_BANDS))
            np.save(options.output / name / f"{recording:03d}.npy", subject.record(place, band, rng))
            lines.append(f"{name}/{recording:03d}.npy\tplace{place}-band{band}\t{name}")
    (options.output / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    count = options.subjects * options.recordings
    print(f"{options.output / 'manifest.tsv'}: {count:,} SYNTHETIC recordings of {SECONDS:g} s, {CHANNELS} channels")
    return 0


class Subject:
    """A head: how sources reach the channels, and how strong and fast its bursts are."""

    def __init__(self, rng: np.random.Generator) -> None:
        angles = 2 * np.pi * np.arange(CHANNELS) / CHANNELS + rng.normal(0, 0.1, CHANNELS)
        places = 2 * np.pi * np.arange(_PLACES) / _PLACES + rng.normal(0, 0.1, _PLACES)
        self._mixing = rng.normal(0, 1, (CHANNELS, _NOISE_SOURCES)) / np.sqrt(_NOISE_SOURCES)
        self._gains = np.exp(2 * (np.cos(angles[:, None] - places) - 1)) * rng.uniform(0.8, 1.2, _PLACES)
        self._bands = np.array(_BANDS) * rng.uniform(0.9, 1.1, len(_BANDS))
        self._hum = rng.uniform(0.1, 0.6, CHANNELS)

    def record(self, place: int, band: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """(C, S) in microvolts."""
        time = np.arange(int(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
        signal = self._mixing @ pink_noise(_NOISE_SOURCES, len(time), rng)  # (C, S)
        others = [(int(rng.integers(_PLACES)), int(rng.integers(len(_BANDS)))) for _ in range(_OTHER_BURSTS)]
        for where, which in [(place, band)] * _BURSTS + others:
            signal += np.outer(self._gains[:, where], self._burst(which, time, rng))
        signal += self._hum[:, None] * np.sin(2 * np.pi * 50 * time + rng.uniform(0, 2 * np.pi))
        drift = rng.normal(0, 1, (CHANNELS, 1)) * np.sin(2 * np.pi * time * rng.uniform(0.1, 0.3))
        recorded: NDArray[np.float32] = (20 * (signal + drift)).astype(np.float32)
        return recorded

    def _burst(self, band: int, time: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        length = rng.uniform(0.5, 1.0)
        since = time - rng.uniform(0, SECONDS - length)
        envelope = np.sin(np.pi * np.clip(since / length, 0, 1)) ** 2
        wave: NDArray[np.float64] = envelope * np.sin(2 * np.pi * self._bands[band] * since + rng.uniform(0, 2 * np.pi))
        return wave * rng.uniform(0.7, 1.3)


def pink_noise(count: int, length: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, length) noise of power 1 / f and unit variance."""
    spectrum = np.fft.rfft(rng.normal(size=(count, length)))
    spectrum /= np.sqrt(np.maximum(np.arange(spectrum.shape[1]), 1))
    noise: NDArray[np.float64] = np.fft.irfft(spectrum, length)
    return noise / noise.std(axis=1, keepdims=True)


if __name__ == "__main__":
    sys.exit(main())
