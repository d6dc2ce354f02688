"""Fine-tuned exports with transformers: the logits and losses of our tasks, and pipelines."""

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2v2ds.batch import Batch, Labels
from d2v2ds.config.load import to_dict
from d2v2ds.interop.export_folder import Description, Kind
from d2v2ds.interop.export_write import write_config, write_tensors
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.modalities.text.shards import TextShards
from d2v2ds.model.local import normalise_pixels
from d2v2ds.tasks.classify import ClassifyConfig
from d2v2ds.tasks.ctc import CtcConfig, greedy
from d2v2ds.tasks.heads import FrameHeadConfig, PatchHeadConfig, SentenceHeadConfig
from d2v2ds.tasks.task import Task
from d2v2ds.tasks.units import train_units, units_of
from preprocessing.pack_text import main as pack_text
from tests.data.fake_images import photo
from tests.interop.folders import published_preprocessing, tiny_config
from tests.model.tiny_joint import joint_batch
from tests.preprocessing.texts import sentencepiece_model

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")
pytest.importorskip("rapidfuzz", reason="needs the extra `asr`")
pytestmark = pytest.mark.usefixtures("own_cache")

TASKS = {
    "ctc": CtcConfig(modality="audio", vocabulary=("|", "a", "b", "c")),
    "audio": ClassifyConfig(modality="audio", classes=("yes", "no", "up"), head=FrameHeadConfig(pooling="mean")),
    "image": ClassifyConfig(modality="image", classes=("cat", "dog"), head=PatchHeadConfig()),
    "image_cls": ClassifyConfig(modality="image", classes=("cat", "dog"), head=PatchHeadConfig(pooling="cls")),
    "text": ClassifyConfig(modality="text", classes=("bad", "good"), head=SentenceHeadConfig()),
    "number": ClassifyConfig(modality="text", kind="number", head=SentenceHeadConfig()),
}
AUTO = {
    "ctc": "AutoModelForCTC",
    "audio": "AutoModelForAudioClassification",
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
}


def auto(name: str) -> Any:
    return getattr(transformers, AUTO[{"number": "text"}.get(name, name.split("_")[0])])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Task[Any], Any]]:
    """Folder, task and network of each."""
    found = {}
    for name, config in TASKS.items():
        trunk = tiny_config(config.modality)
        if config.modality == "text":  # as many as the tokenizer of the pipeline has
            trunk = replace(trunk, modalities={"text": replace(trunk.modalities["text"], vocab_size=1000)})
        if name == "image_cls":
            own = replace(trunk.modalities["image"], num_extra_tokens=1)
            trunk = replace(trunk, modalities={"image": own})
        task = config.build(trunk, seed=0)
        network = task.build_network(activation_checkpointing=False)
        task.initialise(network, 5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        folder = tmp_path_factory.mktemp("heads") / name
        found[name] = write(folder, task, network), task, network.eval()
    return found


def write(folder: Path, task: Task[Any], network: Any) -> Path:
    folder.mkdir()
    state = network.state_dict()
    parts: dict[Any, dict[str, Tensor]] = {
        "model": {name[6:]: value for name, value in state.items() if name.startswith("trunk.")},
        "objective": {name: value for name, value in state.items() if not name.startswith("trunk.")},
    }
    for part, tensors in parts.items():
        write_tensors(folder, part, {name: Kind.of(value) for name, value in tensors.items()}, tensors.items(), 10**9)
    preprocessing = published_preprocessing(task.trunk)
    if "text" in preprocessing:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        preprocessing["text"] |= {"tokenizer": "sentencepiece", "file": "tokenizer.model"}
    settings = to_dict(task.config)
    description = Description(
        model=task.trunk, objective=settings, preprocessing=preprocessing, origin={"kind": "test"}
    )
    write_config(folder, description, write_hub_files(folder, task.trunk, preprocessing, settings))
    return folder


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    names = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}
    source = normalise_pixels(batch.source, torch.float32) if batch.source.dtype == torch.uint8 else batch.source
    given = {names[batch.modality]: source}
    if batch.padding is not None:
        given["attention_mask"] = (~batch.padding).long()
    return given


