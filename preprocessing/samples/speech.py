"""A small **synthetic** corpus, spoken by espeak-ng: ``python -m preprocessing.samples.speech --output DIR``.

For demonstrations and tests where no recordings are at hand; nothing learned from it says much about real speech.
Ten voices speak single digits (label: the digit) and short sentences, every take at its own rate, pitch and level.
Written are ``wav/*.wav`` (16 kHz, mono, 16 bit) and ``manifest.tsv`` (path, text, label, speaker), which
`preprocessing.pack_audio` takes as input. The same seed and length give the same bytes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from d2v2ds.errors import D2V2Error
from preprocessing.samples.espeak import Espeak

SAMPLE_RATE_HZ = 16000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_SHARE = 0.6
_SILENCE = 150
_MARGIN_SECONDS = 0.03
_NOISE_LEVEL = 4.0


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker."""

    name: str
    espeak: str
    """Accent and variant."""
    pitch: int
    """0 to 100."""
    rate: int
    """Words per minute."""


VOICES = (
    Voice(name="anna", espeak="en-us+f2", pitch=62, rate=165),
    Voice(name="bruce", espeak="en+m3", pitch=28, rate=150),
    Voice(name="callum", espeak="en-gb-scotland+m1", pitch=40, rate=175),
    Voice(name="dora", espeak="en-gb-x-rp+f4", pitch=55, rate=145),
    Voice(name="eli", espeak="en-us+m7", pitch=20, rate=185),
    Voice(name="flora", espeak="en-029+f5", pitch=70, rate=160),
    Voice(name="greg", espeak="en-gb-x-gbclan+m5", pitch=48, rate=155),
    Voice(name="hilda", espeak="en-gb-x-gbcwmd+f1", pitch=45, rate=170),
    Voice(name="ivan", espeak="en-us-nyc+m4", pitch=35, rate=190),
    Voice(name="jane", espeak="en-gb-scotland+f3", pitch=78, rate=180),
)

_SUBJECTS = ("the old sailor", "a quiet teacher", "my brother", "the red fox", "our neighbour", "the young baker",
             "a small child", "the captain", "her sister", "the farmer")  # fmt: skip
_VERBS = ("carried", "painted", "found", "watched", "repaired", "forgot", "sold", "remembered", "opened", "followed")
_OBJECTS = ("a wooden box", "the broken window", "seven yellow apples", "an empty boat", "the letter", "a silver key",
            "the heavy door", "two loaves of bread", "the map of the island", "a long story")  # fmt: skip
_PLACES = ("near the river", "before the storm", "in the market", "on a cold morning", "behind the church",
           "under the bridge", "after dinner", "by the harbour", "across the field", "without a word")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Take:
    """One file to be spoken."""

    path: str
    text: str
    label: str
    voice: Voice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.samples.speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M", help="audio to speak (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of texts, rates and pitches (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        files, seconds = speak_corpus(options.output, options.minutes, options.seed)
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.output / 'manifest.tsv'}: {files:,} files, {seconds / 60:.1f} minutes of SYNTHETIC speech "
        f"(espeak-ng, {len(VOICES)} voices), not recordings of people"
    )
    return 0


def speak_corpus(output: Path, minutes: float, seed: int) -> tuple[int, float]:
    """Write the corpus; returns the number of files and the seconds of audio.

    Raises:
        MissingExtraError: if espeakng-loader is not installed.
    """
    (output / "wav").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = ["path\ttext\tlabel\tspeaker"]
    seconds = 0.0
    with Espeak() as espeak:
        for takes, share in ((_digit_takes(), _DIGIT_SHARE), (_sentence_takes(rng), 1.0)):
            for take in takes:
                if seconds >= share * minutes * 60 and take.voice is VOICES[0]:  # every voice says equally much
                    break
                samples = speak(espeak, take, rng)
                soundfile.write(output / take.path, samples, SAMPLE_RATE_HZ, subtype="PCM_16")
                lines.append(f"{take.path}\t{take.text}\t{take.label}\t{take.voice.name}")
                seconds += len(samples) / SAMPLE_RATE_HZ
    (output / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines) - 1, seconds


def speak(espeak: Espeak, take: Take, rng: np.random.Generator) -> NDArray[np.int16]:
    """(S,) int16 at 16 kHz: one take, its rate, pitch, melody, level and a faint noise drawn from `rng`."""
    voice = take.voice
    spoken = espeak.say(
        take.text,
        voice.espeak,
        seed=int(rng.integers(1 << 31)),
        rate=round(voice.rate * rng.uniform(0.8, 1.25)),
        pitch=int(np.clip(voice.pitch + rng.integers(-8, 9), 0, 99)),
        pitch_range=int(rng.integers(30, 71)),
    )
    samples = soxr.resample(spoken.astype(np.float32), espeak.sample_rate_hz, SAMPLE_RATE_HZ)
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    margin = int(_MARGIN_SECONDS * SAMPLE_RATE_HZ)
    samples = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    samples = samples * rng.uniform(0.3, 0.9) + rng.normal(0.0, _NOISE_LEVEL, len(samples))
    stored: NDArray[np.int16] = np.clip(np.rint(samples), -32768, 32767).astype(np.int16)
    return stored


def _digit_takes() -> Iterator[Take]:
    """Every digit by every voice, again and again."""
    number = 0
    while True:
        for digit, word in enumerate(DIGITS):
            for voice in VOICES:
                path = f"wav/digit-{digit}-{voice.name}-{number:03d}.wav"
                yield Take(path=path, text=word, label=str(digit), voice=voice)
        number += 1


def _sentence_takes(rng: np.random.Generator) -> Iterator[Take]:
    number = 0
    while True:
        for voice in VOICES:
            words = [str(rng.choice(part)) for part in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)]
            yield Take(path=f"wav/sentence-{voice.name}-{number:03d}.wav", text=" ".join(words), label="", voice=voice)
        number += 1


if __name__ == "__main__":
    sys.exit(main())
