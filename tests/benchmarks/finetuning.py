"""Speed of fine-tuning and evaluation, as ratios within one run.

    python -m tests.benchmarks.finetuning [--step audio_base] [--evaluate audio_tiny] [--seconds 10] [--utterances 64]

Four lines: a fine-tuning step (forward and backward with the published CTC settings, no optimizer) against the
matrix-product peak of the same precision; `d2v2ds.evaluate` of a packed folder, decoding and intervals included,
against bare forwards of inputs that are in memory; greedy decoding and error counts as a share of the evaluation; beam
search with a 3-gram and a lexicon, in seconds of audio a second on one core. Audio is noise and weights are random;
logits of the two decoders are those of a transcript with noise, so that they have work to do.
"""

import argparse
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v2ds.batch import Batch, Labels, SpanMasks
from d2v2ds.config.load import load_config, to_dict
from d2v2ds.decoding.beam import BeamConfig, BeamDecoder
from d2v2ds.decoding.ngram import train_ngram
from d2v2ds.evals import recognition
from d2v2ds.interop.export_folder import Description, Kind
from d2v2ds.interop.export_write import write_config, write_tensors
from d2v2ds.masking import draw_span_masks
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.machine import matmul_peak_flops, tune_cpu
from d2v2ds.run.task_model import load_task
from d2v2ds.tasks.ctc import Ctc, CtcConfig, greedy
from d2v2ds.tasks.vocabulary import BLANK, Vocabulary
from preprocessing.pack_audio import main as pack_audio
from tests.benchmarks.packing_text import python_reference
from tests.interop.folders import published_preprocessing

RATE, FRAMES_A_SECOND = 16_000, 50
LETTERS = tuple("|etaoinsrhldcumwfgypbvk'xjqz")
FRAMES_A_LETTER = 3
"""Of read English: 14 letters a second."""
GOALS = {"step": 0.8, "evaluation": 0.9, "greedy": 0.02, "beam": 20.0}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", default="finetune/ctc_base_960h", help="configuration of the step")
    parser.add_argument("--evaluate", default="finetune/ctc_base_960h", help="network that is evaluated")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of an utterance")
    parser.add_argument("--utterances", type=int, default=24, help="of a step's batch and of the evaluated folder")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    options = parser.parse_args(arguments)
    tune_cpu(processes=1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            step(options.step, options.seconds, options.repeats),
            *evaluation(Path(folder), options.evaluate, options.utterances, options.seconds, options.repeats),
            beam(Path(folder), options.utterances, options.seconds),
        ]
    for name, value, said in rows:
        assert np.isfinite(value)
        sys.stdout.write(f"{name:11s} {value:8.3f}   goal {GOALS[name]:g}   {said}\n")
    return 0


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds, after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def step(name: str, seconds: float, repeats: int) -> tuple[str, float, str]:
    """Share of the peak that forward and backward of two utterances reach."""
    config = load_config(name)
    assert isinstance(config.objective, CtcConfig)
    task = config.objective.with_names(LETTERS).build(config.model, seed=0)
    network = task.build_network(activation_checkpointing=False)
    task.initialise(network, seed=0)
    samples, count = int(seconds * RATE), 2
    tokens = config.model.modalities["audio"].num_tokens(samples)
    width, lengths = config.model.block.width, np.full(count, tokens)
    drawn = draw_span_masks(config.objective.mask, lengths, width, seed=0, epoch=0, sample_ids=range(count))
    time_mask, channels = (None if mask is None else torch.from_numpy(mask) for mask in drawn)
    masks = SpanMasks(time=time_mask, channels=channels)
    letters = torch.randint(5, len(task.vocabulary), (count, int(seconds * FRAMES_A_SECOND / FRAMES_A_LETTER)))
    batch = Batch(
        modality="audio",
        source=torch.randn(count, samples),
        ids=torch.arange(count),
        span_masks=masks,
        labels=Labels(values=letters, lengths=torch.full((count,), letters.shape[1])),
    )

    def run() -> None:
        losses = task.losses(network, batch, config.objective.freeze_steps).sums
        assert torch.isfinite(losses["ctc"])
        (losses["ctc"] / count).backward()
        network.zero_grad()

    peak = matmul_peak_flops(torch.device("cpu"), torch.float32)
    elapsed = fastest(run, repeats)
    rate = task.flops("audio", count, samples) / elapsed
    peak = max(peak, matmul_peak_flops(torch.device("cpu"), torch.float32))
    return "step", rate / peak, f"{name}, fp32: {elapsed:.2f} s a step, {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s"


