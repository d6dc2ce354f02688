"""`init.weights`: the first loss is that of the given model, what does not fit is said, the optimizer is new."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from d2v2ds.config.load import load_config
from d2v2ds.data.loader import LoaderConfig, build_loader
from d2v2ds.data.order import SamplerState
from d2v2ds.interop.export_folder import OBJECTIVE_PREFIX, Description, Kind, ModelFolder
from d2v2ds.interop.export_write import write_file
from d2v2ds.run.export import export
from d2v2ds.run.prepare import Prepared, prepare
from d2v2ds.run.warm_start import WarmStart, open_warm_start
from preprocessing.pack_text import main as pack_text
from tests.interop.folders import drawn, published_preprocessing, tiny_config, tiny_objective, write_folder
from tests.preprocessing.texts import write_stories
from tests.runs.launching import arguments_of, attempt, deterministic, fp32, pack_clips, train, weights

PLAIN = ["model.block.mlp_dropout=0", "model.layer_drop=0", "objective.modalities.audio.decoder.mask_noise_std=0"]
"""Nothing is drawn in a step, so that a loss can be computed a second time."""


def decay(value: float) -> list[str]:
    """A teacher that keeps this share of its weights at every step."""
    return [f"objective.ema.{end}_decay={value}" for end in ("start", "end")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_clips(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def exported(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight steps at a high rate, whose teacher lags behind."""
    folder = tmp_path_factory.mktemp("source")
    train(2, shards, folder / "run", *PLAIN, "lr.peak=0.01", *decay(0.5))
    export(folder / "run", folder / "model", teacher=True)
    return folder / "model"


def load(network: nn.Module, folder: ModelFolder, *parts: str) -> None:
    """Put parts of an export into a network of an objective."""
    prefixes = {"model": "trunk.", "teacher": "trunk.", "objective": ""}
    network.load_state_dict({prefixes[part] + name: t for part in parts for name, t in folder.tensors(part)})  # type: ignore[arg-type]


def first_loss(prepared: Prepared, folder: ModelFolder) -> float:
    """Of one process with whole weights, over the first global batch."""
    objective = prepared.objective
    student, teacher = objective.build_network(activation_checkpointing=False), objective.build_teacher_network()
    assert teacher is not None
    load(student.eval(), folder, "model", "objective")
    load(teacher.eval(), folder, "teacher")
    state, config = {"audio": SamplerState()}, LoaderConfig(num_workers=0)
    loader = build_loader(prepared.streams, state=state, rank=0, world=1, config=config)
    total = count = 0.0
    for batch in next(loader).micro:
        with torch.no_grad():
            total += float(student(batch, teacher)["losses"]["regression"]) * batch.loss_weight
        count += batch.num_masked * batch.loss_weight
    loader.close()
    return total / count


@pytest.mark.run
def test_the_first_step_has_the_loss_of_the_given_model(shards: Path, exported: Path, tmp_path: Path) -> None:
    extra = [*PLAIN, f"init.weights={exported}", "run.total_steps=2", fp32(3, tmp_path)]
    said = train(2, shards, tmp_path / "run", *extra)
    assert "a new optimizer" in said
    record = deterministic(tmp_path / "run")[0]
    prepared = prepare("audio_tiny", arguments_of(shards, tmp_path / "other", *extra)[2:], world=1)
    assert record["loss/regression"] == pytest.approx(first_loss(prepared, ModelFolder(exported)), rel=1e-5)
    assert record["ema/student_distance"] > 1e-3, "the teacher is the given one"
    assert record["optim/lr"] == 0.0, "a warm-up of its own"
    train(1, shards, tmp_path / "drawn", *PLAIN, "run.total_steps=2")
    assert deterministic(tmp_path / "drawn")[0]["loss/regression"] != pytest.approx(record["loss/regression"], rel=0.05)


@pytest.mark.run
def test_a_run_with_checkpoints_goes_on_from_those(shards: Path, exported: Path, tmp_path: Path) -> None:
    extra = [*PLAIN, f"init.weights={exported}", "run.save_every_steps=1", *decay(1)]
    train(1, shards, tmp_path / "run", *extra, "run.total_steps=2")
    first = weights(tmp_path / "run", 1)
    folder = ModelFolder(exported)
    given = {f"student trunk.{name}": tensor for name, tensor in folder.tensors("model")}
    given |= {f"student {name}": tensor for name, tensor in folder.tensors("objective")}
    given |= {f"teacher trunk.{name}": tensor for name, tensor in folder.tensors("teacher")}
    assert all(torch.equal(first[name], given[name]) for name in first), (
        "the first step has lr 0, the teacher is frozen"
    )
    assert "resumed at step 2" in train(1, shards, tmp_path / "run", *extra, "run.total_steps=3")
    last = weights(tmp_path / "run", 3)
    name = "student trunk.blocks.0.mlp.fc1.weight"
    assert not torch.equal(last[name], given[name])


@pytest.mark.run
def test_weights_that_do_not_fit_are_said_before_anything_starts(shards: Path, exported: Path, tmp_path: Path) -> None:
    wrong = ["model.block.width=48", "model.block.num_heads=2", "init.skip=[decoder]", f"init.weights={exported}"]
    codes, printed = attempt(1, shards, tmp_path / "run", *wrong)
    assert codes == [2]
    assert "init.weights" in printed
    assert "was made with model.block.num_heads 4, this run has 2" in printed
    assert "has shape (32,), this run's (48,)" in printed
    assert printed.count("has shape") == 5, "the settings say it, hundreds of tensors would hide them"
    assert "more tensors have other shapes" in printed
    assert "leave it out" not in printed, "would not make the settings fit"
    assert "init.skip: 'decoder' is no parameter or part of one" in printed
    codes, printed = attempt(1, shards, tmp_path / "run", f"init.weights={tmp_path}")
    assert codes == [2]
    assert "init.weights: " in printed
    assert "expected the description of an exported model" in printed


