"""Text and tokenizers for the tests of the text packer."""

import json
import random
from functools import lru_cache
from pathlib import Path

from preprocessing.text.tokenization import train_sentencepiece

WORDS = ["the", "and", "of", "sea", "ship", "whale", "old", "man's", "isn't", "they'll", "1851", "42", "naïve", "café",
         "größe", "Привет", "你好", "😀"]  # fmt: skip
SYLLABLES = ["ca", "pe", "ri", "to", "lun", "mes", "dar", "vo", "ni", "shu", "gra", "bel", "fo", "zi", "ka", "wen"]


def story(seed: int, words: int) -> str:
    """A paragraph of that many words, with punctuation, line ends and some white space."""
    rng = random.Random(seed)
    parts = []
    for number in range(words):
        word = rng.choice(WORDS) if rng.random() < 0.4 else "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3)))
        parts.append(word + rng.choice(["", "", "", ",", ".", "!", " -"]))
        parts.append("\n" if number % 9 == 8 else rng.choice([" ", " ", " ", "  "]))
    return "".join(parts).strip()


def write_stories(folder: Path, files: int = 6, paragraphs: int = 20) -> Path:
    """A folder of plain text, `paragraphs` to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        texts = [story(1000 * number + at, 5 + (7 * at) % 40) for at in range(paragraphs)]
        (folder / f"book{number}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return folder


@lru_cache(maxsize=2)
def sentencepiece_model(normalization: str = "nmt_nfkc", vocab_size: int = 420) -> bytes:
    """Trained on stories."""
    return train_sentencepiece([story(seed, 60) for seed in range(60)], vocab_size, normalization)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> GPT-2's kind of id, and merges, of a small byte-level BPE trained on stories."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([story(seed, 60) for seed in range(60)], trainer)
    saved = json.loads(model.to_str())["model"]
    return saved["vocab"] | {"<|endoftext|>": len(saved["vocab"])}, [tuple(pair) for pair in saved["merges"]]


def write_gpt2_files(folder: Path, left_out: int = 0) -> Path:
    """encoder.json, vocab.bpe and a dict.txt in an order of its own, without the last `left_out` merged tokens."""
    encoder, merges = byte_pairs()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    rare = {encoder["".join(pair)] for pair in merges[len(merges) - left_out :]}
    ids = [id for id in encoder.values() if id not in rare]
    random.Random(0).shuffle(ids)
    lines = [f"{id} {1000 - at}\n" for at, id in enumerate(ids)] + ["madeupword0000 0\n", "madeupword0001 0\n"]
    (folder / "dict.txt").write_text("".join(lines))
    return folder
