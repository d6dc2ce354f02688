"""What a run checks before it starts: its folder, and whether rows of a task are of one kind."""

import errno
import os
from pathlib import Path

import pytest

from d2v2ds.errors import ConfigError, MachineError
from d2v2ds.run.prepare import prepare, run_dir_faults
from preprocessing.pack_text import main as pack_text
from tests.preprocessing.texts import sentencepiece_model


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "lock"])
def test_a_fifo_in_the_folder_of_a_run_is_named_instead_of_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert run_dir_faults(tmp_path) == [f"{tmp_path / name}: expected a file, found a FIFO; remove it"]


def test_links_and_folders_of_the_owner_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert run_dir_faults(tmp_path) == []


def test_a_disk_that_fails_is_no_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may do; code 2 would end the job for good."""

    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    for name in ("mkdir", "iterdir"):
        with monkeypatch.context() as patch, pytest.raises(MachineError, match="network file system changed"):
            patch.setattr(Path, name, fail)
            run_dir_faults(tmp_path)


def test_pairs_and_single_texts_are_no_rows_of_one_task(tmp_path: Path) -> None:
    (tmp_path / "given.model").write_bytes(sentencepiece_model())
    (tmp_path / "a.tsv").write_text("a\tb\tlabel\nthe sea\tthe ship\tx\nan old ship\tand\ty\n")
    for name, options in {
        "pairs": ["--pair-columns", "a", "b"],
        "others": ["--pair-columns", "b", "a"],
        "single": ["--one-row-per-document", "--text-field", "a"],
    }.items():
        given = ["--input", str(tmp_path / "a.tsv"), "--output", str(tmp_path / name), "--workers", "1", *options]
        assert pack_text([*given, "--tokenizer", str(tmp_path / "given.model"), "--block-tokens", "64"]) == 0

    def start(train: str, valid: str, *more: str) -> None:
        words = [f"run.dir={tmp_path / 'run'}", "model.modalities.text.vocab_size=420", "engine.deepspeed=zero2_bf16"]
        prepare(
            "finetune/text_classify_tiny", [*words, f"data.text.shards={train}", f"valid.text={valid}", *more], world=1
        )

    pairs, others, single = (tmp_path / name for name in ("pairs", "others", "single"))
    start(str(pairs), str(others))
    with pytest.raises(ConfigError, match=r"valid\.text: .*single: expected pairs of sentences as in training"):
        start(str(pairs), str(single))
    start(str(pairs), str(others), f"valid.more.far.text={others}")
    with pytest.raises(ConfigError, match=r"valid\.more\.far\.text: .*single: expected pairs of sentences"):
        start(str(pairs), str(others), f"valid.more.far.text={single}")
    with pytest.raises(ConfigError, match=r"valid\.more\.far\.text is in data\.text\.shards"):
        start(str(pairs), str(others), f"valid.more.far.text={pairs}")
    with pytest.raises(ConfigError, match=r"data\.text: .*pairs: expected single texts as in training"):
        start(f"[{single},{pairs}]", str(tmp_path / "nowhere"))
