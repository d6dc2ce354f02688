"""Recordings for the demonstration."""

from pathlib import Path

from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.demo import Prepared, key_of, pack, python


def joins_clips(shards: AudioShards) -> bool:
    """Return True if most clips are too short to pretrain on and all have a speaker to join them by."""
    short = (shards.sizes[:] < 3 * shards.sample_rate_hz).mean() > 0.5
    return bool(short) and all(shards.read_labels(i).speaker for i in range(len(shards)))


PACKING_AUDIO = ("--resample", "--min-seconds", "0.1", "--max-seconds", "20")
JOINING = ("--join-seconds", "3", "6")


def prepare(runs: Path, data: Path | None) -> Prepared:
    """Recordings: joined for pretraining where they are short, single for the probe."""
    if data is None:
        python("preprocessing.samples.speech", "--output", str(runs / "corpus"))
        data = runs / "corpus" / "manifest.tsv"
    clips = train = pack("audio", data, runs / f"clips-{key_of(data)}", *PACKING_AUDIO)
    shards = AudioShards(clips)
    if joins_clips(shards):
        train = pack("audio", data, runs / f"joined-{key_of(data)}", *PACKING_AUDIO, *JOINING)
    rows = [shards.read_labels(i) for i in range(len(shards))]
    labelled = len({row.speaker for row in rows if row.label and row.speaker}) > 1
    return Prepared(train, (), ("--shards", str(clips), "--leave-out", "speaker") if labelled else None)
