"""What an export folder needs besides weights to load with transformers: code, and settings of its preprocessors.

In: the folder, the model's configuration and its preprocessing. Out: files in the folder, and the keys of config.json
that transformers reads. The code is that of this package: templates of `d2v2ds.interop.hub.files` and every module of
ours that they import, side by side and with relative imports, so that the folder loads where d2v2ds is not installed.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2v2ds.model.trunk import ModelConfig

_PACKAGE = Path(__file__).parents[2]
_TEMPLATES = "d2v2ds.interop.hub.files."
_TOKENIZERS = {
    "sentencepiece": ("tokenization_sentencepiece_d2v2ds", "D2V2DSSentencePieceTokenizer"),
    "bpe": ("tokenization_bpe_d2v2ds", "D2V2DSBytePairTokenizer"),
}
"""Template and class by the kind of a tokenizer."""


def write_hub_files(folder: Path, config: ModelConfig, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """Write code and settings of preprocessors for `transformers.Auto*.from_pretrained(folder)`.

    Args:
        folder: of the export; existing files of these names are replaced.
        config: of the model.
        preprocessing: that of config.json, by modality; a modality that it lacks gets no preprocessor.

    Returns:
        Keys for config.json.
    """
    modules = [f"{_TEMPLATES}configuration_d2v2ds", f"{_TEMPLATES}modeling_d2v2ds"]
    processors: dict[str, dict[str, Any]] = {}
    active = {name: settings for name in config.modalities.active() if (settings := preprocessing.get(name))}
    if "audio" in active:
        modules.append(f"{_TEMPLATES}feature_extraction_d2v2ds")
        processors["feature_extractor"] = _feature_extractor(active["audio"])
    if "image" in active:
        modules.append(f"{_TEMPLATES}image_processing_d2v2ds")
        processors["image_processor"] = _image_processor(active["image"])
    if len(processors) == 1:
        _write_json(folder / "preprocessor_config.json", next(iter(processors.values())))
    elif processors:
        _write_json(folder / "processor_config.json", processors)  # where two of them would want the same file
    if tokenizer := active.get("text", {}).get("tokenizer"):
        modules.append(_TEMPLATES + _TOKENIZERS[tokenizer][0])
        _write_json(folder / "tokenizer_config.json", _tokenizer(active["text"]))
    for name, text in code_files(modules).items():
        (folder / name).write_text(text, encoding="utf-8")
    return {
        "model_type": "d2v2ds",
        "architectures": ["D2V2DSModel"],
        "auto_map": {
            "AutoConfig": "configuration_d2v2ds.D2V2DSConfig",
            "AutoModel": "modeling_d2v2ds.D2V2DSModel",
        },
        "dtype": "float32",  # whatever the file holds: half precision is for storage unless the user asks for it
    }


def _feature_extractor(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_d2v2ds.D2V2DSFeatureExtractor"},
        "feature_extractor_type": "D2V2DSFeatureExtractor",
        "sampling_rate": settings["sample_rate_hz"],
        "variance_eps": settings["variance_eps"],
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def _image_processor(settings: dict[str, Any]) -> dict[str, Any]:
    side = settings["side"]
    return {
        "auto_map": {"AutoImageProcessor": "image_processing_d2v2ds.D2V2DSImageProcessor"},
        "image_processor_type": "D2V2DSImageProcessor",
        "size": {"shortest_edge": settings["shorter_side"]},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }


def _tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    module, name = _TOKENIZERS[settings["tokenizer"]]
    return {
        "auto_map": {"AutoTokenizer": [None, f"{module}.{name}"]},
        "tokenizer_class": name,
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "split_special_tokens": True,  # as in training: `<s>` in a text is three characters
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings["max_tokens"],
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# --- code -------------------------------------------------------------------------------------------------------------


def code_files(modules: Iterable[str]) -> dict[str, str]:
    """Modules of ours, and all of ours that they import, for one flat folder: text by file name.

    transformers copies a module together with those that it imports relatively from its own folder, and no others; the
    first versions of 5 only those that it imports itself, so the modules asked for import all of them.
    """
    files = {}
    for module in modules:
        needed = _with_imports(module)
        name, *others = needed
        lines = [f"from .{other} import __name__ as _{other}\n" for other in sorted(others)]
        needed[name] += "".join(lines)
        files.update({f"{key}.py": text for key, text in needed.items()})
    return files


def _with_imports(module: str) -> dict[str, str]:
    """A module of ours, first, and all of ours that it imports: text by flat name."""
    waiting, files = [module], {}
    while waiting:
        module = waiting.pop()
        name = _flat_name(module)
        if name in files:
            continue
        place = Path(*module.split(".")[1:]).with_suffix(".py")
        source = (_PACKAGE / place).read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for line, imported in _own_imports(source):
            waiting.append(imported)
            at = lines[line - 1]
            lines[line - 1] = re.sub(rf"from {re.escape(imported)} import", f"from .{_flat_name(imported)} import", at)
        files[name] = f"# Copied from d2v2ds/{place.as_posix()} (Apache-2.0).\n" + "".join(lines)
    return files


def _own_imports(source: str) -> list[tuple[int, str]]:
    """Line and module of every `from d2v2ds.x import y`."""
    return [
        (node.lineno, node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("d2v2ds.")
    ]


def _flat_name(module: str) -> str:
    """Templates keep the name that transformers expects; of other modules it is the whole path."""
    return module.removeprefix(_TEMPLATES).replace(".", "_")
