"""Three minutes of pretraining on this machine: the whole path from raw data to a verdict, as `make demo` runs it.

    python -m d2v2ds.demo --runs DIR [--modality audio|image|text|joint] [--data FOLDER] [section.field=value ...]

Without --data a small corpus is made that needs no network: voices spoken by espeak-ng, digits of scikit-learn laid
over its photographs, the documentation of Python's standard library; with it, your own recordings, pictures or texts
are used. Then: pack, pretrain a tiny configuration under the deepspeed launcher with ZeRO-3, draw the curves, and probe
what was learned where labels exist. Every step is the command a user would type, and is printed before it runs.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2v2ds.data.shards import AudioShards, open_shards
from d2v2ds.distributed.comm import free_port
from d2v2ds.train.figures import save_curves
from d2v2ds.train.metrics import AMOUNTS, read_metrics


class StepFailedError(Exception):
    """A command of the demonstration ended with an error; the command has said why."""


def run(*command: str) -> None:
    """Print a command and run it with this interpreter's packages."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise StepFailedError(f"{shlex.join(command)}: exit code {done.returncode}")


def python(module: str, *arguments: str) -> None:
    """Run a module as a user would."""
    run(sys.executable, "-m", module, *arguments)


@dataclass(frozen=True)
class Prepared:
    """Packed data of one modality."""

    train: Path
    """Shards to pretrain on."""
    overrides: tuple[str, ...] = ()
    """What they ask of the model."""
    probe: tuple[str, ...] | None = None
    """Arguments of `d2v2ds.probe`; None where there are no labels to ask for."""


def pack(kind: str, source: Path, output: Path, *arguments: str) -> Path:
    """Pack one folder; a finished packing of the same data is kept."""
    python(f"preprocessing.pack_{kind}", "--input", str(source), "--output", str(output), *arguments)
    return output


def key_of(data: Path) -> str:
    """A name by which packings of different data do not mix."""
    return hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]


def joins_clips(shards: AudioShards) -> bool:
    """Whether most clips are too short to pretrain on and all have a speaker by whom to join them."""
    short = (shards.sizes[:] < 3 * shards.sample_rate_hz).mean() > 0.5
    return bool(short) and all(shards.read_labels(i).speaker for i in range(len(shards)))


PACKING_AUDIO = ("--resample", "--min-seconds", "0.1", "--max-seconds", "20")
JOINING = ("--join-seconds", "3", "6")


def prepare_audio(runs: Path, data: Path | None) -> Prepared:
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


def prepare_image(runs: Path, data: Path | None) -> Prepared:
    """Pictures: a folder with `train` and `valid` of class folders can be probed, any other only trained on."""
    if data is None:
        data = runs / "pictures"
        python("preprocessing.samples.images", "--output", str(data))
    if not (data / "train").is_dir() or not (data / "valid").is_dir():
        return Prepared(pack("images", data, runs / f"images-{key_of(data)}"))
    train, valid = (pack("images", data / part, runs / f"images-{part}-{key_of(data)}") for part in ("train", "valid"))
    return Prepared(train, (), ("--shards", str(train), "--test-shards", str(valid)))


BLOCKS = ("--block-tokens", "128")


def prepare_text(runs: Path, data: Path | None) -> Prepared:
    """Texts: a folder with labelled `train.jsonl` and `valid.jsonl` can be probed, any other only trained on."""
    if data is None:
        data = runs / "texts"
        python("preprocessing.samples.text", "--output", str(data))
    parts = [data / f"{part}.jsonl" for part in ("train", "valid")]
    labelled = all(part.is_file() for part in parts)
    blocks = pack(
        "text", parts[0] if labelled else data, runs / f"blocks-{key_of(data)}",
        "--train-tokenizer", "--vocab-size", "4000", *BLOCKS,
    )  # fmt: skip
    shards = open_shards(blocks)
    overrides = (f"model.modalities.text.vocab_size={shards.vocab_size}",)  # type: ignore[union-attr]
    if not labelled:
        return Prepared(blocks, overrides)
    tokenizer = str(shards.tokenizer_file)  # type: ignore[union-attr]
    train, valid = (
        pack(
            "text",
            part,
            runs / f"texts-{part.stem}-{key_of(data)}",
            "--tokenizer",
            tokenizer,
            *BLOCKS,
            "--one-row-per-document",
        )  # fmt: skip
        for part in parts
    )
    return Prepared(blocks, overrides, ("--shards", str(train), "--test-shards", str(valid), "--baseline"))


