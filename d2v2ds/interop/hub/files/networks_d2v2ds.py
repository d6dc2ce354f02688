"""Network settings of a model's modalities, and how its forward calls their inputs.

An export gets a generated module of this name with its own modalities; this one stands for it in type checks.
"""

from typing import Any

NETWORKS: dict[str, tuple[Any, str, bool, int | None]] = {}
"""Modality -> settings class, argument of the forward, whether it can be padded, id of padding or None."""
