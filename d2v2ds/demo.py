"""Three minutes of pretraining on this machine: the whole path from recordings to a verdict, as `make demo` runs it.

    python -m d2v2ds.demo --runs DIR [--data FOLDER] [--ranks 2] [section.field=value ...]

Without --data a small synthetic corpus is spoken by espeak-ng; with it, your own recordings are used. Then: pack,
pretrain `audio_tiny` under the deepspeed launcher with ZeRO-3, draw the curves, and probe what was learned where
labels exist. Every step is the command a user would type, and is printed before it runs.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from d2v2ds.data.shards import ArrowShards
from d2v2ds.dist.comm import free_port
from d2v2ds.train.figures import save_curves
from d2v2ds.train.metrics import read_metrics

PACKING = ["--resample", "--min-seconds", "0.1", "--max-seconds", "20"]
JOINING = ["--join-seconds", "3", "6"]


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


def joins_clips(shards: ArrowShards) -> bool:
    """Whether most clips are too short to pretrain on and all have a speaker by whom to join them."""
    short = (shards.num_samples[:] < 3 * shards.sample_rate_hz).mean() > 0.5
    return bool(short) and all(shards.read_labels(i).speaker for i in range(len(shards)))


def demo(runs: Path, data: Path | None, ranks: int, overrides: list[str]) -> None:
    """Run all steps. A finished packing of the same data is kept, the run itself begins anew."""
    if data is None:
        corpus = runs / "corpus"
        python("preprocessing.sample_corpus", "--output", str(corpus))
        data = corpus / "manifest.tsv"
    key = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]  # packings of different data do not mix
    clips, joined, folder = runs / f"clips-{key}", runs / f"joined-{key}", runs / "run"
    shutil.rmtree(folder, ignore_errors=True)
    python("preprocessing.pack_audio", "--input", str(data), "--output", str(clips), *PACKING)
    source = clips
    if joins_clips(ArrowShards(clips)):
        python("preprocessing.pack_audio", "--input", str(data), "--output", str(joined), *PACKING, *JOINING)
        source = joined
    run(
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", "d2v2ds.pretrain", "--config", "audio_tiny", f"data.shards={source}", f"run.dir={folder}",
        *overrides,
    )  # fmt: skip
    records = read_metrics(folder / "metrics.jsonl")
    save_curves(
        records,
        ["loss/regression", "ema/decay", "target/effective_rank", "pred/std"],
        folder / "curves.png",
        f"audio_tiny, {int(records[-1]['step'])} steps, {records[-1]['data/hours']:.2f} hours of audio",
    )
    shards = ArrowShards(clips)
    rows = [shards.read_labels(i) for i in range(len(shards))]
    if len({row.speaker for row in rows if row.label and row.speaker}) > 1:
        python("d2v2ds.probe", str(folder), "--shards", str(clips), "--label", "label", "--leave-out", "speaker")
    else:
        print("\nno probe: the recordings have no labels and speakers (give a TSV manifest with these columns)")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"\nrun          {folder}\ncurves       {folder / 'curves.png'}")
    print(f"checkpoint   {folder / 'checkpoints' / (folder / 'checkpoints' / 'latest').read_text().strip()}")
    print(f"TensorBoard  {tensorboard} --logdir {folder / 'tensorboard'}")
    print(f"export       {sys.executable} -m d2v2ds.export {folder} --to model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--data", type=Path, help="folder of recordings or TSV manifest; synthetic voices if not given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for d2v2ds.pretrain")
    options = parser.parse_args(arguments)
    try:
        demo(options.runs, options.data, options.ranks, options.overrides)
    except StepFailedError as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
