"""`D2V2DSSentencePieceTokenizer`: a sentencepiece model whose ids follow fairseq's dictionary.

`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the model's other pieces in their order, `<mask>` last. sentencepiece itself
does the work, so that ids are those of training for any text.
"""

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>")
MASK_NAME = "<mask>"
_UNK = 3


class D2V2DSSentencePieceTokenizer(PreTrainedTokenizer):
    """Reads tokenizer.model; a text becomes `<s> A </s>`, a pair `<s> A </s> </s> B </s>`.

    Special tokens that happen to be written in a text are encoded as the characters they are, as in training:
    tokenizer_config.json, which also names them, says `split_special_tokens`.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """
        Args:
            vocab_file: the sentencepiece model.
            kwargs: of `PreTrainedTokenizer`.
        """
        self.vocab_file = vocab_file
        self._model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        model = self._model
        own = {model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id()}
        if model.id_to_piece(model.piece_to_id(MASK_NAME)) == MASK_NAME:
            own.add(model.piece_to_id(MASK_NAME))
        others = [model.id_to_piece(id) for id in range(model.vocab_size()) if id not in own]
        self._pieces = [*SPECIAL_NAMES, *others, MASK_NAME]
        self._ids = {piece: id for id, piece in enumerate(self._pieces)}
        super().__init__(special_tokens_pattern="bos_eos", **kwargs)

    @property
    def vocab_size(self) -> int:
        """V, number of ids."""
        return len(self._pieces)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put special ids around one or two sequences."""
        start, end = self.bos_token_id, self.eos_token_id
        first = [start, *token_ids_0, end]
        return first if token_ids_1 is None else [*first, end, *token_ids_1, end]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Mark special ids by 1."""
        if already_has_special_tokens:
            mask: list[int] = super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
            return mask
        first = [1, *([0] * len(token_ids_0)), 1]
        return first if token_ids_1 is None else [*first, 1, *([0] * len(token_ids_1)), 1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return zeros: there are no segment ids."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {**self._ids, **self._added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces: list[str] = self._model.encode(text, out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, _UNK)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces, special ones left out."""
        text: str = self._model.decode([token for token in tokens if token not in (*SPECIAL_NAMES, MASK_NAME)])
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the sentencepiece model."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
