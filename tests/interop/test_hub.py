"""Export folders with transformers: the same features, without d2v2ds, and preprocessors that make the same input."""

import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v2ds.api import FeatureExtractor
from d2v2ds.data.folders import JoinedShards
from d2v2ds.interop.export_folder import Description, Kind, ModelFolder, load_trunk
from d2v2ds.interop.export_write import write_config, write_tensors
from d2v2ds.interop.hub.write import write_hub_files
from d2v2ds.modalities.image.reader import ImageReader
from d2v2ds.modalities.text.sentences import join_sentences
from d2v2ds.modalities.text.tokenizers import BytePairTokenizer, SentencePieceTokenizer
from d2v2ds.model.init import initialise, trunk_parts
from d2v2ds.model.local import normalise_pixels
from d2v2ds.model.trunk import Trunk, TrunkConfig
from d2v2ds.shapes import AUDIO_NORM_EPS, PAD_ID
from preprocessing.text.tokenization import gpt2_tokenizer_json
from tests.data.fake_images import FakeImages, encode, photo
from tests.interop.folders import published_preprocessing, tiny_config
from tests.interop.test_folder import changed
from tests.model.tiny import tiny_trunk_config
from tests.model.tiny_joint import joint_batch, joint_trunk_config
from tests.preprocessing.test_tokenization import TEXTS, foreign_model
from tests.preprocessing.texts import sentencepiece_model, write_gpt2_files

transformers = pytest.importorskip("transformers", reason="needs the extra `hub`")
pytestmark = pytest.mark.usefixtures("own_cache")

INPUTS = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}
TEXTS_WITH_SPECIALS = [*TEXTS, "a <s> b</s> <mask><unk><pad>", "  two  spaces  ", "\n\n"]


def tiny_network(config: TrunkConfig, seed: int = 3) -> Trunk:
    """In eval mode, with no parameter at the value that it would have without being loaded."""
    trunk = Trunk(config).eval()
    initialise(trunk_parts(trunk), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trunk


def write_export(
    folder: Path,
    trunk: Trunk,
    dtype: torch.dtype = torch.float32,
    piece_bytes: int = 10**9,
    **preprocessing: Any,
) -> Path:
    """An export folder for transformers, with `preprocessing` in place of the published one of a modality."""
    folder.mkdir(parents=True)
    tensors = {name: value.to(dtype) for name, value in trunk.state_dict().items()}
    layout = {name: Kind.of(value) for name, value in tensors.items()}
    write_tensors(folder, "model", layout, tensors.items(), piece_bytes)
    for part in ("objective", "teacher"):  # which transformers must not read
        write_tensors(folder, part, {"decoders.x": Kind((1,), dtype)}, [("decoders.x", torch.ones(1, dtype=dtype))])
    inputs = published_preprocessing(trunk.config) | preprocessing
    description = Description(model=trunk.config, preprocessing=inputs, origin={"kind": "test"})
    write_config(folder, description, write_hub_files(folder, trunk.config, inputs))
    return folder


def text_settings(tokenizer: str, file: str) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "file": file, "max_tokens": 64}


@pytest.fixture(scope="module")
def network() -> Trunk:
    return tiny_network(joint_trunk_config())


@pytest.fixture(scope="module")
def folder(network: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("exports") / "joint-1.0", network)


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)


def inputs_of(modality: str) -> Tensor:
    """(B, ...) as the model reads them."""
    source = joint_batch(modality, seed=1).source
    return normalise_pixels(source, torch.float32) if modality == "image" else source


@torch.no_grad()
def features(model: Any, modality: str) -> list[Tensor]:
    """L x (B, T, D) of a model of transformers."""
    return list(model(**{INPUTS[modality]: inputs_of(modality)}, output_hidden_states=True).hidden_states)


@torch.no_grad()
def wanted(network: Trunk, modality: str) -> list[Tensor]:
    return network.layers(modality, inputs_of(modality))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", INPUTS)