PREPARE: dict[str, Callable[[Path, Path | None], Prepared]] = {
    "audio": prepare_audio,
    "image": prepare_image,
    "text": prepare_text,
}
JOINT_STEPS = 200
"""Of the joint demonstration: a step sees all three modalities, so fewer of them take as long."""


def demo(runs: Path, modality: str, data: Path | None, ranks: int, overrides: list[str]) -> None:
    """Run all steps. A finished packing of the same data is kept, the run itself begins anew."""
    is_joint = modality == "joint"
    names = list(PREPARE) if is_joint else [modality]
    prepared = {name: PREPARE[name](runs, data) for name in names}
    config, folder = "multimodal_tiny" if is_joint else f"{modality}_tiny", runs / "run"
    arguments = [f"data.{name}.shards={found.train}" for name, found in prepared.items()]
    arguments += [override for found in prepared.values() for override in found.overrides]
    if is_joint:
        arguments += [f"run.total_steps={JOINT_STEPS}", f"ema.anneal_steps={JOINT_STEPS}", "lr.warmup_steps=20"]
    shutil.rmtree(folder, ignore_errors=True)
    run(
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", "d2v2ds.pretrain", "--config", config, *arguments, f"run.dir={folder}", *overrides,
    )  # fmt: skip
    draw(folder, config, names)
    for name, found in prepared.items():
        if found.probe is None:
            print(f'\nno probe of {name}: no labels to ask for (README, "Ten minutes on a CPU")')
        else:
            python("d2v2ds.probe", str(folder), "--label", "label", *found.probe)
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"\nrun          {folder}\ncurves       {folder / 'curves.png'}")
    print(f"checkpoint   {folder / 'checkpoints' / (folder / 'checkpoints' / 'latest').read_text().strip()}")
    print(f"TensorBoard  {tensorboard} --logdir {folder / 'tensorboard'}")
    print(f"export       {sys.executable} -m d2v2ds.export {folder} --to model")


def draw(folder: Path, config: str, modalities: list[str]) -> None:
    """The curves of a finished run, into `curves.png`."""
    records = read_metrics(folder / "metrics.jsonl")
    last = records[-1]
    prefixes = [f"{name}/" for name in modalities] if len(modalities) > 1 else [""]
    wanted = ("loss/regression", "target/effective_rank") if len(modalities) > 1 else (
        "loss/regression", "target/effective_rank", "pred/std"
    )  # fmt: skip
    seen = ", ".join(f"{last[name]:,.4g} {name.split('/')[1]}" for name, _, _ in AMOUNTS.values() if name in last)
    save_curves(
        records,
        [prefix + name for name in wanted for prefix in prefixes] + ["ema/decay"],
        folder / "curves.png",
        f"{config}, {int(last['step'])} steps, {seen}",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--modality", choices=[*PREPARE, "joint"], default="audio")
    parser.add_argument("--data", type=Path, help="your own data, as the packer takes it; a sample if not given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for d2v2ds.pretrain")
    options = parser.parse_args(arguments)
    if options.modality == "joint" and options.data is not None:
        parser.error("--data is of one modality; for a joint run on your own data pack each and start d2v2ds.pretrain")
    try:
        demo(options.runs, options.modality, options.data, options.ranks, options.overrides)
    except StepFailedError as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
