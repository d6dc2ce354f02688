"""The synthetic corpus: repeatable, labelled, and usable by the packer in both of its forms."""

from pathlib import Path

import pytest
import soundfile

from preprocessing.pack_audio import main as pack
from preprocessing.samples.speech import DIGITS, VOICES, main
from tests.preprocessing.helpers import run_module

pytest.importorskip("espeakng_loader", reason="the extra demo is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    assert main(["--output", str(folder), "--minutes", "3"]) == 0
    return folder


def test_every_voice_says_every_digit_and_sentences(corpus: Path) -> None:
    lines = [line.split("\t") for line in (corpus / "manifest.tsv").read_text().splitlines()]
    assert lines[0] == ["path", "text", "label", "speaker"]
    said = {(label, speaker) for _, _, label, speaker in lines[1:]}
    assert said == {(label, voice.name) for label in [*map(str, range(10)), ""] for voice in VOICES}
    assert all(text == DIGITS[int(label)] for _, text, label, _ in lines[1:] if label)
    seconds = sum(soundfile.info(corpus / path).duration for path, *_ in lines[1:])
    assert 170 < seconds < 240


def test_same_seed_gives_the_same_bytes_in_another_process(corpus: Path, tmp_path: Path) -> None:
    result = run_module("preprocessing.samples.speech", "--output", tmp_path / "again", "--minutes", 3)
    assert result.returncode == 0 and "SYNTHETIC" in result.stdout
    first, second = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}
                     for root in (corpus, tmp_path / "again"))  # fmt: skip
    assert first == second


def test_manifest_packs_plainly_and_joined(corpus: Path, tmp_path: Path) -> None:
    source = ["--input", str(corpus / "manifest.tsv"), "--workers", "1"]
    assert pack([*source, "--output", str(tmp_path / "clips")]) == 0
    assert pack([*source, "--output", str(tmp_path / "joined"), "--join-seconds", "3", "6"]) == 0
