"""Evaluation of an export: the same numbers as one row at a time, counted rows, files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v2ds.batch import Batch
from d2v2ds.config.load import to_dict
from d2v2ds.errors import CheckpointError, ConfigError, ShardError
from d2v2ds.evaluate import main
from d2v2ds.interop.export_folder import Description, Kind
from d2v2ds.interop.export_write import write_config, write_tensors
from d2v2ds.modalities.known import open_shards
from d2v2ds.run.decoder_choice import DecoderChoice
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.task_model import load_task
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig, greedy
from d2v2ds.tasks.heads import PatchHeadConfig, SentenceHeadConfig
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.data.fake_images import photo
from tests.interop.folders import published_preprocessing, tiny_config
from tests.preprocessing.texts import sentencepiece_model

ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-99\t<s>\t-0.1
-1\t</s>
-2\t<unk>
-0.5\tab\t-0.1
-0.5\tb

\\2-grams:
-0.3\tab b

\\end\\
"""


def write(folder: Path, config: Any, seed: int = 5, preprocessing: dict[str, Any] | None = None) -> Path:
    """An export of random weights."""
    trunk = tiny_config(config.modality)
    if config.modality == "text":
        trunk = replace(trunk, modalities={"text": replace(trunk.modalities["text"], vocab_size=420, max_tokens=64)})
    if config.modality == "image":
        trunk = replace(trunk, modalities={"image": replace(trunk.modalities["image"], image_size=16, patch_size=8)})
    task = config.build(trunk, seed=0)
    network = task.build_network(activation_checkpointing=False)
    task.initialise(network, seed)
    with torch.no_grad():
        network.head.proj.weight *= 20
    state = network.state_dict()
    folder.mkdir()
    parts: dict[Any, dict[str, torch.Tensor]] = {
        "model": {name[6:]: value for name, value in state.items() if name.startswith("trunk.")},
        "objective": {name: value for name, value in state.items() if not name.startswith("trunk.")},
    }
    for part, tensors in parts.items():
        write_tensors(folder, part, {name: Kind.of(value) for name, value in tensors.items()}, tensors.items(), 10**9)
    described = published_preprocessing(task.trunk)
    described[config.modality] |= preprocessing or {}
    description = Description(model=task.trunk, objective=to_dict(config), preprocessing=described, origin={})
    write_config(folder, description, {})
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven recordings of different lengths, one of them without a transcript."""
    folder = tmp_path_factory.mktemp("sounds")
    rng, lines = np.random.default_rng(0), ["path\ttext\tspeaker"]
    for number in range(7):
        sound = 0.1 * rng.standard_normal(4000 + 1500 * number)
        soundfile.write(folder / f"{number}.wav", sound, 16000)
        lines.append(f"{number}.wav\t{'' if number == 3 else 'ab b'}\t{'xy'[number % 2]}")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    given = ["--input", str(folder / "all.tsv"), "--output", str(folder / "packed"), "--workers", "1"]
    assert pack_audio([*given, "--min-seconds", "0.1"]) == 0
    return folder / "packed"


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ctc") / "model", CtcConfig(modality="audio", vocabulary=("|", "a", "b")))


def test_a_padded_batch_is_scored_as_each_row_alone(recogniser: Path, recordings: Path, tmp_path: Path) -> None:
    options = EvaluationOptions(shards=(recordings,), to=tmp_path, max_unread=0.2, draws=50)
    result = evaluate(recogniser, options)
    assert (result["rows"], result["unread"]) == (6, 1)
    model, shards = load_task(recogniser), open_shards(recordings)
    wanted, found = [], []
    for row in range(7):
        label = shards.read_labels(row)
        if label.text is None:
            continue
        samples = torch.from_numpy(shards.read_audio(row).astype(np.float32))  # type: ignore[attr-defined]
        source = (samples - samples.mean()) / (samples.var(correction=0) + 1e-5 * 32768**2).sqrt()
        with torch.no_grad():
            out = model.network(Batch(modality="audio", source=source[None], ids=torch.tensor([row])))
        wanted.append(label.text)
        found.append(" ".join(model.task.vocabulary.words(greedy(out["logits"], out["frames"])[0])))
    assert any(found), "the model says something"
    assert result["greedy"]["wer"]["value"] == pytest.approx(100 * jiwer.wer(wanted, found))
    assert result["greedy"]["cer"]["value"] == pytest.approx(100 * jiwer.cer(wanted, found))
    low, high = result["greedy"]["wer"]["interval"]
    assert low <= result["greedy"]["wer"]["value"] <= high
    assert json.loads((tmp_path / "evaluation.json").read_text())["greedy"]["wer"] == result["greedy"]["wer"]
    assert len((tmp_path / "transcripts_greedy.tsv").read_text().splitlines()) == 7
    by_speaker = result["greedy"]["by_speaker"]
    assert sum(one["utterances"] for one in by_speaker.values()) == 6 and set(by_speaker) == {"x", "y"}


def test_a_language_model_forbids_other_words(recogniser: Path, recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    options = EvaluationOptions(
        shards=(recordings,),
        to=tmp_path / "out",
        max_unread=0.2,
        draws=20,
        decoder=DecoderChoice(lm=tmp_path / "lm.arpa"),
    )
    result = evaluate(recogniser, options)
    lines = (tmp_path / "out" / "transcripts_beam.tsv").read_text().splitlines()[1:]
    assert {word for line in lines for word in line.split("\t")[2].split()} <= {"ab", "b"}
    assert result["beam"]["settings"]["lm_weight"] == 2.0


def test_too_many_rows_without_label_are_an_error(recogniser: Path, recordings: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match="1 of 7 rows cannot be evaluated, at most 1% may.*expected a text, found none"
    ):
        evaluate(recogniser, EvaluationOptions(shards=(recordings,), to=tmp_path))


def test_an_encoder_cannot_be_evaluated(recordings: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CtcConfig(modality="audio", vocabulary=("|",)))
    values = json.loads((folder / "config.json").read_text())
    values["objective"] = None
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="expected a fine-tuned model.*d2v2ds.finetune makes one"):
        evaluate(folder, EvaluationOptions(shards=(recordings,), to=tmp_path / "out"))


def test_model_of_a_task_without_scores_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(task=SimpleNamespace(config=SimpleNamespace(name="length")))
    monkeypatch.setattr("d2v2ds.run.evaluation.load_task", lambda source, tag: other)
    with pytest.raises(ConfigError, match="model: expected a recogniser or a classifier, found length"):
        evaluate(tmp_path / "model", EvaluationOptions(shards=(tmp_path / "no shards",)))


def test_images_are_scored_by_their_middle(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "pictures" / ("cat", "dog", "owl")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(30 + number, 24, number)).save(folder / f"{number}.png")
    packed = tmp_path / "packed"
    assert pack_images(["--input", str(tmp_path / "pictures"), "--output", str(packed), "--workers", "1"]) == 0
    config = ClassifyConfig(modality="image", classes=("cat", "dog", "owl"), head=PatchHeadConfig())
    model = write(tmp_path / "model", config)
    result = evaluate(model, EvaluationOptions(shards=(packed,), draws=50))
    counts = np.array(result["confusion"])
    assert counts.sum() == 12
    assert result["scores"]["accuracy"]["value"] == pytest.approx(100 * counts.trace() / 12)
    assert (tmp_path / "model-evaluation" / "confusion.png").stat().st_size > 0
    with pytest.raises(ConfigError, match="only a recogniser reads a language model"):
        evaluate(model, EvaluationOptions(shards=(packed,), decoder=DecoderChoice(lm=tmp_path / "x.arpa")))


def test_pairs_of_sentences_are_scored_as_each_row_alone(tmp_path: Path) -> None:
    (tmp_path / "given.model").write_bytes(sentencepiece_model())
    lines = ["a\tb\tlabel", *(f"the {n} sea\tan old {'ship ' * n}\t{n % 2}" for n in range(9))]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    given = ["--input", str(tmp_path / "pairs.tsv"), "--workers", "1", "--block-tokens", "64"]
    given += ["--tokenizer", str(tmp_path / "given.model"), "--output"]
    assert pack_text([*given, str(tmp_path / "pairs"), "--pair-columns", "a", "b"]) == 0
    single = [str(tmp_path / "single"), "--one-row-per-document", "--text-field", "a"]
    assert pack_text([*given, *single]) == 0
    config = ClassifyConfig(modality="text", classes=("0", "1"), head=SentenceHeadConfig())
    model = write(tmp_path / "model", config, preprocessing={"sentences": 2})
    result = evaluate(model, EvaluationOptions(shards=(tmp_path / "pairs",), draws=20))
    loaded, shards, right = load_task(model), open_shards(tmp_path / "pairs"), 0
    for row in range(9):
        source = torch.from_numpy(shards.read_tokens(row).astype(np.int64))  # type: ignore[attr-defined]
        with torch.no_grad():
            out = loaded.network(Batch(modality="text", source=source[None], ids=torch.tensor([row])))
        right += int(out["logits"].argmax()) == row % 2
    assert result["rows"] == 9 and result["scores"]["accuracy"]["value"] == pytest.approx(100 * right / 9)
    with pytest.raises(ConfigError, match="single: expected pairs of sentences as in training, found single texts"):
        evaluate(model, EvaluationOptions(shards=(tmp_path / "single",), draws=20))
    other = write(tmp_path / "other", config, preprocessing={"sentences": 1})
    with pytest.raises(ConfigError, match="found pairs of sentences; pack without --pair-columns"):
        evaluate(other, EvaluationOptions(shards=(tmp_path / "pairs",), draws=20))
    odd = write(tmp_path / "odd", config, preprocessing={"sentences": [2]})
    with pytest.raises(ConfigError, match=r"sentences of the model's preprocessing is \[2\], expected 1 or 2"):
        evaluate(odd, EvaluationOptions(shards=(tmp_path / "pairs",), draws=20))
    silent = write(tmp_path / "silent", config)
    for name in ("pairs", "single"):
        assert evaluate(silent, EvaluationOptions(shards=(tmp_path / name,), draws=20))["rows"] == 9
    with pytest.raises(ConfigError, match="single: expected pairs of sentences as in training, found single texts"):
        evaluate(silent, EvaluationOptions(shards=(tmp_path / "pairs", tmp_path / "single"), draws=20))


def test_the_command_prints_a_table(
    recogniser: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recogniser), "--shards", str(recordings), "--to", str(tmp_path / "x")]) == 2, "a row has no label"
    shards = tmp_path / "none"
    assert main([str(recogniser), "--shards", str(shards)]) == 2
