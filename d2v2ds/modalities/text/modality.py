"""Text, as one object."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v2ds.data.reader import DataSettings
from d2v2ds.data.schema import Index, read_beside, read_index
from d2v2ds.errors import CheckpointError, MissingExtraError
from d2v2ds.io.read import read_bytes
from d2v2ds.modalities.demo import Prepared
from d2v2ds.modalities.inference import GraphInput, HubInput
from d2v2ds.modalities.modality import Baseline, Modality, ProbeDefaults
from d2v2ds.modalities.text.demo import prepare
from d2v2ds.modalities.text.inference import TextInference
from d2v2ds.modalities.text.network import TextNetwork
from d2v2ds.modalities.text.reader import TOKENS, TextDataConfig, TextReader
from d2v2ds.modalities.text.shards import SENTENCES, TextShards
from d2v2ds.modalities.text.tokenizers import TOKENIZER_BYTES
from d2v2ds.shapes import PAD_ID


def tf_idf(texts: Iterable[Tensor]) -> Any:
    """TF-IDF of the token ids of every text, fitted on all of them: a sparse matrix (N, V)."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise MissingExtraError("probes need scikit-learn", "eval") from error
    words = [" ".join(map(str, ids.tolist())) for ids in texts]
    return TfidfVectorizer(token_pattern=r"\d+").fit_transform(words)


def _sentences(index: Index) -> int:
    """Return the sentences of a packed row: 2 for pairs, else 1."""
    found: int = index.format.get(SENTENCES, 1)
    return found


_HUB_TOKENIZERS = {
    "sentencepiece": ("tokenization_sentencepiece_d2v2ds", "D2V2DSSentencePieceTokenizer"),
    "bpe": ("tokenization_bpe_d2v2ds", "D2V2DSBytePairTokenizer"),
}
"""Template and class by the kind of a tokenizer."""


def _hub_files(preprocessing: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not preprocessing["tokenizer"]:
        return {}
    module, name = _HUB_TOKENIZERS[preprocessing["tokenizer"]]
    return {
        "tokenizer_config": {
            "auto_map": {"AutoTokenizer": [None, f"{module}.{name}"]},
            "tokenizer_class": name,
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "split_special_tokens": True,  # as in training: `<s>` in a text is three characters
            "clean_up_tokenization_spaces": False,
            "model_max_length": preprocessing["max_tokens"],
        }
    }


def _graph_sizes(network: Any, tokens: Any) -> list[int]:
    return [count for count in tokens if count < network.max_tokens] + [network.max_tokens]


def _draw_ids(network: Any, rows: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(PAD_ID + 1, network.vocab_size, (rows, size), generator=generator)


class Text(Modality):
    """Text: blocks of token ids, padded; amounts in tokens."""

    name = "text"
    shards = TextShards
    must_be_equal = ("vocab_size", "special")
    packer = "python -m preprocessing.pack_text"
    network = TextNetwork
    data = TextDataConfig
    reader = TextReader
    unit = TOKENS
    input_layer = "local.tokens"
    probe = ProbeDefaults(c=1.0, neighbours=10)
    baseline = Baseline("TF-IDF of the tokens", tf_idf)
    hub = HubInput(
        argument="input_ids",
        classifier="SequenceClassification",
        example='features = extractor(["A sentence."])',
        pad_id=PAD_ID,
        modules=lambda preprocessing: (
            [_HUB_TOKENIZERS[preprocessing["tokenizer"]][0]] if preprocessing["tokenizer"] else []
        ),
        files=_hub_files,
    )
    graph = GraphInput(axes=("batch", "tokens"), padding=float(PAD_ID), sizes=_graph_sizes, draw=_draw_ids)

    def run_length(self, run: Any) -> float | None:
        """Tokens of `run.tokens`."""
        return None if run.tokens is None else float(run.tokens)

    def whole_inputs(self, folder: Path, preprocessing: Mapping[str, Any]) -> DataSettings:
        """Texts of any length up to a block."""
        return TextDataConfig(shards=folder, global_batch_tokens=1, micro_batch_tokens=1)

    def describe_preprocessing(self, network: Any, data: Any | None, index: Index | None) -> dict[str, Any]:
        """<s> in front, </s> at the end; `file` holds the tokenizer of kind `tokenizer`.

        `sentences` is 2 for rows of pairs and 1 for others; without an index it is not known and absent.
        """
        found = {"tokenizer": None, "file": None, "max_tokens": network.max_tokens}
        if index is not None:
            found[SENTENCES] = _sentences(index)
        if index is not None and index.files_beside:
            found |= {"tokenizer": index.format["tokenizer"], "file": index.files_beside[0].file}
        return found

    def files_beside(self, preprocessing: Mapping[str, Any]) -> tuple[str, ...]:
        """Tokenizer, if the export has one."""
        return (preprocessing["file"],) if preprocessing.get("file") else ()

    def packed_faults(self, model_folder: Path, preprocessing: Mapping[str, Any], shards: Path) -> list[str]:
        """Compare the tokenizer of packed rows with the model's; nothing is said where one of them is unknown."""
        file = preprocessing.get("file")
        entries = read_index(shards).files_beside
        beside = [read_beside(shards, entry) for entry in entries]
        if file is None or not beside or read_bytes(model_folder / file, CheckpointError, TOKENIZER_BYTES) in beside:
            return []
        own = model_folder / file
        return [f"{shards}: was packed with another tokenizer than the model's; pack with --tokenizer {own}"]

    def row_faults(self, preprocessing: Mapping[str, Any], shards: Path) -> list[str]:
        """Compare whether rows are pairs of sentences; nothing is said where that is not known of the model."""
        own, other = preprocessing.get(SENTENCES), _sentences(read_index(shards))
        if own in (other, None):
            return []
        kinds = {2: "pairs of sentences", 1: "single texts"}
        if own not in tuple(kinds):
            return [f"{SENTENCES} of the model's preprocessing is {own!r:.40}, expected 1 or 2"]
        advice = "with --pair-columns" if own == 2 else "without --pair-columns"
        return [f"{shards}: expected {kinds[own]} as in training, found {kinds[other]}; pack {advice}"]

    def prepare_demo(self, runs: Path, data: Path | None) -> Prepared:
        """Pack a sample, or the user's own data."""
        return prepare(runs, data)

    def inference(self, network: Any, preprocessing: Mapping[str, Any], folder: Path) -> TextInference:
        """Strings and token ids."""
        return TextInference(network, preprocessing, folder)


TEXT = Text()
