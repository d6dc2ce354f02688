"""Flip bytes of every file of packed folders, a run and an export, one at a time, and use each damaged copy.

    python -m tests.hostile.sweep            every byte (`make hostile`)
    python -m tests.hostile.sweep --each 20  twenty positions of each file, as CI does

Four outcomes are right: the result of the whole files, the checkpoint before, one of the project's errors that names
the file or its folder, and a report of damage. Anything else is a fault: another result, an exception of another kind,
more than `LIMIT_S` seconds or `LIMIT_BYTES` more memory, a file written or deleted outside.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from d2v2ds.errors import D2V2Error
from d2v2ds.io.lock import FolderLock

LIMIT_S = 5
LIMIT_BYTES = 1 << 30
MASKS = (0xFF, 0x01)
"""What a byte is changed by; the first for odd positions, the second for even ones."""

Use = Callable[[Path], str]
"""Uses a folder and returns a digest of what it read, or text that begins with "damage"."""


class SlowError(Exception):
    """A use took longer than `LIMIT_S`."""


@dataclass
class Outcome:
    """Counts of one sweep."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.counts += other.counts
        self.faults += other.faults

    def __str__(self) -> str:
        names = ("right", "before", "error", "damage reported", "fault")
        return ", ".join(f"{self.counts[name]:,} {name}" for name in names)


def sweep(folder: Path, uses: dict[str, Use], each: int | None, acceptable: dict[str, set[str]]) -> Outcome:
    """Damage every file of a folder and use it.

    Args:
        folder: changed in place and restored.
        uses: by name.
        each: positions of each file, spread over it; None for all.
        acceptable: other results of a use that are right, such as the checkpoint before.
    """
    outcome = Outcome()
    whole = {name: _result(use, folder) for name, use in uses.items()}
    for name, (kind, result) in whole.items():
        if kind != "result":
            raise AssertionError(f"{name} fails on whole files: {result}")
    before = listing(folder.parent)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for position in tqdm(positions(len(content), each), file.name, leave=False, disable=None):
            damaged = bytearray(content)
            damaged[position] ^= MASKS[position % 2]
            file.write_bytes(damaged)
            for name, use in uses.items():
                kind, result = _result(use, folder)
                verdict = _verdict(kind, result, whole[name][1], acceptable.get(name, set()), file, folder)
                outcome.counts[verdict] += 1
                if verdict == "fault":
                    outcome.faults.append(f"{file.relative_to(folder)} byte {position}: {name}: {result}")
        file.write_bytes(content)
    if listing(folder.parent) != before:
        outcome.counts["fault"] += 1
        outcome.faults.append(f"{folder}: files were written or deleted")
    return outcome


def positions(size: int, each: int | None) -> list[int]:
    """All positions of a file, or the first, the last and some between."""
    if each is None or size <= each:
        return list(range(size))
    drawn = random.Random(size).sample(range(size), each)
    return sorted({0, size - 1, *drawn[2:]})


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def _verdict(kind: str, result: str, whole: str, acceptable: set[str], file: Path, folder: Path) -> str:
    if kind == "result":
        if result == whole:
            return "right"
        if result.startswith("damage"):
            return "damage reported"
        return "before" if result in acceptable else "fault"
    is_named = file.name in result or str(folder) in result
    return "error" if kind == "error" and is_named else "fault"


