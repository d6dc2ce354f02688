"""The model card: README.md of an export folder, for people and for the hub."""

import shlex
from pathlib import Path
from typing import Any

from d2v2ds.interop.export_folder import Description
from d2v2ds.modalities.known import known_modalities

METHODS = {
    "data2vec2": ("data2vec2", "A data2vec 2.0 encoder (arXiv 2212.07525)"),
    "data2vec1": ("data2vec1", "A data2vec 1.0 encoder (arXiv 2202.03555)"),
    "mae": ("mae", "An MAE encoder (arXiv 2111.06377)"),
}
"""Tag and first words of the card, by the name of the objective; a fine-tuned model counts as the first."""


def card(description: Description, name: str, num_parameters: int, *, has_curves: bool) -> str:
    """The text.

    Args:
        description: of the model.
        name: of the folder.
        num_parameters: elements of all tensors of the student.
        has_curves: whether curves.png lies beside.
    """
    model, origin = description.model, description.origin
    method = METHODS.get((description.objective or {}).get("name", ""), METHODS["data2vec2"])
    modalities = list(model.modalities)
    depths = ", ".join(f"{n} {c.prenet_depth} + {model.shared_depth}" for n, c in model.modalities.items())
    lines = [
        "---",
        "library_name: d2v2ds",
        f"tags: [{', '.join([method[0], *modalities])}]",
        "---",
        "",
        f"# {name}",
        "",
        f"{method[1]} of {', '.join(modalities)}: width {model.block.width}, "
        f"{model.block.num_heads} heads, blocks (own + shared) {depths}; {num_parameters:,} parameters are stored.",
        "",
        *_example(name, modalities[0]),
        *_with_transformers(name, description),
        "## Where the weights come from",
        "",
        *_facts(origin),
    ]
    if has_curves:
        lines += ["", "![curves](curves.png)"]
    if origin.get("licence"):
        lines += ["", "## Licence", "", str(origin["licence"])]
    return "\n".join(lines) + "\n"


def _example(name: str, modality: str) -> list[str]:
    """Code that extracts features, if raw inputs of the modality can be read."""
    hub = known_modalities()[modality].hub
    if hub is None:
        return []
    use = ["from d2v2ds import FeatureExtractor", f'extractor = FeatureExtractor("{name}")', hub.example]
    return ["```python", *use, "```", ""]


_PREPROCESSORS = {
    "feature_extractor": "AutoFeatureExtractor",
    "image_processor": "AutoImageProcessor",
    "tokenizer_config": "AutoTokenizer",
}
"""Class of transformers by the kind of a preprocessor, as `HubInput.files` names it."""
_TRUST = (
    "`trust_remote_code=True` runs the Python files of this folder with all your rights. Set it for a folder that you "
    "made yourself, or whose author you trust: read its `.py` files first, and name a `revision` if it comes from the "
    "hub. `FeatureExtractor` and `load_model` of d2v2ds run no code of the folder."
)
"""Stands beside every example with that argument."""


def _with_transformers(name: str, description: Description) -> list[str]:
    """Code that loads the folder with transformers, and whom to trust for it; nothing if transformers cannot."""
    hubs = {modality: known_modalities()[modality].hub for modality in description.model.modalities}
    kinds: list[str] = []
    for modality, hub in hubs.items():
        if hub is None:
            return []
        kinds += hub.files(description.preprocessing[modality])
    classes = [_PREPROCESSORS[kind] for kind in kinds if kind in _PREPROCESSORS]
    loads = [f'{one}.from_pretrained("{name}", trust_remote_code=True)' for one in (*classes, "AutoModel")]
    lines = ["## With transformers", "", "```python", f"from transformers import {', '.join([*classes, 'AutoModel'])}"]
    lines += [*loads, "```", "", _TRUST]
    if len(classes) > 1:
        lines += [
            "",
            f"Load each preprocessor by its own class ({', '.join(classes)}): `AutoProcessor` gives one alone.",
        ]
    return [*lines, ""]


def _facts(origin: dict[str, Any]) -> list[str]:
    """One line for each known fact."""
    lines = [f"- {key.replace('_', ' ')}: {_text(origin[key])}" for key in SHOWN if origin.get(key)]
    for modality, facts in origin.get("data", {}).items():
        lines.append(f"- trained on {modality}: " + ", ".join(f"{key} {_text(value)}" for key, value in facts.items()))
    return lines


SHOWN = ("source", "step", "of_steps", "command", "world_size", "started", "git_revision", "versions", "final_metrics")
"""Keys of `Description.origin` that the card shows, in its order."""


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return f"`{shlex.join(map(str, value))}`"
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_card(folder: Path, description: Description, name: str, num_parameters: int) -> None:
    """Write README.md into a folder that is being written; curves.png must be there already if there is one."""
    text = card(description, name, num_parameters, has_curves=(folder / "curves.png").is_file())
    (folder / "README.md").write_text(text, encoding="utf-8")
