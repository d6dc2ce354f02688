"""A run knows what its packed rows were when they are gone."""

from pathlib import Path

import pytest

from d2v2ds.config.load import load_config
from d2v2ds.errors import ConfigError
from d2v2ds.run.preprocessing import FILE, describe, write
from preprocessing.pack_text import main as pack_text
from tests.preprocessing.texts import sentencepiece_model


def test_a_run_of_pairs_stays_one_without_its_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "given.model").write_bytes(sentencepiece_model())
    lines = ["a\tb\tlabel", *(f"the {n} sea\tan old ship\t{n % 2}" for n in range(9))]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    given = [
        "--input",
        str(tmp_path / "pairs.tsv"),
        "--workers",
        "1",
        "--block-tokens",
        "64",
        "--pair-columns",
        "a",
        "b",
    ]
    given += ["--tokenizer", str(tmp_path / "given.model"), "--output", str(tmp_path / "pairs")]
    assert pack_text(given) == 0
    words = [f"data.shards={tmp_path / 'pairs'}", f"run.dir={tmp_path / 'run'}"]
    config = load_config("finetune/text_classify_tiny", words)
    (tmp_path / "run").mkdir()
    write(config)
    whole = describe(config, config.model, tmp_path / "run")["text"]
    assert (whole["sentences"], whole["tokenizer"]) == (2, "sentencepiece")
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    alone = describe(config, config.model, tmp_path / "run")["text"]
    assert alone == whole | {"tokenizer": None, "file": None}, "the tokenizer lay in the shards"
    assert "the run's shards cannot be read" in caplog.text
    (tmp_path / "run" / FILE).write_text('{"text": 3}')
    with pytest.raises(ConfigError, match=FILE):
        describe(config, config.model, tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()
    assert "sentences" not in describe(config, config.model, tmp_path / "run")["text"], "an older run: not known"
