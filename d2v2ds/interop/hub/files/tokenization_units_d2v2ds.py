"""`D2V2DSUnitTokenizer`: sentencepiece units of a recogniser, a word end `|` behind the units of every word."""

import shutil
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2CTCTokenizer


class D2V2DSUnitTokenizer(Wav2Vec2CTCTokenizer):
    """Reads vocab.json and units.model. Outputs become text as those of letters do; only text -> ids needs
    sentencepiece."""

    vocab_files_names = {"vocab_file": "vocab.json", "units_file": "units.model"}

    def __init__(self, vocab_file: str, units_file: str, **kwargs: Any) -> None:
        """
        Args:
            vocab_file: numbers of the units.
            units_file: the sentencepiece model, which divides words.
            kwargs: of `Wav2Vec2CTCTokenizer`.
        """
        self.units_file = units_file
        super().__init__(vocab_file, **kwargs)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Divide every word into units, with a word end behind it, as in training."""
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=self.units_file)
        return [
            unit for word in text.split() for unit in (*model.encode(word, out_type=str), self.word_delimiter_token)
        ]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write vocab.json and copy the sentencepiece model."""
        written = super().save_vocabulary(save_directory, filename_prefix)
        name = self.vocab_files_names["units_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.units_file).resolve():
            shutil.copyfile(self.units_file, target)
        return (*written, str(target))
