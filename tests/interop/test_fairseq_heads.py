"""Official fine-tuned files with their heads: in, evaluated, and out again; what does not fit is refused by name."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v2ds.batch import Batch
from d2v2ds.errors import ConfigError
from d2v2ds.interop.export_folder import ModelFolder
from d2v2ds.interop.fairseq.__main__ import main
from d2v2ds.interop.fairseq.heads import official_task
from d2v2ds.interop.fairseq.official_fields import UnsupportedOptionError
from d2v2ds.interop.fairseq.torch_file import read_pickled
from d2v2ds.interop.output_names import read_outputs
from d2v2ds.run.evaluation import EvaluationOptions, evaluate
from d2v2ds.run.outputs import write_outputs
from d2v2ds.run.task_model import load_task
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from tests.interop.official_files import save
from tests.interop.test_fairseq_layout import assert_same_tensors
from tests.run.test_evaluation import recordings, write

__all__ = ["recordings"]

MICRO = Path(__file__).parents[1] / "golden" / "finetuning"
LETTERS, IMAGES, TEXTS, SOUNDS = "ctc_infeasible", "image_eval", "text_single_eval_mcc", "audiocls_average_sigmoid_eval"
MODELS = {
    LETTERS: ("wav2vec_ctc", "w2v_args"),
    IMAGES: ("mae_image_classification", "pretrained_model_args"),
    TEXTS: ("data2vec_text_classification", "d2v_args"),
    SOUNDS: ("audio_classification", "w2v_args"),
}
"""Official name of the model, and option with the configuration of its encoder."""


def content_of(name: str, folder: Path = MICRO) -> dict[str, Any]:
    """A golden case as the official trainer would have saved it."""
    meta = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    weights = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    model, arguments = MODELS.get(name, MODELS[LETTERS])
    options = {arguments: {"model": meta["pretrained_model"], "task": {"a": 1}}}
    return {"args": None, "cfg": {"model": {"_name": model, **options, **meta["finetune"]}}, "model": weights}


def names_of(name: str, path: Path, folder: Path = MICRO) -> Path:
    """A file with the letters or classes of a golden case."""
    meta = json.loads((folder / f"{name}.json").read_text())
    if "dictionary" in meta:
        path.write_text("".join(f"{letter} {1000 - i}\n" for i, letter in enumerate(meta["dictionary"][4:])))
    else:
        count = meta["finetune"].get("num_classes") or meta["num_classes"]
        path.write_text("".join(f"class {chr(97 + i)}\n" for i in range(count)))
    return path


def imported(content: dict[str, Any], folder: Path, *words: str) -> int:
    """Save and import; returns the exit code."""
    file = save(folder.with_suffix(".pt"), content)
    return main(["import", str(file), "--out", str(folder), *words])


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_a_model_of_its_task_and_comes_back_unchanged(name: str, tmp_path: Path) -> None:
    content = content_of(name)
    halves = {key: value.half() for key, value in content["model"].items()}
    folder, back = tmp_path / "folder", tmp_path / "back.pt"
    given = str(names_of(name, tmp_path / "dict.txt"))
    assert imported(content | {"model": halves}, folder, "--outputs", given) == 0
    assert load_task(folder).task.config.names == read_outputs(tmp_path / "dict.txt")
    assert main(["export", str(folder), "--out", str(back)]) == 0
    found = read_pickled(back)
    assert_same_tensors(found["model"], halves)
    model, arguments = MODELS[name]
    assert found["cfg"]["model"]["_name"] == model
    assert found["cfg"]["model"][arguments]["model"] == content["cfg"]["model"][arguments]["model"]
    again = tmp_path / "again"
    assert main(["import", str(back), "--out", str(again)]) == 0, "its own file carries the names"
    assert ModelFolder(again).description.objective == ModelFolder(folder).description.objective
    for part in ("model", "objective"):
        assert_same_tensors(dict(ModelFolder(again).tensors(part)), dict(ModelFolder(folder).tensors(part)))


RECORDED = [(MICRO, name) for name in (IMAGES, TEXTS, SOUNDS)]
if "D2V2_REFERENCE" in os.environ:  # the larger golden vectors do not travel with the project
    RECORDED.append((Path(os.environ["D2V2_REFERENCE"]) / "golden-finetune", "ctc_eval"))


@pytest.mark.parametrize(("folder", "name"), RECORDED, ids=[name for _, name in RECORDED])
def test_an_imported_model_computes_the_recorded_logits(folder: Path, name: str, tmp_path: Path) -> None:
    given = str(names_of(name, tmp_path / "dict.txt", folder))
    assert imported(content_of(name, folder), tmp_path / "folder", "--outputs", given) == 0
    model, tensors = load_task(tmp_path / "folder"), load_file(folder / f"{name}.safetensors")
    network: Any = model.network
    network.hide_padding = False  # as the official code, which was recorded
    if isinstance(network.head, torch.nn.Module) and hasattr(network.head, "pool_padding"):
        network.head.pool_padding = True
    padding = tensors.get("in/padding_mask")
    source = tensors["in/imgs" if "in/imgs" in tensors else "in/source"]
    batch = Batch(
        modality=model.modality,
        source=source,
        ids=torch.arange(len(source)),
        padding=None if padding is None else padding.bool(),
    )
    with torch.no_grad():
        logits = network(batch)["logits"]
    if name == SOUNDS:
        logits, wanted = logits.sigmoid(), tensors["out/probabilities"]
    else:
        wanted = tensors["out/logits" if name != "ctc_eval" else "out/logits_before_padding"]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


OWN = {
    "w2v_encoder.": CtcConfig(modality="audio", vocabulary=("|", "a", "b"), hide_padding=False),
    "head.": ClassifyConfig(modality="image", classes=("cat", "dog"), head=PatchHeadConfig(pooling="cls")),
    "classification_heads.": ClassifyConfig(
        modality="text", kind="number", scale=5.0, head=SentenceHeadConfig(dropout=0.1)
    ),
    "proj.": ClassifyConfig(
        modality="audio", kind="several", classes=("x", "y", "z"), head=FrameHeadConfig(pooling="mean")
    ),
}
"""Beginning of the official name of the head -> task."""


@pytest.mark.parametrize("beginning", OWN)
def test_a_model_of_ours_comes_back_from_the_official_layout_bit_for_bit(beginning: str, tmp_path: Path) -> None:
    config = OWN[beginning]
    folder, again = write(tmp_path / "own", config), tmp_path / "again"
    assert main(["export", str(folder), "--out", str(tmp_path / "x.pt")]) == 0
    weights = read_pickled(tmp_path / "x.pt")["model"]
    assert any(name.startswith(beginning) for name in weights)
    assert main(["import", str(tmp_path / "x.pt"), "--out", str(again)]) == 0
    assert load_task(again).task.config == config
    for part in ("model", "objective"):
        assert_same_tensors(dict(ModelFolder(again).tensors(part)), dict(ModelFolder(folder).tensors(part)))
    assert ModelFolder(again).description.model == ModelFolder(folder).description.model


@pytest.mark.parametrize("name", MODELS)
def test_our_official_files_have_the_recorded_names(name: str, tmp_path: Path) -> None:
    """Names with their layer numbers left out: the golden networks are of other depths."""

    def kinds(weights: dict[str, Any]) -> dict[str, int]:
        return {".".join("N" if part.isdigit() else part for part in key.split(".")): one.ndim
                for key, one in weights.items()}  # fmt: skip

    beginning = dict(zip(MODELS, OWN, strict=True))[name]
    write(tmp_path / "own", OWN[beginning])
    assert main(["export", str(tmp_path / "own"), "--out", str(tmp_path / "x.pt")]) == 0
    found, recorded = kinds(read_pickled(tmp_path / "x.pt")["model"]), kinds(content_of(name)["model"])
    own = ".modality_encoders."  # of other settings; `test_fairseq_layout.py` compares published networks
    shared = [{key: ndim for key, ndim in layout.items() if own not in key} for layout in (found, recorded)]
    assert shared[0] == shared[1]
    assert {key.split(own)[0] for key in found if own in key} == {key.split(own)[0] for key in recorded if own in key}


def test_an_imported_recogniser_is_evaluated_as_the_model_that_it_was(recordings: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own", CtcConfig(modality="audio", vocabulary=("|", "a", "b")))
    assert main(["export", str(own), "--out", str(tmp_path / "x.pt")]) == 0
    assert main(["import", str(tmp_path / "x.pt"), "--out", str(tmp_path / "again")]) == 0
    results = [
        evaluate(folder, EvaluationOptions(shards=(recordings,), to=tmp_path / "to", max_unread=0.2, draws=10))
        for folder in (own, tmp_path / "again")
    ]
    assert results[0]["greedy"]["worst"] == results[1]["greedy"]["worst"]
    assert results[0]["greedy"]["wer"] == results[1]["greedy"]["wer"]


def test_letters_of_the_file_itself_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = json.loads((MICRO / f"{LETTERS}.json").read_text())
    module = types.ModuleType("fairseq_like")
    module.Dictionary = type("Dictionary", (), {"__module__": "fairseq_like"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fairseq_like", module)
    dictionary = module.Dictionary()
    dictionary.__dict__ |= {"symbols": meta["dictionary"], "count": [1] * len(meta["dictionary"])}
    content = content_of(LETTERS) | {"task_state": {"target_dictionary": dictionary}}
    assert imported(content, tmp_path / "folder") == 0
    assert load_task(tmp_path / "folder").task.config.names == tuple(meta["dictionary"][4:])


HEAD = "w2v_encoder.proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "options", "said"),
    [
        (LETTERS, {}, {}, "expected the letters of its 13 outputs, found none in the file; give its dict.ltr.txt"),
        (LETTERS, {HEAD: None}, {}, f"{HEAD}: expected (outputs, 32), as the head of wav2vec_ctc has it, found none"),
        (LETTERS, {"w2v_encoder.gain": torch.ones(3)}, {"given": 9}, "w2v_encoder.gain: unknown to this head"),
        (LETTERS, {"w2v_encoder.proj.bias": None}, {"given": 9}, "w2v_encoder.proj.bias: expected (13,), found none"),
        (LETTERS, {}, {"given": 7}, "has 13 outputs, 7 letters and 4 special symbols make 11"),
        (IMAGES, {}, {"given": 3}, "has 7 outputs, found 3 classes"),
        (IMAGES, {"fc_norm.weight": None}, {}, "fc_norm.weight: expected (48,), found none"),
        (IMAGES, {"head.bias": torch.ones(8)}, {}, "head.bias: expected (7,), found (8,)"),
        (IMAGES, {}, {"prediction_mode": "LIN_SOFTMAX"}, "prediction_mode='LIN_SOFTMAX'"),
        (SOUNDS, {}, {"prediction_mode": ["cls"]}, "prediction_mode=['cls']"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_before_anything_is_written(
    name: str, change: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = content_of(name)
    weights = {key: value for key, value in (content["model"] | change).items() if value is not None}
    content["cfg"]["model"] |= {key: value for key, value in options.items() if key != "given"}
    words = []
    if "given" in options:
        (tmp_path / "names.txt").write_text("\n".join("abcdefghijkl"[: options["given"]]))
        words = ["--outputs", str(tmp_path / "names.txt")]
    assert imported(content | {"model": weights}, tmp_path / "folder", *words) == 2
    error = capsys.readouterr().err
    assert said in error and f"{tmp_path / 'folder.pt'}: " in error
    assert not (tmp_path / "folder").exists()


def test_an_encoder_comes_without_its_head_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = content_of(LETTERS)
    assert imported(content, tmp_path / "folder", "--encoder-only") == 0
    assert "WARNING: left out: w2v_encoder.proj." in capsys.readouterr().out
    assert not ModelFolder(tmp_path / "folder").has("objective")
    assert imported(content, tmp_path / "other", "--encoder-only", "--outputs", str(MICRO / "README.md")) == 2


def test_sentences_of_an_input_are_given_and_travel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An imported model of pairs says so; one that does not know is no model of single texts."""
    given = ("--outputs", str(names_of(TEXTS, tmp_path / "names.txt")))
    assert imported(content_of(TEXTS), tmp_path / "silent", *given) == 0
    assert "WARNING: no --sentences: it is not known whether its inputs are pairs" in capsys.readouterr().out
    assert "sentences" not in load_task(tmp_path / "silent").preprocessing
    assert imported(content_of(TEXTS), tmp_path / "pairs", *given, "--sentences", "2") == 0
    assert main(["export", str(tmp_path / "pairs"), "--out", str(tmp_path / "back.pt")]) == 0
    assert main(["import", str(tmp_path / "back.pt"), "--out", str(tmp_path / "again")]) == 0
    assert "no --sentences" not in capsys.readouterr().out
    for name in ("pairs", "again"):
        assert load_task(tmp_path / name).preprocessing["sentences"] == 2
    assert imported(content_of(TEXTS), tmp_path / "encoder", "--encoder-only", "--sentences", "1") == 2
    assert "is no fine-tuned text model; leave it out" in capsys.readouterr().err


