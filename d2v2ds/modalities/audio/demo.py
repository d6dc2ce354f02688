"""Recordings for the demonstration."""

import csv
from pathlib import Path

from d2v2ds.modalities.audio.shards import AudioShards
from d2v2ds.modalities.demo import FineTuning, Prepared, key_of, pack, python


def joins_clips(shards: AudioShards) -> bool:
    """Return True if most clips are too short to pretrain on and all have a speaker to join them by."""
    short = (shards.sizes[:] < 3 * shards.sample_rate_hz).mean() > 0.5
    return bool(short) and all(shards.read_labels(i).speaker for i in range(len(shards)))


PACKING_AUDIO = ("--resample", "--min-seconds", "0.1", "--max-seconds", "20")
JOINING = ("--join-seconds", "3", "6")
STEPS = 300
"""Steps of pretraining where a recogniser follows."""
FAST_ON_CPU = ("engine.deepspeed=zero0_fp32_debug", "engine.activation_checkpointing=false")
"""A model of this size gains nothing from shards, bf16 and recomputation: a step takes half the time without them."""
RECOGNISING = (
    "data.audio.max_seconds=8",
    "data.audio.global_batch_seconds=16",
    "data.audio.micro_batch_seconds=8",
    "objective.mask={}",
    "lr.peak=5e-4",
    *FAST_ON_CPU,
)


def prepare(runs: Path, data: Path | None) -> Prepared:
    """Recordings: joined for pretraining where they are short, single for the probe."""
    task = None
    if data is None:
        python("preprocessing.samples.speech", "--output", str(runs / "corpus"))
        data = runs / "corpus" / "manifest.tsv"
        task = recognise_digits(runs, data)
    clips = train = pack("audio", data, runs / f"clips-{key_of(data)}", *PACKING_AUDIO)
    shards = AudioShards(clips)
    if joins_clips(shards):
        train = pack("audio", data, runs / f"joined-{key_of(data)}", *PACKING_AUDIO, *JOINING)
    rows = [shards.read_labels(i) for i in range(len(shards))]
    labelled = len({row.speaker for row in rows if row.label and row.speaker}) > 1
    shorter = () if task is None else (f"run.total_steps={STEPS}", f"objective.ema.anneal_steps={STEPS}", *FAST_ON_CPU)
    return Prepared(train, shorter, ("--shards", str(clips), "--leave-out", "speaker") if labelled else None, task)


def recognise_digits(runs: Path, manifest: Path) -> FineTuning:
    """Strings of digits of the sample corpus, two of its voices left out."""
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["label"]]
    held_out = set(sorted({row["speaker"] for row in rows})[-2:])
    packed = {}
    for name, is_held_out in (("train", False), ("valid", True)):
        path = manifest.with_name(f"digits-{name}.tsv")
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if (row["speaker"] in held_out) == is_held_out)
        packed[name] = pack("audio", path, runs / f"digits-{name}", *PACKING_AUDIO, *JOINING)
    says = f"word error rate (%) of strings of digits by {' and '.join(sorted(held_out))}, who were left out"
    return FineTuning("finetune/ctc_tiny", packed["train"], packed["valid"], ("greedy", "wer"), says, RECOGNISING)
