"""Files of a beam search that are none."""

import os
from pathlib import Path

import pytest

from d2v2ds.decoding.beam import is_arpa, read_arpa_words
from d2v2ds.errors import ConfigError


def test_a_language_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read in (read_arpa_words, is_arpa):
        with pytest.raises(ConfigError, match="fifo: expected a file, found a FIFO"):
            read(tmp_path / "fifo")
        with pytest.raises(ConfigError, match="absent: cannot be read: No such file"):
            read(tmp_path / "absent")


def test_words_of_an_arpa_file_are_read_whatever_its_bytes(tmp_path: Path) -> None:
    model = tmp_path / "lm.arpa"
    model.write_bytes(b"\\data\\\nngram 1=2\n\n\\1-grams:\n-1.0\tword\t0\n-1.0\t\xff\n\n\\end\\\n")
    assert read_arpa_words(model) == ["word", "\N{REPLACEMENT CHARACTER}"]
