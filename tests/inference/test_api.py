"""Inference as a user types it: any recording, picture or text to features of every layer."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from PIL import Image
from torch import Tensor

from d2v2ds import FeatureExtractor, load_model
from d2v2ds.api import Features
from d2v2ds.errors import CheckpointError
from d2v2ds.modalities.image.reader import whole_view
from d2v2ds.modalities.inference import windows
from d2v2ds.modalities.text.inference import TextInference
from tests.interop.folders import tiny_config, write_folder
from tests.model.tiny_joint import VOCAB

RATE = 16000
WORDS = "the quick brown fox jumps over a lazy dog; seven boxing wizards quietly munch jam".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of all three modalities."""
    folder = tmp_path_factory.mktemp("api") / "model"
    texts = [" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(200)]
    write_folder(
        folder,
        tiny_config(),
        teacher=True,
        tokenizer=("sentencepiece", "tokenizer.model", small_tokenizer(texts)),
    )
    return folder


def small_tokenizer(texts: list[str]) -> bytes:
    """Of fewer ids than the tiny model has: our own trainer's have a piece for each of 256 bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCAB - 1, model_type="unigram",
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def encode(extractor: FeatureExtractor, text: str) -> np.ndarray:
    """Ids of a text by the export's tokenizer, without special ones."""
    inference = extractor.inference("text")
    assert isinstance(inference, TextInference)
    return inference.tokenizer.encode([text])[0]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype(np.float32) * 0.1


def close(a: dict[int, Tensor], b: dict[int, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for layer in a:
        torch.testing.assert_close(a[layer], b[layer], rtol=0, atol=tolerance)


def inputs_of(modality: str) -> list[object]:
    if modality == "audio":
        return [noise(0.5), noise(1.3, 1), noise(0.9, 2)]
    if modality == "text":
        return ["the lazy dog", "seven wizards munch", "quick"]
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("modality", ["audio", "image", "text"])
def test_a_batch_gives_what_each_input_gives_alone(exported: Path, modality: str) -> None:
    extractor = FeatureExtractor(exported)
    inputs = inputs_of(modality)
    together = extractor(inputs, sample_rate=RATE, modality=modality)
    assert sorted(together.layers) == [0, 1, 2, 3]
    assert together.windows == [1, 1, 1]
    for index, one in enumerate(inputs):
        alone = extractor(one, sample_rate=RATE, modality=modality)
        assert len(alone) == 1
        assert not alone.padding.any()
        close(together.unpadded(index), alone.unpadded(0))
        close({k: x[index] for k, x in together.mean().items()}, {k: x[0] for k, x in alone.mean().items()})
    assert all(not x[together.padding].any() for x in together.layers.values())


def test_features_are_those_of_the_network(exported: Path) -> None:
    model = load_model(exported)
    samples = noise(0.7)
    wave = torch.from_numpy(samples)
    wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-5).sqrt()
    expected = model.layers("audio", wave[None])
    found = FeatureExtractor(exported, layers=(1, -1))(samples, sample_rate=RATE, modality="audio")
    assert list(found.layers) == [1, 3]
    torch.testing.assert_close(found.layers[1], expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.layers[3], expected[3], rtol=0, atol=1e-5)


def test_sound_files_of_any_kind_are_read(exported: Path, tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(44100)], axis=1) * 0.5
    soundfile.write(tmp_path / "stereo.wav", stereo, 44100)
    soundfile.write(tmp_path / "mono.flac", np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) * 0.25, RATE)
    extractor = FeatureExtractor(exported)
    both = extractor([tmp_path / "stereo.wav", str(tmp_path / "mono.flac")], modality="audio")
    assert both.padding.sum() == 0
    assert (both.layers[0][0] - both.layers[0][1])[5:-5].abs().max() < 0.05, "the same tone, but for resampling"
    file, _ = soundfile.read(tmp_path / "stereo.wav", dtype="float32")
    for given in (file, [file.T], torch.from_numpy(file)):
        close(extractor(given, sample_rate=44100, modality="audio").unpadded(0), both.unpadded(0))