def test_a_model_without_official_form_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ClassifyConfig(modality="audio", num_outputs=3, head=SentenceHeadConfig())
    write(tmp_path / "own", config)
    assert main(["export", str(tmp_path / "own"), "--out", str(tmp_path / "x.pt")]) == 2
    assert "no official model has a head of kind sentence for audio" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()
    other: Any = types.SimpleNamespace(name="length", modality="audio")
    with pytest.raises(UnsupportedOptionError, match="no official model has a head of kind length"):
        official_task(other)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("| 94802\nE 51860\nT 38431\n", ("|", "E", "T")),
        ("1 2048\n0 1024\n", ("1", "0")),
        ("class a\r\nclass b\r\n\n", ("class a", "class b")),
        ("digit 1\nblank\n", ("digit 1", "blank")),
        ("猫\n犬\n", ("猫", "犬")),
    ],
)
def test_names_are_read_with_or_without_counts(content: str, names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text(content)
    assert read_outputs(tmp_path / "dict.txt") == names


NUMBERED = ("7", "10", "LABEL_3", "speaker 1", "speaker 2", "level 3")


def test_a_dictionary_with_counts_of_another_name_gives_no_letters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = names_of(LETTERS, tmp_path / "letters.txt")
    assert imported(content_of(LETTERS), tmp_path / "folder", "--outputs", str(given)) == 2
    assert "a dictionary with counts is to be named dict.txt" in capsys.readouterr().err


def test_names_keep_their_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through a list of names, an export for transformers, and the official layout."""
    (tmp_path / "names.txt").write_text("speaker 2\ncat 1\n")
    assert read_outputs(tmp_path / "names.txt") == ("speaker 2", "cat 1")
    assert "were these counts, it would be named dict.txt" in caplog.text
    (tmp_path / "names.txt").write_text("\n".join(NUMBERED))
    assert read_outputs(tmp_path / "names.txt") == NUMBERED
    write_outputs(tmp_path / "names.json", NUMBERED)
    assert read_outputs(tmp_path / "names.json") == NUMBERED
    config = ClassifyConfig(modality="image", classes=NUMBERED, head=PatchHeadConfig())
    folder = write(tmp_path / "own", config)
    assert main(["export", str(folder), "--out", str(tmp_path / "x.pt")]) == 0
    for number, words in enumerate(([], ["--outputs", str(tmp_path / "names.txt")])):
        again = tmp_path / f"again{number}"
        assert main(["import", str(tmp_path / "x.pt"), "--out", str(again), *words]) == 0
        assert load_task(again).task.config.names == NUMBERED
        shown = json.loads((again / "config.json").read_text())
        assert tuple(shown["id2label"].values()) == NUMBERED


@pytest.mark.parametrize("content", ["", "\n\n", "a\na\n", "digit 1\ndigit 2\na 1\na 2\n"])
def test_names_that_are_none_or_the_same_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text(content)
    with pytest.raises(ConfigError, match="dict.txt: expected"):
        read_outputs(tmp_path / "dict.txt")
