"""d2v2ds: data2vec 2.0 pretraining with DeepSpeed ZeRO-3 and a sharded EMA teacher.

from d2v2ds import FeatureExtractor, load_model
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2v2ds.api import FeatureExtractor, load_model

__version__ = "0.1.0"
__all__ = ["FeatureExtractor", "load_model"]


def __getattr__(name: str) -> Any:
    """Imported at first use: packing imports this package too, and must not wait for torch."""
    if name in __all__:
        from d2v2ds import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
