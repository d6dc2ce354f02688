"""Recorded exhaustive scores of toy CTC decoding, with and without a language model."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from d2v2ds.decoding.alignment import align
from d2v2ds.decoding.beam import BeamConfig, BeamDecoder
from d2v2ds.decoding.lexicon import read_lexicon
from d2v2ds.errors import D2V2Error
from d2v2ds.tasks.ctc import ctc_losses, greedy
from d2v2ds.tasks.vocabulary import BLANK, SPECIAL, WORD_END, Vocabulary
from d2v2ds.verify.case import ReadTensors
from d2v2ds.verify.report import Report

_WIDE = 200_000


def check_decoding(folder: Path, report: Report) -> None:
    """Compare every case of `decode/`.

    Raises:
        D2V2Error: the files contradict each other.
    """
    values = json.loads((folder / "decode.json").read_text())
    tensors = ReadTensors(load_file(folder / "decode.safetensors"))
    lexicon = read_lexicon(folder / "lexicon.txt")
    listed = [line.split()[0] for line in (folder / "dict.ltr.txt").read_text().splitlines() if line.split()]
    vocabulary = Vocabulary(listed)
    if list(vocabulary.symbols) != values["symbols"] or values["blank"] != BLANK:
        raise D2V2Error(f"symbols: expected {' '.join((*SPECIAL, *listed))}, found {' '.join(values['symbols'])}")
    report.compare("word boundary", vocabulary.symbols.index(WORD_END), values["word_boundary"])
    report.compare("lexicon", float(sorted(lexicon) == sorted(values["words"])), 1.0)
    language_model = next(folder.glob("*.arpa"))
    plain = BeamDecoder(vocabulary, language_model, lexicon)
    orders = [line for line in language_model.read_text().splitlines() if line.startswith("ngram ")]
    report.compare("order of the language model", len(orders), values["lm_order"])
    for example in values["lm_examples"]:
        report.compare("language model", plain.log10(example["words"]), example["log10_sum"])
        report.compare("language model terms", sum(example["log10_terms"]), example["log10_sum"])
    for case in values["cases"]:
        name = f"case{case['case']}"
        logits, log_probs = tensors[f"{name}/logits"], tensors[f"{name}/log_probs"]
        report.compare("log probabilities", F.log_softmax(logits.double(), -1), log_probs)
        report.compare("frames", len(logits), case["frames"])
        _compare_plain(report, case, logits, vocabulary)
        for setting in case["with_lm"]:
            _compare_settings(report, setting, logits, lexicon, vocabulary, plain)
            config = BeamConfig(
                lm_weight=setting["lm_weight"], word_score=setting["word_score"],
                boundary_score=setting["sil_score"], beam=_WIDE, threshold=1e9,
            )  # fmt: skip
            decoder = BeamDecoder(vocabulary, language_model, lexicon, config)
            _compare_beam(report, setting, decoder, log_probs, lexicon)
    if unseen := tensors.unseen():
        raise D2V2Error(f"nothing to compare with {', '.join(unseen)}")


def _compare_plain(report: Report, case: Mapping[str, Any], logits: Tensor, vocabulary: Vocabulary) -> None:
    """Compare the best path, and the exact probabilities of sequences without a language model."""
    log_probs = F.log_softmax(logits.double(), -1)
    best = logits.argmax(-1)
    report.compare("best path", best, torch.tensor(case["best_path"]))
    report.compare("best path score", log_probs.amax(-1).sum(), case["best_path_log_prob"])
    found = greedy(logits[None], torch.tensor([len(logits)]))[0]
    report.compare("best path letters", torch.tensor(found), torch.tensor(case["best_path_labels"]))
    text = " ".join(vocabulary.words(found))
    report.compare("best path text", float(text == case["best_path_text"]), 1.0)
    scores = []
    for one in case["best_label_sequences_no_lm"]:
        report.compare("sequences", _log_probability(logits, one["labels"]), one["log_prob"])
        spelled = "".join(vocabulary.symbols[number] for number in one["labels"])
        report.compare("texts of sequences", float(spelled == one["text"]), 1.0)
        scores.append(one["log_prob"])
    report.compare("order of sequences", float(scores == sorted(scores, reverse=True)), 1.0)


def _compare_settings(
    report: Report,
    setting: Mapping[str, Any],
    logits: Tensor,
    lexicon: Mapping[str, tuple[str, ...]],
    vocabulary: Vocabulary,
    language_model: BeamDecoder,
) -> None:
    """Compare every recorded sequence of words: acoustic score, language model, and their sum."""
    log_probs = F.log_softmax(logits.double(), -1).numpy()
    for kind, factor in (("strict_sum", 1.0), ("strict_max", 1.0), ("strict_sum_lm_in_natural_log", math.log(10))):
        before = math.inf
        for one in setting[kind]:
            letters = [vocabulary.symbols.index(letter) for word in one["words"] for letter in lexicon[word]]
            if kind == "strict_max":
                aligned = align(log_probs, letters)
                acoustic = -math.inf if aligned is None else aligned[0]
            else:
                acoustic = _log_probability(logits, letters)
            log10 = language_model.log10(one["words"])
            total = acoustic + setting["lm_weight"] * log10 * factor + setting["word_score"] * len(one["words"])
            report.compare(f"{kind} acoustic", acoustic, one["acoustic"])
            report.compare(f"{kind} language model", log10, one["lm_log10"])
            report.compare(f"{kind} score", total, one["score"])
            report.compare(f"{kind} order", float(one["score"] <= before), 1.0)
            before = one["score"]


def _compare_beam(
    report: Report,
    setting: Mapping[str, Any],
    decoder: BeamDecoder,
    log_probs: Tensor,
    lexicon: Mapping[str, tuple[str, ...]],
) -> None:
    """Compare the lexicon decoder's hypotheses with the exhaustive ranking."""
    found: dict[tuple[str, ...], float] = {}
    for one in decoder(log_probs):
        found.setdefault(one.words, one.score)
    expected = setting["lexicon_decoder_max"]
    best = max(found, key=lambda words: found[words])
    report.compare("beam: best words", float(list(best) == expected[0]["words"]), 1.0)
    for one in expected:
        words = tuple(one["words"])
        parts = one["acoustic"] + setting["lm_weight"] * one["lm_log10"] + setting["word_score"] * len(words)
        report.compare("beam: sum of parts", parts, one["score"])
        report.compare("beam: language model", decoder.log10(words), one["lm_log10"])
        if words in found:
            report.compare("beam: scores", found[words], one["score"])
    summed = setting["lexicon_decoder_sum"]
    for one in summed:
        words = tuple(one["words"])
        parts = one["acoustic"] + setting["lm_weight"] * one["lm_log10"] + setting["word_score"] * len(words)
        report.compare("beam: sum of parts, alignments added", parts, one["score"])
        report.compare("beam: language model", decoder.log10(words), one["lm_log10"])
        least = max((other["acoustic"] for other in expected if tuple(other["words"]) == words), default=-math.inf)
        report.compare("beam: adding alignments lowers no score", float(one["acoustic"] >= least - 1e-9), 1.0)


def _log_probability(logits: Tensor, letters: list[int]) -> float:
    """Exact ln p of letters, all alignments added."""
    if not letters:
        return float(F.log_softmax(logits.double(), -1)[:, BLANK].sum())
    wanted, lengths = torch.tensor([letters]), torch.tensor([len(letters)])
    return -float(ctc_losses(logits[None].double(), torch.tensor([len(logits)]), wanted, lengths))