def _result(use: Use, folder: Path) -> tuple[str, str]:
    """Use a folder; returns "result", "error" or "fault", and the digest or the message."""

    def too_slow(number: int, frame: FrameType | None) -> None:
        raise SlowError(f"more than {LIMIT_S} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = "result", use(folder)
    except D2V2Error as error:
        found = "error", str(error)
    except (Exception, SystemExit):  # noqa: BLE001  (that none of another kind comes is what is tested)
        found = "fault", traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found if grown < LIMIT_BYTES else ("fault", f"{grown >> 20} MiB of memory")


# ------------------------------------------------------------------ packed folders


def make_packed(folder: Path) -> dict[str, Path]:
    """Pack a few rows of each shipped modality."""
    from preprocessing.pack_audio import main as pack_audio
    from preprocessing.pack_images import main as pack_images
    from preprocessing.pack_text import main as pack_text
    from tests.preprocessing.pictures import class_folders
    from tests.preprocessing.texts import sentencepiece_model, write_stories

    raw = folder / "raw"
    (raw / "audio").mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).normal(0, 900, 1600 + 160 * number).astype(np.int16)
        soundfile.write(raw / "audio" / f"{number}.wav", noise, 16000)
    class_folders(raw / "image", count=3)
    write_stories(raw / "text", files=1, paragraphs=4)
    (raw / "spm.model").write_bytes(sentencepiece_model())
    common = ["--workers", "1"]
    made = {name: folder / f"packed-{name}" / name for name in ("audio", "image", "text")}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for main, name, extra in (
            (pack_audio, "audio", ["--min-seconds", "0.05"]),
            (pack_images, "image", []),
            (pack_text, "text", ["--tokenizer", str(raw / "spm.model")]),
        ):
            code = main(["--input", str(raw / name), "--output", str(made[name]), *common, *extra])
            assert code == 0, f"packing {name} ended with {code}"
    return made


def read_packed(folder: Path) -> str:
    """Read every row and its annotations."""
    from preprocessing.formats import open_shards

    shards = open_shards(folder)
    name = shards.layout.name
    digest = hashlib.sha256(repr((len(shards), name, shards.sizes.tolist())).encode())
    for row in range(len(shards)):
        digest.update(repr(shards.read_labels(row)).encode())
        if name == "audio":
            digest.update(shards.read_audio(row).tobytes() + repr(shards.read_stats(row)).encode())
        elif name == "image":
            image = shards.read_image(row)
            digest.update(bytes(image.data) + repr((image.width, image.height, image.orientation)).encode())
        else:
            digest.update(shards.read_tokens(row).tobytes())
    return digest.hexdigest()


def verify_packed(folder: Path) -> str:
    """Run `preprocessing.verify`."""
    from preprocessing.verify import main

    code = main([str(folder), "--workers", "1"])
    if code not in (0, 1, 2, 3, 4):
        raise AssertionError(f"exit code {code}")
    return "whole" if code == 0 else "damage"


# ------------------------------------------------------------------ runs and exports

TINY = [
    "model.block.width=4", "model.block.num_heads=1", "model.shared_depth=2", "model.modalities.audio.prenet_depth=0",
    "model.modalities.audio.conv_layers=[[4,10,5],[4,8,8],[4,4,4],[4,2,2]]",
    "objective.modalities.audio.decoder.width=4",
    "model.modalities.audio.position_groups=4", "model.modalities.audio.position_depth=1",
    "objective.modalities.audio.decoder.depth=1", "objective.modalities.audio.decoder.groups=4",
    "objective.modalities.audio.target.num_layers=1", "data.audio.global_batch_seconds=2",
    "data.audio.micro_batch_seconds=2", "data.audio.max_seconds=2", "run.total_steps=4", "run.save_every_steps=2",
    "run.log_every_steps=1", "run.health_every_steps=4", "lr.warmup_steps=2", "objective.ema.anneal_steps=4",
    "engine.deepspeed=zero0_fp32_debug", "data.num_workers=0", "run.async_checkpoints=false",
]  # fmt: skip


def arguments_of(shards: Path, run_dir: Path) -> list[str]:
    return [f"data.shards={shards}", f"run.dir={run_dir}", *TINY]


def report_run(folder: Path) -> str:
    """List and verify the checkpoints, and read every record beside them."""
    from d2v2ds.checkpoints import main
    from d2v2ds.run.provenance import count_starts
    from d2v2ds.run.restart import newest_checkpoint, read_attempts
    from d2v2ds.train.metrics import read_metrics

    codes = [main(["list", str(folder)]), main(["verify", str(folder)])]
    if not set(codes) <= {0, 2, 5}:
        raise AssertionError(f"exit codes {codes}")
    list(read_metrics(folder / "metrics.jsonl"))
    read_attempts(folder)
    newest_checkpoint(folder)
    count_starts(folder)
    return "whole" if codes == [0, 0] else "damage"