def configured(tmp_path: Path, folder: Path, *modalities: str, skip: tuple[str, ...] = ()) -> WarmStart:
    """A warm start of a run with the tiny model of some modalities."""
    config, trunk = load_config("multimodal_tiny"), tiny_config(*modalities)
    init = replace(config.init, weights=folder, skip=skip)
    return WarmStart(replace(config, model=trunk, objective=tiny_objective(trunk), init=init), folder)


def test_other_modalities_of_an_export_do_not_matter_and_lacking_ones_are_drawn(tmp_path: Path) -> None:
    write_folder(tmp_path / "joint", tiny_config())
    write_folder(tmp_path / "audio", tiny_config("audio"))
    fewer = configured(tmp_path, tmp_path / "joint", "audio")
    assert (fewer.faults(), fewer.fresh()) == ([], [])
    more = configured(tmp_path, tmp_path / "audio")
    assert more.faults() == []
    assert more.fresh() == ["decoders.image", "decoders.text", "encoders.image", "encoders.text"]


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "text", tiny_config("text"))
    start = configured(tmp_path, tmp_path / "text", "text", skip=("decoders", "encoders.text.local.tokens"))
    assert start.faults() == []
    assert start.fresh() == ["decoders.text", "encoders.text"]
    larger = tiny_config("text")
    larger = replace(larger, modalities={"text": replace(larger.modalities["text"], vocab_size=50)})
    config = replace(load_config("multimodal_tiny"), model=larger, objective=tiny_objective(larger))
    (fault,) = WarmStart(config, tmp_path / "text").faults()
    assert "encoders.text.local.tokens.weight has shape (40, 16)" in fault
    assert fault.endswith("leave it out with init.skip=[encoders.text.local.tokens.weight]")
    way_out = replace(config, init=replace(config.init, skip=("encoders.text.local.tokens.weight",)))
    assert WarmStart(way_out, tmp_path / "text").faults() == []
    skipping = replace(config, init=replace(config.init, skip=("encoders.text.local.tokens",)))
    faults = WarmStart(skipping, tmp_path / "text").faults()
    assert faults == [], "another vocabulary is no other network"


def test_settings_of_training_may_differ_and_those_of_the_network_may_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "audio", tiny_config("audio"))
    values = json.loads((tmp_path / "audio" / "config.json").read_text())
    values["model"]["block"]["mlp_dropout"] = 0.4
    own = values["objective"]["modalities"]["audio"]
    own["loss"]["beta"] = own["mask"]["masked_fraction"] = own["decoder"]["mask_noise_std"] = 0.4
    (tmp_path / "audio" / "config.json").write_text(json.dumps(values))
    assert configured(tmp_path, tmp_path / "audio", "audio").faults() == []
    values["model"]["modalities"]["audio"]["alibi"] = False
    values["model"]["block"]["norm_eps"] = 1e-6
    own["decoder"]["residual"] = False
    (tmp_path / "audio" / "config.json").write_text(json.dumps(values))
    faults = configured(tmp_path, tmp_path / "audio", "audio").faults()
    assert any("model.modalities.audio.alibi False, this run has True" in fault for fault in faults)
    assert any("model.block.norm_eps 1e-06, this run has 1e-05" in fault for fault in faults)
    assert any("objective.modalities.audio.decoder.residual False, this run has True" in fault for fault in faults)
    assert len(faults) == 3


def test_ids_of_another_tokenizer_are_refused_unless_the_embeddings_are_drawn(tmp_path: Path) -> None:
    packed = ["--input", str(write_stories(tmp_path / "books")), "--output", str(tmp_path / "text"), "--workers", "1"]
    assert pack_text([*packed, "--train-tokenizer", "--vocab-size", "420", "--block-tokens", "24"]) == 0
    own = (tmp_path / "text" / "tokenizer.model").read_bytes()
    for data, skip, count in (
        (own, "[]", 0),
        (own + b"\x00", "[]", 1),
        (own + b"\x00", "[encoders.text.local.tokens]", 0),
    ):
        model = ["model.block.width=16", "model.modalities.text.vocab_size=420"]
        given = [f"data.shards={tmp_path / 'text'}", f"init.weights={tmp_path / 'model'}", f"init.skip={skip}"]
        config = load_config("text_tiny", [*model, *given])
        tokenizer = ("sentencepiece", "tokenizer.model", data)
        write_folder(tmp_path / "model", config.model, objective=config.objective, tokenizer=tokenizer)
        start, faults = open_warm_start(config)
        assert start is not None
        assert len(faults) == count, faults
        assert all("was packed with another tokenizer" in fault for fault in faults)


def test_a_single_file_is_taken(tmp_path: Path) -> None:
    config = tiny_config("audio")
    parts = drawn(config)
    tensors = parts["model"] | {OBJECTIVE_PREFIX + name: tensor for name, tensor in parts["objective"].items()}
    description = Description(
        model=config,
        objective=asdict(tiny_objective(config)),
        preprocessing=published_preprocessing(config),
        origin={"kind": "test"},
    )
    file = tmp_path / "model.safetensors"
    write_file(file, description, {name: Kind.of(tensor) for name, tensor in tensors.items()}, tensors.items())
    start = configured(tmp_path, file, "audio")
    assert (start.faults(), start.fresh()) == ([], [])
    assert not start.folder.has("teacher"), "it will start as a copy of the student"
