"""The configuration of a run: its sections, how a YAML file is loaded, and what it amounts to."""

from d2v2ds.config.load import load_config
from d2v2ds.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]