def test_features_are_those_of_layers(loaded: Any, network: Trunk, modality: str) -> None:
    assert_equal(features(loaded, modality), wanted(network, modality))
    with torch.no_grad():
        output = loaded(**{INPUTS[modality]: inputs_of(modality)})
        assert output.hidden_states is None
        assert torch.equal(
            output.last_hidden_state, loaded(**{INPUTS[modality]: inputs_of(modality)}, return_dict=False)[0]
        )
    assert torch.equal(output.last_hidden_state, wanted(network, modality)[-1])


def test_every_weight_comes_from_the_file_and_nothing_is_reported(folder: Path, network: Trunk) -> None:
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    assert not model.training and model.dtype == torch.float32


def test_weights_in_several_files_in_half_precision(network: Trunk, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "sharded", network, torch.float16, piece_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    rounded = Trunk(network.config).eval()
    rounded.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    model = load(folder)
    for modality in INPUTS:
        assert_equal(features(model, modality), wanted(rounded, modality))


def test_bfloat16_on_request(folder: Path, network: Trunk) -> None:
    model = load(folder, dtype=torch.bfloat16)
    for modality in INPUTS:
        found, expected = features(model, modality)[-1], wanted(network, modality)[-1]
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_saved_again_it_is_the_same_model(loaded: Any, network: Trunk, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == network.state_dict().keys()
    model, report = load(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    ours = load_trunk(ModelFolder(tmp_path / "again"))
    for modality in INPUTS:
        assert_equal(features(model, modality), wanted(network, modality))
        assert_equal(wanted(ours, modality), wanted(network, modality))


def test_a_new_model_of_a_configuration_has_every_weight_drawn(loaded: Any) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(loaded.config, trust_remote_code=True)
    assert 0.3 < model.encoders["image"].extra.tokens.std() < 3
    assert torch.equal(
        model.encoders["image"].fixed_positions.table,
        Trunk(joint_trunk_config()).encoders["image"].fixed_positions.table,
    )
    assert (model.encoders["audio"].alibi.scale == 1).all()
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads, loaded.config.num_hidden_layers) == (16, 4, 3)


def test_other_inputs_than_one_of_the_models_are_refused(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*found \['input_values', 'input_ids'\]"):
        loaded(input_values=inputs_of("audio"), input_ids=inputs_of("text"))
    speech = load(write_export(tmp_path / "speech", tiny_network(tiny_trunk_config())))
    assert speech.main_input_name == "input_values"
    with pytest.raises(ValueError, match=r"expected one of \['input_values'\], found \['pixel_values'\]"):
        speech(pixel_values=inputs_of("image"))


def test_padded_speech_has_the_features_of_each_recording_alone(folder: Path, loaded: Any) -> None:
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    rng = np.random.default_rng(0)
    recordings = [0.01 * rng.normal(size=length).astype(np.float32) for length in (900, 400, 650)]
    batch = extractor(recordings, sampling_rate=16000, return_tensors="pt")
    assert batch["input_values"].shape == batch["attention_mask"].shape == (3, 900)
    with torch.no_grad():
        output = loaded(**batch)
        for row, recording in enumerate(recordings):
            alone = loaded(**extractor(recording, sampling_rate=16000, return_tensors="pt")).last_hidden_state[0]
            assert int(output.attention_mask[row].sum()) == len(alone)
            torch.testing.assert_close(output.last_hidden_state[row, : len(alone)], alone, rtol=0, atol=1e-5)
    length = output.last_hidden_state.shape[1]
    mask = loaded._get_feature_vector_attention_mask(length, batch["attention_mask"])
    assert torch.equal(mask, output.attention_mask)


def test_padded_text_has_the_features_of_each_text_alone(loaded: Any) -> None:
    ids = inputs_of("text")
    padded = ids.clone()
    padded[0, 12:] = PAD_ID
    mask = (padded != PAD_ID).long()
    garbled = torch.where(mask == 1, padded, 7)  # what lies under the mask does not matter
    with torch.no_grad():
        alone = loaded(input_ids=ids[:1, :12]).last_hidden_state[0]
        for found in (loaded(input_ids=padded), loaded(input_ids=garbled, attention_mask=mask)):
            torch.testing.assert_close(found.last_hidden_state[0, :12], alone, rtol=0, atol=1e-5)
            assert torch.equal(found.attention_mask, mask.bool())
        behind = torch.cat((torch.full((1, 8), 7), ids[:1, :12]), dim=1)  # padding in front: places still count from 0
        found = loaded(input_ids=behind, attention_mask=(torch.arange(20) >= 8)[None].long())
        torch.testing.assert_close(found.last_hidden_state[0, 8:], alone, rtol=0, atol=1e-5)


@pytest.mark.run
def test_a_folder_loads_offline_where_d2v2ds_is_not_installed(folder: Path, network: Trunk, tmp_path: Path) -> None:
    blocked = ["d2v2ds", "deepspeed", "pydantic", "pyarrow", "torchvision", "sentencepiece"]
    program = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    inputs = load_file("inputs.safetensors")
    found = {{name: model(**{{name: value}})[0].contiguous() for name, value in inputs.items()}}
save_file(found, "outputs.safetensors")
"""
    save_file(
        {name: inputs_of(modality).contiguous() for modality, name in INPUTS.items()}, tmp_path / "inputs.safetensors"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower() and "newly initialized" not in done.stderr, done.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    for modality, name in INPUTS.items():
        assert torch.equal(outputs[name], wanted(network, modality)[-1])


def test_raw_inputs_have_the_features_of_our_own_extractor(tmp_path: Path) -> None:
    config = joint_trunk_config()
    text = replace(config.modalities["text"], vocab_size=420, max_tokens=64)
    network = tiny_network(replace(config, modalities={**config.modalities, "text": text}))
    folder = write_export(tmp_path / "raw", network, text=text_settings("sentencepiece", "tokenizer.model"))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    ours, theirs = FeatureExtractor(folder, layers=[-1], min_seconds=0), load(folder)
    rng = np.random.default_rng(0)
    recordings = [0.02 * rng.normal(size=length).astype(np.float32) for length in (900, 500)]
    pictures = [Image.fromarray(photo(width, 40, width)) for width in (50, 41)]
    texts = ["the sea", "the old whale and the ship"]
    of = {
        "audio": transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)(
            recordings, sampling_rate=16000, return_tensors="pt"
        ),
        "image": transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(
            pictures, return_tensors="pt"
        ),
        "text": transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(
            texts, padding=True, return_tensors="pt"
        ),
    }
    for modality, inputs in {"audio": recordings, "image": pictures, "text": texts}.items():
        expected = ours(inputs, modality=modality, sample_rate=16000)
        with torch.no_grad():
            found = theirs(**of[modality])
        real = ~expected.padding
        if found.attention_mask is not None:
            assert torch.equal(found.attention_mask, real)
        (layer,) = expected.layers.values()
        torch.testing.assert_close(found.last_hidden_state[real], layer[real], rtol=0, atol=1e-5)


# --- preprocessors ----------------------------------------------------------------------------------------------------


def test_recordings_are_normalised_one_by_one_as_in_training(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "speech", tiny_network(tiny_trunk_config()))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    rng = np.random.default_rng(0)
    for loudness in (1.0, 1e-2, 1e-4):  # the quieter, the more the epsilon matters
        recording = (loudness * (rng.normal(size=1000) + 0.3)).astype(np.float32)
        found = extractor(recording, sampling_rate=16000)["input_values"][0]
        expected = F.layer_norm(torch.from_numpy(recording), (1000,), eps=AUDIO_NORM_EPS)
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-6)
    extractor.save_pretrained(tmp_path / "again")
    again = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert np.array_equal(again(recording, sampling_rate=16000)["input_values"][0], found)


def test_other_rates_and_channels_are_refused(folder: Path) -> None:
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="trained with 16000 Hz, found 8000 Hz; resample"):
        extractor(np.zeros(100), sampling_rate=8000)
    with pytest.raises(ValueError, match=r"of one channel, found \(100, 2\); mix them down"):
        extractor([np.zeros((100, 2))], sampling_rate=16000)


def test_images_become_the_crops_of_evaluation(tmp_path: Path) -> None:
    side, shorter = 224, 256
    image = {"side": side, "shorter_side": shorter, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    folder = write_export(tmp_path / "vision", tiny_network(tiny_config("image")), image=image)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    transparent = Image.fromarray(np.dstack([photo(300, 280, 4), np.full((280, 300), 128, np.uint8)]))
    files = [
        encode(photo(333, 257, 0)),  # odd differences to the crop
        encode(photo(259, 500, 1), "PNG"),
        encode(photo(900, 230, 2), "PNG"),  # a panorama
        encode(photo(40, 3, 8), "PNG"),  # as many rows as colours
        encode(transparent, "PNG"),
        encode(Image.fromarray(photo(301, 299, 5)).convert("L")),
        encode(Image.fromarray(photo(301, 299, 7)[..., 0].astype(np.uint16) * 257), "PNG"),
    ]
    turned = Image.Exif()
    turned[0x0112] = 6
    files.append(encode(photo(310, 290, 6), exif=turned))
    shards, whole = FakeImages(files, [1, 1, 1, 1, 1, 1, 1, 6]), SimpleNamespace()
    reader = ImageReader(JoinedShards([shards]), whole, SimpleNamespace(image_size=side), None)  # type: ignore[arg-type]
    for row, data in enumerate(files):
        (tmp_path / "file").write_bytes(data)
        expected = normalise_pixels(reader.read_whole(row)[None], torch.float32)
        for given in (Image.open(io.BytesIO(data)), tmp_path / "file", [str(tmp_path / "file")]):
            found = processor(given, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pixels = photo(300, 270, 9)
    first, last, torched, drawn = processor(
        [pixels.transpose(2, 0, 1), pixels, torch.from_numpy(pixels), Image.fromarray(pixels)], return_tensors="np"
    )["pixel_values"]
    assert np.array_equal(first, drawn) and np.array_equal(last, drawn) and np.array_equal(torched, drawn)
    with pytest.raises(ValueError, match=r"arrays of uint8 \(0 to 255\), found float64"):
        processor(pixels / 255)
    with pytest.raises(ValueError, match=r"those of the model, found \['do_resize'\]"):
        processor(pixels, do_resize=False)


@pytest.mark.parametrize(
    "train",
    [sentencepiece_model, partial(sentencepiece_model, "identity"), foreign_model],
    ids=["", "identity", "foreign"],
)
def test_sentencepiece_tokenizers_give_the_ids_of_training(
    train: Callable[[], bytes], network: Trunk, tmp_path: Path
) -> None:
    data = train()
    ours = SentencePieceTokenizer(data)
    folder = write_export(tmp_path / "text", network, text=text_settings("sentencepiece", "tokenizer.model"))
    (folder / "tokenizer.model").write_bytes(data)
    check_tokenizer(folder, ours)


@pytest.mark.parametrize("left_out", [0, 40])
def test_byte_pair_tokenizers_give_the_ids_of_training(left_out: int, network: Trunk, tmp_path: Path) -> None:
    files = write_gpt2_files(tmp_path / "gpt2", left_out)
    data = gpt2_tokenizer_json(
        *((files / name).read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe", "dict.txt")), files
    )
    folder = write_export(tmp_path / "text", network, text=text_settings("bpe", "tokenizer.json"))
    (folder / "tokenizer.json").write_bytes(data)
    ours = BytePairTokenizer(data)
    assert (3 in ours.encode(TEXTS)[0]) == (left_out > 0), "tokens that the dictionary lacks are unknown"
    check_tokenizer(folder, ours)


def check_tokenizer(folder: Path, ours: SentencePieceTokenizer | BytePairTokenizer) -> None:
    """The same ids for every text, special ones around them, padding behind; also after `save_pretrained`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer.save_pretrained(folder.parent / "saved")
    again = transformers.AutoTokenizer.from_pretrained(folder.parent / "saved", trust_remote_code=True)
    for text in TEXTS_WITH_SPECIALS:
        expected = [0, *ours.encode([text])[0].tolist(), 2]
        for one in (tokenizer, again):
            assert one(text)["input_ids"] == expected, text
            assert one.decode(expected, skip_special_tokens=True) == ours.decode(expected)
    texts = [text for text in TEXTS_WITH_SPECIALS if text]  # transformers takes an empty second text for none
    for first, second in zip(texts, reversed(texts), strict=True):
        pair = join_sentences(*(ours.encode([text])[0] for text in (first, second))).tolist()
        for one in (tokenizer, again):
            assert one(first, second)["input_ids"] == pair, (first, second)
    found = tokenizer("the sea", "a ship", return_special_tokens_mask=True, return_token_type_ids=True)
    assert [id for id, mark in zip(found["input_ids"], found["special_tokens_mask"], strict=True) if mark] == [
        0,
        2,
        2,
        2,
    ]
    assert found["token_type_ids"] == [0] * len(found["input_ids"]), "no segment ids"
    assert (tokenizer.num_special_tokens_to_add(), tokenizer.num_special_tokens_to_add(pair=True)) == (2, 4)
    batch = tokenizer(["the sea", "the old whale and the ship"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (
        torch.equal(batch["input_ids"] != PAD_ID, batch["attention_mask"].bool())
        and batch["input_ids"][0, -1] == PAD_ID
    )
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert (*special, tokenizer.mask_token_id) == (0, 1, 2, 3, ours.vocab_size - 1)
    assert tokenizer.model_max_length == 64 and len(tokenizer("the sea " * 100, truncation=True)["input_ids"]) == 64


@pytest.fixture
def trained(folder: Path) -> Any:
    """A model of its own for each test, whose blocks drop nothing."""
    model = load(folder).train()
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def gradients(model: Any, modality: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed loss, under autocast if a type is given."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(**{INPUTS[modality]: inputs_of(modality)}).last_hidden_state
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("modality", INPUTS)
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients_from_recomputed_blocks(
    modality: str, kwargs: dict[str, Any] | None, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(trained, modality)
    calls = []
    forward = type(trained.blocks[0]).forward
    monkeypatch.setattr(type(trained.blocks[0]), "forward", lambda *args: (calls.append(1), forward(*args))[1])
    gradients(trained, modality)
    depth = len(calls)
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert trained.is_gradient_checkpointing
    found = gradients(trained, modality)
    assert len(calls) == 3 * depth
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, msg=name)
    trained.gradient_checkpointing_disable()
    gradients(trained, modality)
    assert len(calls) == 4 * depth


@pytest.mark.parametrize("modality", INPUTS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_gradients_under_autocast_are_those_of_fp32(
    modality: str, dtype: torch.dtype, error: float, trained: Any
) -> None:
    expected, found = gradients(trained, modality), gradients(trained, modality, dtype)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - one).norm()) <= error * float(one.norm()) + 1e-7, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_implementation_of_attention_may_be_named(implementation: str, folder: Path, network: Trunk) -> None:
    model = load(folder, attn_implementation=implementation)
    assert_equal(features(model, "audio"), wanted(network, "audio"))
    with pytest.raises(ValueError, match="output_attentions=True: attention probabilities are not kept"):
        model(input_values=inputs_of("audio"), output_attentions=True)


@pytest.mark.run
def test_the_trainer_of_transformers_trains_speech_in_bf16_with_checkpointing(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    class Classifier(transformers.PreTrainedModel):
        config_class = transformers.PreTrainedConfig
        supports_gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__(transformers.PreTrainedConfig())
            self.encoder = load(folder)
            self.head = torch.nn.Linear(self.encoder.config.hidden_size, 3)
            self.post_init()

        def forward(self, input_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.head(self.encoder(input_values).last_hidden_state.mean(1))
            return {"loss": F.cross_entropy(logits, labels)}

    samples = [{"input_values": torch.randn(2000), "labels": i % 3} for i in range(4)]
    model = Classifier()
    before = {name: one.clone() for name, one in model.named_parameters() if one.requires_grad}
    options = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True, gradient_checkpointing=True,
        report_to=[], save_strategy="no", learning_rate=0.01,
    )  # fmt: skip
    transformers.Trainer(model, options, train_dataset=samples).train()
    assert model.encoder.gradient_checkpointing
    speech = [name for name in before if "blocks" in name or "audio" in name]
    assert speech
    after = dict(model.named_parameters())
    assert all(torch.isfinite(after[name]).all() for name in before)
    assert sum(not torch.equal(after[name], before[name]) for name in speech) > len(speech) // 2


@pytest.mark.parametrize("modalities", [("audio",), ("image",), ("text",), ("audio", "image", "text")])
def test_models_can_be_pickled(modalities: tuple[str, ...], tmp_path: Path) -> None:
    trunk = tiny_network(tiny_config(*modalities))
    for model in (load(write_export(tmp_path / "model", trunk)), trunk):
        copy = pickle.loads(pickle.dumps(model))  # noqa: S301
        for modality in modalities:
            with torch.no_grad():
                assert_equal(copy.layers(modality, inputs_of(modality)), wanted(trunk, modality))


def test_preprocessors_can_be_pickled(folder: Path, network: Trunk, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).standard_normal(500)
    picture = Image.fromarray((np.arange(64 * 64 * 3) % 256).astype(np.uint8).reshape(64, 64, 3))
    text = write_export(tmp_path / "text", network, text=text_settings("sentencepiece", "tokenizer.model"))
    (text / "tokenizer.model").write_bytes(sentencepiece_model())
    cases: list[tuple[Any, Path, Callable[[Any], Any]]] = [
        (transformers.AutoFeatureExtractor, folder, lambda one: one(samples, sampling_rate=16000)["input_values"]),
        (transformers.AutoImageProcessor, folder, lambda one: one(picture)["pixel_values"]),
        (transformers.AutoTokenizer, text, lambda one: one(TEXTS[0])["input_ids"]),
    ]
    for auto, place, make in cases:
        own = auto.from_pretrained(place, trust_remote_code=True)
        np.testing.assert_array_equal(make(pickle.loads(pickle.dumps(own))), make(own))  # noqa: S301


def test_two_exports_of_one_name_in_one_process_are_two_models(tmp_path: Path) -> None:
    for modality in ("audio", "image"):
        trunk = tiny_network(tiny_config(modality))
        assert_equal(
            features(load(write_export(tmp_path / modality / "same", trunk)), modality), wanted(trunk, modality)
        )


CHANGES = {
    "shared_depth": (10**9, "model.shared_depth: expected int of Bounds"),
    "layer_drop": (math.nan, "model.layer_drop: expected float of Bounds"),
    "layer_dorp": (0.1, "expected the fields of TrunkConfig, found .'layer_dorp'"),
    "block.norm_eps": ("1e-5", "model.block.norm_eps: expected float"),
    "block.num_heads": (5, "not divisible by num_heads 5"),
    "block": ([], "model.block: expected the fields of BlockConfig"),
    "modalities.audio.prenet_depth": (10**9, "audio.prenet_depth: expected int"),
}


@pytest.mark.parametrize("place", CHANGES)
def test_a_configuration_of_what_no_model_has_is_refused_by_name(place: str, loaded: Any) -> None:
    value, said = CHANGES[place]
    config = type(loaded.config)(model=changed(loaded.config.model, place, value))
    with pytest.raises(ValueError, match=said):
        type(loaded)(config)
