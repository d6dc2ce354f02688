"""A word of the command line is read as the type of its field."""

from pathlib import Path
from typing import Any

import pytest

from d2v2ds.config.load import load_config, read_config
from d2v2ds.config.words import read_word
from d2v2ds.errors import ConfigError

AUDIO = ["data.shards=shards", "run.dir=run"]


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("runs/exp #2", "runs/exp #2"),
        ("2024", "2024"),
        ("2024-11-30", "2024-11-30"),
        ("007", "007"),
        ("on", "on"),
        ("null", "null"),
        ("12:30:45", "12:30:45"),
        ("{a}", "{a}"),
        ("a: b", "a: b"),
        ("*x", "*x"),
        ("'x'", "'x'"),
        ("~", "{home}"),
        ("~/x", "{home}/x"),
        ("caf\u00e9 \u2603", "caf\u00e9 \u2603"),
    ],
)
def test_a_path_is_text(word: str, path: str) -> None:
    expected = Path(path.replace("{home}", str(Path.home())))
    assert load_config("audio_tiny", ["data.shards=x", f"run.dir={word}"]).run.dir == expected
    assert load_config("audio_tiny", [f"data.shards={word}", "run.dir=x"]).data.modalities["audio"].shards == expected
    assert load_config("audio_tiny", [*AUDIO, f"valid.audio={word}"]).valid.modalities["audio"] == expected


def test_a_list_of_folders_is_yaml() -> None:
    config = load_config("audio_tiny", ["data.shards=[~/a, 'b #2']", "run.dir=x", "data.audio.weights=[1, 2.5]"])
    assert config.data.modalities["audio"].shards == (Path.home() / "a", Path("b #2"))
    assert config.data.modalities["audio"].weights == (1.0, 2.5)


@pytest.mark.parametrize(
    ("field", "word", "value"),
    [
        ("run.total_steps", "010", 10),
        ("run.total_steps", "1_000", "1_000"),
        ("run.total_steps", "null", None),
        ("run.seed", "7", 7),
        ("lr.peak", "1e-4", 1e-4),
        ("lr.peak", ".5", 0.5),
        ("lr.peak", "1:30", "1:30"),
        ("run.async_checkpoints", "off", False),
        ("run.async_checkpoints", "True", True),
        ("engine.deepspeed", "010", "010"),
        ("engine.deepspeed", "yes", "yes"),
        ("init.skip", "[decoders]", ["decoders"]),
        ("data.audio", "null", None),
        ("objective.modalities.audio.mask.num_masks", "08", 8),
        ("objective.modalities.audio.mask.num_masks", "010", 10),
        ("objective.modalities.image.mask.count", "010", 10),
        ("objective.modalities.text.mask_token", "last", "last"),
        ("objective.modalities.image.decoder.depth", "010", 10),
        ("objective.modalities.audio.copied", "[positions]", ["positions"]),
        ("model.modalities.audio.alibi", "no", False),
        ("no.such.field", "[1]", [1]),
    ],
)
def test_other_words_follow_their_fields(field: str, word: str, value: Any) -> None:
    found = read_word(word, field.split("."))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.total_steps=" + "9" * 4000, "run.total_steps: Input should be"),
        ("run.total_steps=99999999999999999999", "run.total_steps: Input should be less than or equal to 2147483647"),
        ("init.skip=[", "override init.skip: not valid YAML"),
        ("model=" + "[" * 500, "override model: not valid YAML"),
    ],
)
def test_what_no_field_takes_is_a_sentence(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("audio_tiny", [*AUDIO, word])
    assert len(str(caught.value)) < 5000


def test_home_is_expanded_in_a_file_too(tmp_path: Path) -> None:
    from d2v2ds.config.load import CONFIG_FOLDER

    text = (CONFIG_FOLDER / "audio_tiny.yaml").read_text().replace("shards: ???", "shards: ~/packed")
    (tmp_path / "own.yaml").write_text(text)
    config, problems = read_config(str(tmp_path / "own.yaml"), ["run.dir=x"])
    assert config is not None and not problems
    assert config.data.modalities["audio"].shards == Path.home() / "packed"