def read_weights(folder: Path) -> str:
    """Read the student's trunk and the averaged one of the newest checkpoint, as an export does."""
    from d2v2ds.run.folder import checkpoint_folder, run_config, trunk_config, trunk_tensors

    run_config(folder)
    checkpoint = checkpoint_folder(folder)
    digest = hashlib.sha256(repr(trunk_config(checkpoint)).encode())
    for teacher in (False, True):
        for name, tensor in trunk_tensors(checkpoint, teacher=teacher):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def read_export(folder: Path) -> str:
    """Load an exported model."""
    from d2v2ds import load_model

    model = load_model(folder)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Resuming:
    """Resumes one engine from a folder again and again."""

    def __init__(self, shards: Path, run_dir: Path) -> None:
        from d2v2ds.run.prepare import prepare
        from d2v2ds.run.pretraining import start

        prepared = prepare("audio_tiny", arguments_of(shards, run_dir), world=1)
        self.checkpoints = start(prepared, "audio_tiny", False, FolderLock(run_dir / "lock"))

    def __call__(self, folder: Path) -> str:
        """Resume, and return a digest of weights, moments, average and step."""
        from d2v2ds.distributed import zero

        self.checkpoints.resume()
        engine, teacher = self.checkpoints.student, self.checkpoints.teacher
        digest = hashlib.sha256(repr((self.checkpoints.progress, engine.global_steps)).encode())
        tensors = [shard.data for shard in zero.parameter_shards(engine).values()]
        tensors += [shard.data for shard in teacher.shards().values()]
        for key in zero.optimizer_layout(engine)[0]:
            tensors += zero.optimizer_tensors(engine, key).values()
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def make_run(shards: Path, run_dir: Path) -> None:
    """Train four steps with two checkpoints; in a process group of one."""
    from d2v2ds.run.build import loop_config  # noqa: F401  (imported before the clock of a use runs)
    from d2v2ds.run.preempt import StopRequest
    from d2v2ds.run.prepare import prepare
    from d2v2ds.run.pretraining import start, train

    prepared = prepare("audio_tiny", arguments_of(shards, run_dir), world=1)
    with StopRequest() as stop:
        train(prepared, start(prepared, "audio_tiny", False, FolderLock(run_dir / "lock")), stop)


def sweep_runs(work: Path, each: int | None) -> Outcome:
    """Sweep a run's folder and its export. Runs in a process of its own, which gets a process group."""
    from d2v2ds.distributed import comm
    from d2v2ds.run.export import export
    from tests.runs.launching import pack_clips

    logging.getLogger().setLevel(logging.CRITICAL)
    shards, run_dir = pack_clips(work / "clips"), work / "runs" / "run"
    outcome = Outcome()
    with comm.process_group():
        make_run(shards, run_dir)
        (run_dir / "attempts.jsonl").write_text(json.dumps({"time": "", "job": 1}) + "\n")
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        export(run_dir, work / "exports" / "model", teacher=True)
        resume = Resuming(shards, run_dir)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
        uses = {"report": report_run, "read weights": read_weights, "resume": resume}
        newest = run_dir / "checkpoints" / "step00000004"
        hidden = newest.rename(work / "hidden")
        before = {name: {_result(use, run_dir)[1]} for name, use in uses.items() if name != "report"}
        hidden.rename(newest)
        outcome.add(sweep(run_dir, uses, each, before))
    outcome.add(sweep(work / "exports" / "model", {"load": read_export}, each, {}))
    return outcome


def sweep_packed(work: Path, each: int | None) -> Outcome:
    """Sweep a packed folder of each modality."""
    outcome = Outcome()
    for folder in make_packed(work).values():
        outcome.add(sweep(folder, {"read": read_packed, "verify": verify_packed}, each, {}))
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Sweep everything; returns 1 after any fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--each", type=int, help="positions of each file; all without it")
    parser.add_argument("--only", choices=("packed", "runs"), help="half of it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    total = Outcome()
    with tempfile.TemporaryDirectory() as name:
        for title, part in (("packed", sweep_packed), ("runs", sweep_runs)):
            if options.only in (None, title):
                (Path(name) / title).mkdir()
                outcome = part(Path(name) / title, options.each)
                print(f"{title}: {outcome}", flush=True)
                total.add(outcome)
    for fault in total.faults:
        print(fault)
    print(f"all: {sum(total.counts.values()):,} uses; {total}")
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