def evaluation(folder: Path, name: str, utterances: int, seconds: float, repeats: int) -> list[tuple[str, float, str]]:
    """Evaluation over bare forwards, and the share of decoding and scoring in it."""
    model, shards = folder / "model", recordings(folder, utterances, seconds)
    write_recogniser(model, name)
    options = EvaluationOptions(shards=(shards,), to=folder / "out", device="cpu")
    loaded = load_task(model)
    samples = int(seconds * RATE)

    def forward(batch_size: int) -> None:
        for first in range(0, utterances, batch_size):
            source = torch.randn(min(batch_size, utterances - first), samples)
            loaded.network(Batch(modality="audio", source=source, ids=torch.arange(len(source))))

    with torch.inference_mode():
        bare = {size: fastest(lambda size=size: forward(size), 1) for size in (1, 2, 4, 8)}
    loading = fastest(lambda: load_task(model), 1)
    whole = fastest(lambda: evaluate(model, options), repeats) - loading
    best = min(bare, key=bare.__getitem__)
    logits = spoken_logits(sentences()[:utterances], Vocabulary(LETTERS), seconds)
    task = loaded.task
    assert isinstance(task, Ctc)

    def decode() -> None:
        said = [" ".join(task.vocabulary.words(greedy(one[None], torch.tensor([len(one)]))[0])) for one, _ in logits]
        rows = [
            recognition.Utterance(str(i), wanted, found, None, seconds)
            for i, (found, (_, wanted)) in enumerate(zip(said, logits, strict=True))
        ]
        recognition.summarise(rows, draws=1000, seed=0)

    decoding = fastest(decode, repeats)
    amount = f"{whole:.2f} s for {utterances} utterances of {seconds:g} s"
    return [
        ("evaluation", bare[best] / whole, f"{name}: {amount}; bare forwards of {best}: {bare[best]:.2f} s"),
        ("greedy", decoding / whole, f"decoding, counts and intervals: {decoding:.3f} s of {whole:.2f} s"),
    ]


def beam(folder: Path, utterances: int, seconds: float) -> tuple[str, float, str]:
    """Seconds of audio that a beam of 50 searches in a second, on one core."""
    lines, vocabulary = sentences(), Vocabulary(LETTERS)
    train_ngram(lines, folder / "lm.arpa", order=3)
    decoder = BeamDecoder(vocabulary, folder / "lm.arpa", None, BeamConfig(beam=50))
    logits = spoken_logits(lines[:utterances], vocabulary, seconds)
    found: list[str] = []

    def search() -> None:
        found[:] = [" ".join(decoder(one.log_softmax(-1))[0].words) for one, _ in logits]

    elapsed = fastest(search, 1)
    pairs = zip(found, logits, strict=True)
    errors = recognition.count_errors(
        [recognition.Utterance("", want, text, None, seconds) for text, (_, want) in pairs]
    )
    words = len({word for line in lines for word in line.split()})
    rate = sum(len(one) for one, _ in logits) / FRAMES_A_SECOND / elapsed
    wer = errors.rate()
    return "beam", rate, f"beam 50, 3-gram of {words} words: {rate:.0f} x real time, word error rate {wer:.0f} %"


def sentences() -> list[str]:
    """English without punctuation, twelve words a line."""
    words = re.findall("[a-z']+", python_reference().lower())
    return [" ".join(words[i : i + 12]) for i in range(0, len(words) - 12, 12)]


def spoken_logits(lines: Sequence[str], vocabulary: Vocabulary, seconds: float) -> list[tuple[Tensor, str]]:
    """(T, V) logits that say a line, less what does not fit into `seconds`, with one letter in six misheard."""
    rng, frames = np.random.default_rng(0), int(seconds * FRAMES_A_SECOND)
    numbers = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
    found = []
    for line in itertools.islice(itertools.cycle(lines), len(lines)):
        kept = line[: frames // FRAMES_A_LETTER].rsplit(" ", 1)[0]
        logits: NDArray[np.float32] = rng.normal(0, 1, (frames, len(numbers))).astype(np.float32)
        logits[:, BLANK] += 5
        for place, letter in enumerate(kept.replace(" ", "|")):
            at = place * FRAMES_A_LETTER
            said = numbers[letter] if rng.random() > 1 / 6 else int(rng.integers(5, len(numbers)))
            logits[at, said] += 9
            logits[at, numbers[letter]] += 3
        found.append((torch.from_numpy(logits), kept))
    return found


def recordings(folder: Path, count: int, seconds: float) -> Path:
    """Packed noise with transcripts."""
    rng, lines = np.random.default_rng(0), ["path\ttext\tspeaker"]
    (folder / "wav").mkdir()
    for number, text in enumerate(sentences()[:count]):
        path = folder / "wav" / f"{number:04d}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * RATE)), RATE, subtype="PCM_16")
        lines.append(f"{path}\t{text}\ts{number % 4}")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    if pack_audio(["--input", str(folder / "all.tsv"), "--output", str(folder / "shards"), "--workers", "1"]) != 0:
        raise RuntimeError("packing the benchmark's inputs failed")
    return folder / "shards"


def write_recogniser(folder: Path, name: str) -> None:
    """An export of random weights."""
    config = load_config(name)
    assert isinstance(config.objective, CtcConfig)
    objective = config.objective.with_names(LETTERS)
    task = objective.build(config.model, seed=0)
    network = task.build_network(activation_checkpointing=False)
    task.initialise(network, seed=0)
    state = network.state_dict()
    folder.mkdir()
    parts: dict[Any, dict[str, Tensor]] = {
        "model": {name[6:]: value for name, value in state.items() if name.startswith("trunk.")},
        "objective": {name: value for name, value in state.items() if not name.startswith("trunk.")},
    }
    for part, tensors in parts.items():
        write_tensors(folder, part, {name: Kind.of(value) for name, value in tensors.items()}, tensors.items(), 10**9)
    settings: dict[str, Any] = {"objective": to_dict(objective), "preprocessing": published_preprocessing(task.trunk)}
    write_config(folder, Description(model=task.trunk, origin={}, **settings), {})


if __name__ == "__main__":
    sys.exit(main())