@pytest.mark.parametrize("name", TASKS)
def test_logits_and_losses_are_ours(exports: dict[str, Any], name: str) -> None:
    folder, task, network = exports[name]
    batch = replace(joint_batch(task.config.modality, seed=0), masks=None, num_masked=0)
    count = len(batch.source)
    if name == "ctc":
        labels = Labels(values=torch.tensor([[5, 6, 4], [7, 1, 1]])[:count], lengths=torch.tensor([3, 1])[:count])
    else:
        labels = Labels(values=torch.rand(count) if name == "number" else torch.arange(count) % 2)
    batch = replace(batch, labels=labels)
    model, info = auto(name).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    given = labels.values
    if labels.lengths is not None:
        given = given.masked_fill(torch.arange(given.shape[1]) >= labels.lengths[:, None], -100)
    with torch.no_grad():
        found = model(**inputs_of(batch), labels=given)
        expected = task.losses(network, batch, None)
    torch.testing.assert_close(found.logits, expected.output["logits"], rtol=1e-4, atol=1e-5)
    (loss,) = expected.sums.values()
    assert float(found.loss) == pytest.approx(float(loss) / count, rel=1e-4)


@pytest.mark.parametrize("name", ["ctc", "image"])
def test_a_saved_model_loads_again(exports: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder, task, _ = exports[name]
    model = auto(name).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        model.head.proj.bias += 1.0
    model.save_pretrained(tmp_path / "saved")
    again = auto(name).from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    batch = joint_batch(task.config.modality, seed=0)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(batch)).logits, again(**inputs_of(batch)).logits)


def test_pipelines_take_what_people_have(exports: dict[str, Any]) -> None:
    sound = {"raw": np.random.default_rng(0).normal(size=16000).astype(np.float32), "sampling_rate": 16000}
    picture = io.BytesIO()
    Image.fromarray(photo(60, 50)).save(picture, "PNG")
    options = {"trust_remote_code": True}
    ctc = transformers.pipeline("automatic-speech-recognition", model=str(exports["ctc"][0]), **options)
    assert isinstance(ctc(dict(sound))["text"], str)
    audio = transformers.pipeline("audio-classification", model=str(exports["audio"][0]), **options)
    assert {one["label"] for one in audio(dict(sound))} == {"yes", "no", "up"}
    image = transformers.pipeline("image-classification", model=str(exports["image"][0]), **options)
    assert {one["label"] for one in image(Image.open(picture))} == {"cat", "dog"}
    text = transformers.pipeline("text-classification", model=str(exports["text"][0]), **options)
    assert text("a small text")[0]["label"] in ("bad", "good")


def test_a_recogniser_of_units_gives_our_text_and_divides_words_as_in_training(tmp_path: Path) -> None:
    model = train_units({"abba": 5, "abc": 4, "cab": 3, "a": 2}, 6)
    config = CtcConfig(modality="audio", vocabulary=units_of(model, "x"), units=6)
    task = config.build(tiny_config("audio"), seed=0)
    network = task.build_network(activation_checkpointing=False)
    task.initialise(network, 7)
    with torch.no_grad():
        network.head.proj.weight.mul_(20)
        network.head.proj.bias[1:4] = -1e3  # special outputs, which no transcript has
    folder = write(tmp_path / "model", task, network.eval())
    (folder / "units.model").write_bytes(model)
    task.set_units(model, "x")
    sound = np.random.default_rng(0).normal(size=16000).astype(np.float32)
    source = torch.from_numpy((sound - sound.mean()) / np.sqrt(sound.var() + 1e-5))
    with torch.no_grad():
        out = network(Batch(modality="audio", source=source[None], ids=torch.tensor([0])))
    said = task.vocabulary.words(greedy(out["logits"], out["frames"])[0])
    assert any(len(word) > 1 for word in said)
    ctc = transformers.pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=True)
    found = ctc({"raw": sound, "sampling_rate": 16000})["text"]
    assert found.split() == said
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    numbers = tokenizer("cab  abba ax").input_ids
    assert numbers == task.vocabulary.encode("cab  abba ax")
    assert tokenizer.decode(numbers[:-2], group_tokens=False) == "cab abba a"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again("cab abba").input_ids == task.vocabulary.encode("cab abba")


