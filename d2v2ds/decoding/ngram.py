"""Train an n-gram language model of transcripts or any text (kaldingram, extra `asr`)."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from d2v2ds.errors import ConfigError, MissingExtraError
from d2v2ds.io.output import whole_file

MOST_ORDER = 9


def train_ngram(lines: Iterable[str], to: Path, *, order: int, prune: float = 0.0) -> int:
    """Train a Kneser-Ney back-off model and write it as an ARPA file, whole or not there.

    Args:
        lines: sentences, words divided by blanks; empty ones are left out.
        to: file to write.
        order: n, 2 or more: KenLM reads no unigram model.
        prune: entropy threshold of pruning, such as 1e-8; 0 for none.

    Returns:
        Number of sentences.

    Raises:
        ConfigError: no sentence, an impossible setting, or the trainer failed.
        MissingExtraError: kaldingram is not installed.
    """
    if not 2 <= order <= MOST_ORDER:
        raise ConfigError(f"order {order}: expected 2 to {MOST_ORDER}")
    if prune < 0:
        raise ConfigError(f"prune {prune}: expected 0 or more")
    if find_spec("kaldingram") is None:
        raise MissingExtraError("n-gram models need kaldingram", "asr")
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".ngram-") as folder:
        text, model, pruned = (Path(folder) / name for name in ("text", "model.arpa", "pruned.arpa"))
        count = 0
        with text.open("w", encoding="utf-8") as file:
            for line in lines:
                if words := line.split():
                    file.write(" ".join(words) + "\n")
                    count += 1
        if not count:
            raise ConfigError("n-gram model: expected sentences, found none")
        _run("train", "--ngram-order", str(order), "--text", str(text), "--lm", str(model))
        if prune:
            _run("prune", "--threshold", f"{prune:g}", "--lm", str(model), "--write-lm", str(pruned))
        with whole_file(to) as partial, (pruned if prune else model).open("rb") as trained:
            shutil.copyfileobj(trained, partial)
    return count


def _run(*words: str) -> None:
    """Run kaldingram.

    Raises:
        ConfigError: it failed, with its last line.
    """
    done = subprocess.run([sys.executable, "-m", "kaldingram.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"kaldingram {words[0]} ended with {done.returncode}: {said[-1] if said else 'no message'}")
