"""`D2V2DSBytePairTokenizer`: the byte-level byte-pair encoding of GPT-2 with the ids of RoBERTa."""

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import TokenizersBackend
from transformers.tokenization_utils_tokenizers import EncodingFast


class D2V2DSBytePairTokenizer(TokenizersBackend):
    """Reads tokenizer.json as it was trained with; a text becomes `<s> A </s>`, a pair `<s> A </s> </s> B </s>`.

    Special tokens that happen to be written in a text are encoded as the characters they are, as in training:
    tokenizer_config.json, which also names them, says `split_special_tokens`. Tokens behind `<mask>`, which the model
    does not know, become `<unk>`. The class has no `__init__`: for one that has, transformers would rebuild the
    tokenizer from parts and lose the merges.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def update_post_processor(self) -> None:
        """Called where tokenizer.json has no post-processor, as in training."""
        names = self.bos_token, self.eos_token
        self._tokenizer.post_processor = TemplateProcessing(
            single="{} $A {}".format(*names),
            pair="{0} $A {1} {1} $B {1}".format(*names),  # no segment ids
            special_tokens=list(zip(names, (self.bos_token_id, self.eos_token_id), strict=True)),
        )

    def _convert_encoding(self, encoding: EncodingFast, **kwargs: Any) -> tuple[dict[str, Any], list[EncodingFast]]:
        values, encodings = super()._convert_encoding(encoding, **kwargs)
        if len(self) > self.mask_token_id + 1:
            unknown, last = self.unk_token_id, self.mask_token_id
            values["input_ids"] = [[id if id <= last else unknown for id in ids] for ids in values["input_ids"]]
        return values, encodings
