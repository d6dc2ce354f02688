"""Classes of files are those of evaluation on the same files packed, for every modality."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v2ds.classify import main
from d2v2ds.modalities.known import open_shards
from d2v2ds.run.evaluation import labelled_reader, run_rows
from d2v2ds.run.labelling import describe, probabilities
from d2v2ds.run.task_model import load_task
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from preprocessing.pack_audio import main as pack_audio
from preprocessing.pack_images import main as pack_images
from preprocessing.pack_text import main as pack_text
from tests.data.fake_images import photo
from tests.inference.test_api import WORDS, small_tokenizer
from tests.run.test_evaluation import write

CLASSES = ("cat", "dog", "owl")


def probabilities_of_rows(model_folder: Path, packed: Path) -> dict[str, np.ndarray]:
    """Probabilities that evaluation computes, by the id of a row."""
    model, shards = load_task(model_folder), open_shards(packed)
    unread: list[str] = []
    rows = list(run_rows(model, labelled_reader(model, [packed]), torch.device("cpu"), unread))
    assert not unread
    return {shards.read_labels(row.row).id: probabilities(model.task, row.logits[None]).numpy() for row in rows}  # type: ignore[arg-type]


def found_in(output: Path) -> dict[str, dict[str, Any]]:
    return {one["file"]: one for one in map(json.loads, output.read_text().splitlines())}


def same(found: dict[str, Any], wanted: np.ndarray) -> None:
    by_class = {one["class"]: one["probability"] for one in found["top"]}
    assert [by_class[name] for name in CLASSES] == pytest.approx(wanted.tolist(), abs=2e-5)
    assert found["windows"] == 1


def test_pictures(tmp_path: Path) -> None:
    for number in range(9):
        folder = tmp_path / "pictures" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(30 + 7 * number, 24, number)).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    packed = tmp_path / "packed"
    assert pack_images(["--input", str(tmp_path / "pictures"), "--output", str(packed), "--workers", "1"]) == 0
    model = write(tmp_path / "model", ClassifyConfig(modality="image", classes=CLASSES, head=PatchHeadConfig()))
    output = tmp_path / "found.jsonl"
    assert main([str(model), str(tmp_path / "pictures"), "--output", str(output)]) == 0
    wanted, found = probabilities_of_rows(model, packed), found_in(output)
    assert len(found) == len(wanted) == 9
    for name, one in found.items():
        same(one, wanted[str(Path(name).relative_to(tmp_path / "pictures"))])


@pytest.mark.parametrize("kind", ["one", "several"])
def test_recordings(tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rng, lines = np.random.default_rng(0), ["path\tid\tlabel"]
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", 0.1 * rng.standard_normal(4000 + 2500 * number), 16000)
        lines.append(f"{number}.wav\t{number}.wav\t{CLASSES[number % 3]}")
    (tmp_path / "all.tsv").write_text("\n".join(lines) + "\n")
    packed = tmp_path / "packed"
    given = ["--input", str(tmp_path / "all.tsv"), "--output", str(packed), "--workers", "1", "--min-seconds", "0.1"]
    assert pack_audio(given) == 0
    config = ClassifyConfig(modality="audio", kind=kind, classes=CLASSES, head=FrameHeadConfig())
    model = write(tmp_path / "model", config)
    files = [str(path) for path in sorted(tmp_path.glob("*.wav"))]
    capsys.readouterr()
    assert main([str(model), *files]) == 0
    (tmp_path / "found").write_text(capsys.readouterr().out)
    wanted = probabilities_of_rows(model, packed)
    for name, one in found_in(tmp_path / "found").items():
        same(one, wanted[Path(name).name])
    # a long one: the mean over its windows
    assert main([str(model), files[3], "--window-seconds", "0.2", "--top", "1"]) == 0
    (one,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["windows"] > 3 and len(one["top"]) == 1


def test_lines_of_text(tmp_path: Path) -> None:
    texts = [" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(200)]
    lines = [" ".join(text.split()[: 1 + i % 3]) for i, text in enumerate(texts[:20])]
    rows = ["text\tlabel", *(f"{line}\t{CLASSES[i % 3]}" for i, line in enumerate(lines))]
    (tmp_path / "all.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "lines.txt").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer(texts))
    packed = tmp_path / "packed"
    given = ["--input", str(tmp_path / "all.tsv"), "--output", str(packed), "--workers", "1", "--one-row-per-document"]
    assert pack_text([*given, "--tokenizer", str(tmp_path / "tokenizer.model"), "--block-tokens", "24"]) == 0
    model = write(tmp_path / "model", ClassifyConfig(modality="text", classes=CLASSES, head=SentenceHeadConfig()))
    (model / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    values = json.loads((model / "config.json").read_text())
    values["preprocessing"]["text"] |= {"tokenizer": "sentencepiece", "file": "tokenizer.model"}
    (model / "config.json").write_text(json.dumps(values))
    output = tmp_path / "found.jsonl"
    assert main([str(model), str(tmp_path / "lines.txt"), "--output", str(output)]) == 0
    found, by_id = found_in(output), probabilities_of_rows(model, packed)
    ids = [open_shards(packed).read_labels(row).id for row in range(len(lines))]
    assert list(found) == [f"{tmp_path / 'lines.txt'}:{1 + 2 * i}" for i in range(20)]
    for one, row in zip(found.values(), ids, strict=True):
        same(one, by_id[row])
    (tmp_path / "lines.txt").write_text("\n\n".join(reversed(lines)) + "\n")
    assert main([str(model), str(tmp_path / "lines.txt"), "--output", str(output)]) == 0
    for one, row in zip(found_in(output).values(), reversed(ids), strict=True):
        same(one, by_id[row])  # the lines of a file that changed are done again
    (tmp_path / "long.txt").write_text(" ".join(texts[:3]))
    assert main([str(model), str(tmp_path / "long.txt"), "--output", str(tmp_path / "long.jsonl")]) == 0
    assert next(iter(found_in(tmp_path / "long.jsonl").values()))["windows"] > 2


def test_probabilities_are_means_over_windows() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 3.0]])
    one = ClassifyConfig(modality="image", classes=CLASSES).build(None, 0)  # type: ignore[arg-type]
    assert torch.allclose(probabilities(one, logits), logits.double().softmax(1).mean(0))
    several = replace(one.config, kind="several").build(None, 0)  # type: ignore[arg-type]
    assert torch.allclose(probabilities(several, logits), logits.double().sigmoid().mean(0))
    number = ClassifyConfig(modality="text", kind="number", scale=5.0).build(None, 0)  # type: ignore[arg-type]
    assert describe(number, torch.tensor([[0.5], [0.7]]), 3) == {"value": pytest.approx(3.0), "windows": 2}