def test_a_pair_has_the_scores_of_its_packed_row(exports: dict[str, Any], tmp_path: Path) -> None:
    """From a table to a row to scores, and from two strings to the same scores."""
    folder, _, network = exports["text"]
    pairs = [("the old whale", "a ship, and the sea"), ("42", "they'll"), ("isn't the sea", "the sea")]
    lines = ["a\tb\tlabel", *(f"{first}\t{second}\tgood" for first, second in pairs)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    given = ["--input", str(tmp_path / "pairs.tsv"), "--output", str(tmp_path / "packed"), "--workers", "1"]
    assert pack_text([*given, "--tokenizer", str(folder / "tokenizer.model"), "--pair-columns", "a", "b"]) == 0
    shards = TextShards(tmp_path / "packed")
    classify = transformers.pipeline("text-classification", model=str(folder), trust_remote_code=True)
    for row, (first, second) in enumerate(pairs):
        source = torch.from_numpy(shards.read_tokens(row).astype(np.int64))[None]
        with torch.no_grad():
            logits = network(Batch(modality="text", source=source, ids=torch.tensor([row])))["logits"]
        found = classify({"text": first, "text_pair": second}, top_k=None)
        scores = {one["label"]: one["score"] for one in found}
        assert [scores["bad"], scores["good"]] == pytest.approx(logits[0].softmax(0).tolist(), abs=1e-5)
        swapped = {one["label"]: one["score"] for one in classify({"text": second, "text_pair": first}, top_k=None)}
        assert swapped["bad"] != pytest.approx(scores["bad"], abs=1e-6), "the order matters"


def test_an_encoder_has_no_head(exports: dict[str, Any]) -> None:
    folder, _, network = exports["ctc"]
    encoder = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not hasattr(encoder, "head")
    assert torch.equal(encoder.blocks[0].norm1.weight, network.trunk.blocks[0].norm1.weight)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def test_a_head_that_was_saved_into_the_export_is_the_one_that_loads(exports: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exports["ctc"][0], folder)
    model = auto("ctc").from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model.head.proj.bias.fill_(7.0)
    model.save_pretrained(folder)
    again = auto("ctc").from_pretrained(folder, trust_remote_code=True)
    assert (again.head.proj.bias == 7.0).all(), "not that of objective.safetensors, which still lies there"


def test_a_missing_head_is_an_error(exports: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exports["ctc"][0], folder)
    (folder / "objective.safetensors").unlink()
    with pytest.raises(OSError, match="expected the head in objective.safetensors"):
        auto("ctc").from_pretrained(folder, trust_remote_code=True)


def test_padded_frames_are_blank(exports: dict[str, Any]) -> None:
    model = auto("ctc").from_pretrained(exports["ctc"][0], trust_remote_code=True).eval()
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 1500:] = 0
    with torch.no_grad():
        logits = model(input_values=torch.randn(2, 4000), attention_mask=mask).logits
    assert (logits[1].argmax(-1)[-5:] == 0).all()


def test_a_trainer_takes_a_step(exports: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers trains with it")
    model = auto("image").from_pretrained(exports["image"][0], trust_remote_code=True)
    side = exports["image"][1].trunk.modalities["image"].image_size
    rows = [{"pixel_values": torch.randn(3, side, side), "labels": number % 2} for number in range(4)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    found = transformers.Trainer(model=model, args=options, train_dataset=rows).train()
    assert found.global_step == 1
