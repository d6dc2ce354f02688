"""Write what an export folder needs besides weights to load with transformers: code, and preprocessors' settings.

In: the folder, the model's configuration and its preprocessing. Out: files in the folder, and the keys of config.json
that transformers reads. The code is that of this package: templates of `d2v2ds.interop.hub.files` and every module of
ours that they import, side by side and with relative imports, so that the folder loads where d2v2ds is not installed.
"""

import ast
import json
import logging
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from d2v2ds.modalities.inference import HubInput
from d2v2ds.modalities.known import known_modalities
from d2v2ds.model.trunk import TrunkConfig
from d2v2ds.tasks.vocabulary import BLANK, WORD_END, Vocabulary

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[2]
_TEMPLATES = "d2v2ds.interop.hub.files."
_NETWORKS = "networks_d2v2ds"
"""Generated module with the network settings of the model's modalities."""
_UNIT_TOKENIZER = ("tokenization_units_d2v2ds", "D2V2DSUnitTokenizer")


def write_hub_files(
    folder: Path, config: TrunkConfig, preprocessing: dict[str, Any], task: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write code and settings of preprocessors for `transformers.Auto*.from_pretrained(folder)`.

    Args:
        folder: of the export; existing files of these names are replaced.
        config: settings of the trunk.
        preprocessing: that of config.json, by modality; a modality that it lacks gets no preprocessor.
        task: settings of a fine-tuning task, as plain values; None for an encoder.

    Returns:
        Keys for config.json; none, and no files, if transformers has no name for the input of a modality.
    """
    hubs = {name: known_modalities()[name].hub for name in config.modalities}
    inputs = {name: hub for name, hub in hubs.items() if hub is not None}
    if inputs.keys() != hubs.keys():
        absent = ", ".join(name for name, hub in hubs.items() if hub is None)
        logger.info("no files for transformers: it has no input of %s", absent)
        return {}
    modules = [f"{_TEMPLATES}configuration_d2v2ds", f"{_TEMPLATES}modeling_d2v2ds"]
    processors: dict[str, dict[str, Any]] = {}
    for name, hub in inputs.items():
        if settings := preprocessing.get(name):
            modules += [_TEMPLATES + module for module in hub.modules(settings)]
            processors |= hub.files(settings)
    of_task = _task_keys(task, inputs) if task else {}
    if of_task:
        modules.append(f"{_TEMPLATES}heads_d2v2ds")
    if task and "vocabulary" in task:
        processors["tokenizer_config"] = _write_vocabulary(folder, task["vocabulary"])
        if task.get("units"):  # the caller writes their sentencepiece model
            modules.append(f"{_TEMPLATES}{_UNIT_TOKENIZER[0]}")
            processors["tokenizer_config"] |= {
                "tokenizer_class": _UNIT_TOKENIZER[1],
                "auto_map": {"AutoTokenizer": [".".join(_UNIT_TOKENIZER), None]},
            }
    if tokenizer := processors.pop("tokenizer_config", None):
        _write_json(folder / "tokenizer_config.json", tokenizer)
    if len(processors) == 1:
        _write_json(folder / "preprocessor_config.json", next(iter(processors.values())))
    elif processors:
        _write_json(folder / "processor_config.json", processors)  # two processors would want the same file
    for name, text in code_files(modules, _networks_source(inputs)).items():
        (folder / name).write_text(text, encoding="utf-8")
    keys: dict[str, Any] = {
        "model_type": "d2v2ds",
        "architectures": ["D2V2DSModel"],
        "auto_map": {
            "AutoConfig": "configuration_d2v2ds.D2V2DSConfig",
            "AutoModel": "modeling_d2v2ds.D2V2DSModel",
        },
        "dtype": "float32",  # whatever the file holds: half precision is for storage unless the user asks for it
    }
    keys["auto_map"] |= of_task.pop("auto_map", {})
    return keys | of_task


def _task_keys(task: Mapping[str, Any], inputs: Mapping[str, HubInput]) -> dict[str, Any]:
    """Keys of config.json for a fine-tuned model; none for an objective of pretraining."""
    keys: dict[str, Any]
    if task.get("name") == "ctc":
        kind, keys = "CTC", {"vocab_size": len(Vocabulary(task["vocabulary"])), "pad_token_id": BLANK}
    elif task.get("name") == "classify":
        kind = inputs[task["modality"]].classifier
        names = task["classes"] or [str(number) for number in range(task["num_outputs"])]
        keys = {"id2label": {str(i): name for i, name in enumerate(names)}}
        keys |= {"label2id": {name: i for i, name in enumerate(names)}, "problem_type": _PROBLEMS[task["kind"]]}
    else:
        return {}
    name = f"D2V2DSFor{kind}"
    return keys | {"architectures": [name], "auto_map": {f"AutoModelFor{kind}": f"heads_d2v2ds.{name}"}}


_PROBLEMS = {"one": "single_label_classification", "several": "multi_label_classification", "number": "regression"}


def _write_vocabulary(folder: Path, units: Sequence[str]) -> dict[str, Any]:
    """Write vocab.json; returns tokenizer_config.json. transformers calls the blank, our `<s>`, `<pad>`."""
    names = ["<pad>", "<s>", *Vocabulary(units).symbols[2:]]
    _write_json(folder / "vocab.json", {name: number for number, name in enumerate(names)})
    return {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "word_delimiter_token": WORD_END,
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
    }


def _networks_source(inputs: Mapping[str, HubInput]) -> str:
    """Source of the module that `modeling_d2v2ds` reads its modalities from."""
    lines = ['"""Network settings of this model\'s modalities, and how its forward calls their inputs."""', ""]
    entries = []
    for name, hub in inputs.items():
        network = known_modalities()[name].network
        lines.append(f"from {network.__module__} import {network.__name__}")
        entries.append(f"    {name!r}: ({network.__name__}, {hub.argument!r}, {hub.is_padded}, {hub.pad_id}),")
    return "\n".join([*lines, "", "NETWORKS = {", *entries, "}", ""])


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# --- code -------------------------------------------------------------------------------------------------------------


def code_files(modules: Sequence[str], networks: str) -> dict[str, str]:
    """Copy modules of d2v2ds, and all of d2v2ds that they import, for one flat folder: text by file name.

    transformers copies a module together with those that it imports relatively from its own folder, and no others; the
    first versions of 5 only those that it imports itself, so the modules asked for import all of them.

    Args:
        modules: full names.
        networks: source of the module `networks_d2v2ds`.
    """
    files = {}
    for module in modules:
        needed = _with_imports(module, networks)
        name, *others = needed
        lines = [f"from .{other} import __name__ as _{other}\n" for other in sorted(others)]
        needed[name] += "".join(lines)
        files.update({f"{key}.py": text for key, text in needed.items()})
    # transformers finds a class that it has imported by the folder's name and the text of its module, in a process with
    # two exports of one name: so each module's text tells what the others are
    digest = sha256("".join(f"{name}\n{text}" for name, text in sorted(files.items())).encode()).hexdigest()
    for module in modules:
        files[f"{_flat_name(module)}.py"] += f"# Digest of all modules of this export: {digest}\n"
    return files


def _with_imports(module: str, networks: str) -> dict[str, str]:
    """A module of d2v2ds, first, and all of d2v2ds that it imports: text by flat name."""
    waiting, files = [module], {}
    while waiting:
        module = waiting.pop()
        name = _flat_name(module)
        if name in files:
            continue
        place = Path(*module.split(".")[1:]).with_suffix(".py")
        source = networks if name == _NETWORKS else (_PACKAGE / place).read_text(encoding="utf-8")
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