def test_what_may_be_several_inputs_is_no_single_one(exported: Path) -> None:
    extractor = FeatureExtractor(exported)
    several = torch.from_numpy(np.stack([noise(0.5), noise(0.6)[: RATE // 2]]))
    with pytest.raises(ValueError, match=r"may be 2 recordings, or one of 2 channels; give list\(x\)"):
        extractor(several, sample_rate=RATE, modality="audio")
    assert len(extractor(list(several), sample_rate=RATE, modality="audio")) == 2
    assert len(extractor([several], sample_rate=RATE, modality="audio")) == 1
    for lazy in ((wave for wave in several), map(str, ["fox"]), iter(["fox"])):
        with pytest.raises(ValueError, match=r"expected one or a list, found a \w+; give list\(...\) of it"):
            extractor(lazy, sample_rate=RATE, modality="audio")


def test_sixteen_bit_samples_are_the_floats_they_stand_for(exported: Path) -> None:
    samples = (noise(0.5) * 32768).astype(np.int16)
    extractor = FeatureExtractor(exported)
    a = extractor(samples, sample_rate=RATE, modality="audio")
    b = extractor(samples.astype(np.float32) / 32768, sample_rate=RATE, modality="audio")
    close(a.layers, b.layers, 0.0)


def test_samples_of_any_floating_type_are_read(exported: Path) -> None:
    extractor = FeatureExtractor(exported, layers=[3])
    samples = torch.from_numpy(noise(0.5)).bfloat16()
    expected = extractor(samples.float(), sample_rate=RATE, modality="audio").layers[3]
    for same in (samples, samples.double().requires_grad_(), samples.float().numpy()):
        torch.testing.assert_close(extractor(same, sample_rate=RATE, modality="audio").layers[3], expected)


def test_pictures_of_any_mode_are_read(exported: Path, tmp_path: Path) -> None:
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 33), dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    extractor = FeatureExtractor(exported)
    close(
        extractor(tmp_path / "grey.png", modality="image").layers,
        extractor(grey.convert("RGB"), modality="image").layers,
        0.0,
    )
    turned = Image.new("RGB", (30, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert extractor(tmp_path / "turned.jpg", modality="image").layers[0].shape == (1, 16, 16)


def test_the_view_of_a_picture_is_the_published_one() -> None:
    assert whole_view(500, 400, 224).size == (320, 256)
    assert whole_view(500, 400, 224).box == (0, 0, 500, 400)
    assert whole_view(32, 32, 32).size == (36, 36)
    assert whole_view(300, 250, 240).size == (288, 240)


@pytest.mark.parametrize(("total", "size"), [(10, 10), (11, 10), (100, 16), (101, 16), (257, 24), (5, 64)])
def test_windows_take_every_token_once_and_away_from_the_ends(total: int, size: int) -> None:
    taken: list[int] = []
    for start, first, last in windows(total, size):
        assert 0 <= start <= first < last <= min(total, start + size)
        assert first == 0 or first - start >= size // 8
        assert last == total or start + size - last >= size // 8
        taken += range(first, last)
    assert taken == list(range(total))


def test_long_recordings_are_cut_into_windows_that_agree_with_the_whole(exported: Path) -> None:
    """Where no attention reaches beyond a window, cutting must not be seen: layer 0 has only convolutions."""
    samples = noise(4.0)
    whole = FeatureExtractor(exported)(samples, sample_rate=RATE, modality="audio")
    cut = FeatureExtractor(exported, window_seconds=0.5)(samples, sample_rate=RATE, modality="audio")
    assert whole.windows == [1]
    assert cut.windows[0] > 8
    assert cut.padding.shape == whole.padding.shape
    torch.testing.assert_close(cut.layers[0], whole.layers[0], rtol=0, atol=1e-5)
    assert (cut.layers[3] - whole.layers[3]).abs().mean() < 0.1 * whole.layers[3].abs().mean()


def test_long_texts_are_cut_at_what_the_model_can_place(exported: Path) -> None:
    extractor = FeatureExtractor(exported)
    text = " ".join(WORDS * 2)
    ids = len(encode(extractor, text)) + 2
    assert ids > 24
    found = extractor(["fox", text], modality="text")
    assert found.windows[0] == 1
    assert found.windows[1] > 1
    assert int((~found.padding[1]).sum()) == ids


def test_mistakes_name_the_input_and_what_was_expected(exported: Path, tmp_path: Path) -> None:
    extractor = FeatureExtractor(exported)
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "ok.wav", noise(0.5), RATE)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    bad_wave = noise(0.5)
    bad_wave[7] = np.nan
    cases: list[tuple[object, str, int | None, str]] = [
        (noise(0.2), "audio", RATE, r"input 0: a recording of 0.200 s, expected 0.25 s or more"),
        ([noise(0.5), noise(0.1)], "audio", RATE, "input 1: a recording of 0.100 s"),
        (noise(0.5), "audio", None, "input 0: samples without a rate; give sample_rate="),
        (bad_wave, "audio", RATE, "finite"),
        (np.zeros(0, dtype=np.float32), "audio", RATE, "found none"),
        (np.zeros((100, 100), dtype=np.float32), "audio", RATE, r"found \(100, 100\)"),
        (np.zeros(9000, dtype=np.int64), "audio", RATE, "found int64"),
        (tmp_path / "none.wav", "audio", None, "no file"),
        (tmp_path / "noise.wav", "audio", None, "cannot be decoded"),
        (tmp_path / "ok.wav", "audio", 8000, "the file says 16000 Hz, sample_rate is 8000"),
        (tmp_path / "broken.png", "image", None, "cannot be decoded as a picture"),
        (7, "image", None, "expected a path or a PIL image, found int"),
        ("", "text", None, "input 0: expected text, found ''"),
        (["fox", 3], "text", None, "input 1: expected a string, or ids .* found int"),
        (np.array([0, 7, 40]), "text", None, "ids from 0 to 40, the model has 0 to 39"),
        (np.array([0.5]), "text", None, "found ndarray of float64"),
        ([], "text", None, "no inputs"),
        ("fox", "video", None, "modality='video': the model reads audio, image, text"),
        (Features, "audio", RATE, "input 0"),
        (noise(0.5), "audio", 0, "input 0: expected sample_rate in Hz, found 0"),
        (noise(0.5), "audio", "16k", "input 0: expected sample_rate in Hz, found '16k'"),  # type: ignore[list-item]
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (0, 9))], "image", None, "input 1: .* no pixels: 0 x 9"),
        (["fox", "\ud83d"], "text", None, "input 1: expected text, found half a character"),
    ]
    for given, modality, rate, said in cases:
        with pytest.raises(ValueError, match=said):
            extractor(given, sample_rate=rate, modality=modality)
    with pytest.raises(ValueError, match="name one of them"):
        extractor("fox")
    with pytest.raises(ValueError, match=r"layers \[4\]: text has layers 0 .* to 3"):
        FeatureExtractor(exported, layers=[4])("fox", modality="text")
    with pytest.raises(ValueError, match=r"layers \[\]: text has layers 0"):
        FeatureExtractor(exported, layers=[])("fox", modality="text")
    for settings in ({"window_seconds": 0}, {"batch_tokens": -1}):
        with pytest.raises(ValueError, match="expected a number above 0"):
            FeatureExtractor(exported, **settings)  # type: ignore[arg-type]
    assert FeatureExtractor(exported, min_seconds=0.1)(noise(0.2), sample_rate=RATE, modality="audio").layers


def test_ids_of_the_users_own_are_taken_as_they_are(exported: Path) -> None:
    extractor = FeatureExtractor(exported)
    given = np.concatenate([[0], encode(extractor, "the lazy dog"), [2]])
    text = extractor("the lazy dog", modality="text")
    close(extractor([given], modality="text").layers, text.layers, 0.0)
    close(extractor([torch.from_numpy(given)], modality="text").layers, text.layers, 0.0)


def test_an_unknown_kind_of_tokenizer_is_said(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["preprocessing"]["text"]["tokenizer"] = "wordpiece"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="tokenizer of kind 'wordpiece', expected sentencepiece or bpe"):
        FeatureExtractor(tmp_path / "model")("fox", modality="text")


def test_one_modality_needs_no_name_and_a_text_model_needs_its_tokenizer(tmp_path: Path) -> None:
    write_folder(tmp_path / "audio", tiny_config("audio"))
    assert FeatureExtractor(tmp_path / "audio")(noise(0.5), sample_rate=RATE).layers
    write_folder(tmp_path / "text", tiny_config("text"))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        FeatureExtractor(tmp_path / "text")("fox")


def test_teacher_and_bf16(exported: Path) -> None:
    samples = noise(0.6)
    student = FeatureExtractor(exported)(samples, sample_rate=RATE, modality="audio")
    half = FeatureExtractor(exported, dtype=torch.bfloat16)(samples, sample_rate=RATE, modality="audio")
    assert half.layers[3].dtype == torch.float32
    torch.testing.assert_close(half.layers[3], student.layers[3], rtol=0, atol=0.1)
    assert not torch.equal(half.layers[3], student.layers[3])
    teacher = FeatureExtractor(exported, weights="teacher")(samples, sample_rate=RATE, modality="audio")
    assert (teacher.layers[3] - student.layers[3]).abs().mean() > 0.1


def test_official_files_and_typos_are_explained(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "large_vox.pt")
    with pytest.raises(CheckpointError, match="d2v2ds.interop.fairseq import"):
        load_model(tmp_path / "large_vox.pt")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_model(tmp_path / "modle")


def test_the_package_itself_is_light() -> None:
    """Packing imports it, on nodes without torch."""
    code = "import sys, d2v2ds; d2v2ds.__version__; assert 'torch' not in sys.modules; d2v2ds.load_model; "
    code += "assert 'torch' in sys.modules and 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
