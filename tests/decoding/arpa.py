"""A 3-gram model with back-off: as a table, as an ARPA file, and its probabilities by the definition."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """log10 probabilities and back-off weights by the words of a gram."""

    grams: dict[Gram, float]
    backoffs: dict[Gram, float]

    def write(self, path: Path) -> Path:
        """Write an ARPA file."""
        orders = sorted({len(gram) for gram in self.grams})
        lines = ["\\data\\", *(f"ngram {n}={sum(len(gram) == n for gram in self.grams)}" for n in orders)]
        for n in orders:
            lines += ["", f"\\{n}-grams:"]
            for gram, value in self.grams.items():
                if len(gram) == n:
                    backoff = f"\t{self.backoffs[gram]}" if gram in self.backoffs else ""
                    lines.append(f"{value}\t{' '.join(gram)}{backoff}")
        path.write_text("\n".join([*lines, "", "\\end\\", ""]))
        return path

    def log10(self, words: Sequence[str]) -> float:
        """log10 p of a sentence and its end, by Katz's definition."""
        total, history = 0.0, ("<s>",)
        for word in (*words, "</s>"):
            word = word if (word,) in self.grams else "<unk>"
            total += self._conditional(word, history[-2:])
            history = (*history, word)
        return total

    def _conditional(self, word: str, history: Gram) -> float:
        if (*history, word) in self.grams:
            return self.grams[*history, word]
        return self.backoffs.get(history, 0.0) + self._conditional(word, history[1:])


TOY = Model(
    grams={
        ("<s>",): -99.0, ("</s>",): -0.7, ("<unk>",): -1.3, ("A",): -0.6, ("AB",): -0.9, ("B",): -1.1, ("BA",): -0.8,
        ("<s>", "A"): -0.4, ("<s>", "AB"): -0.7, ("A", "B"): -0.2, ("B", "A"): -0.5, ("A", "</s>"): -0.6,
        ("AB", "A"): -0.3, ("B", "</s>"): -0.1,
        ("<s>", "A", "B"): -0.15, ("A", "B", "A"): -0.9, ("A", "B", "</s>"): -1.2, ("<s>", "AB", "A"): -0.05,
    },
    backoffs={
        ("<s>",): -0.3, ("A",): -0.25, ("AB",): -0.15, ("B",): -0.45, ("BA",): -0.05,
        ("<s>", "A"): -0.35, ("A", "B"): -0.2, ("B", "A"): -0.1,
    },
)  # fmt: skip
