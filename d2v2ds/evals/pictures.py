"""Pictures of an evaluation (matplotlib, extra `eval`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from d2v2ds.errors import MissingExtraError

_NAMED_CLASSES = 30


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """Make a figure with one pair of axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib", "eval") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def draw_rates_by_length(groups: Sequence[tuple[float, float, int]], path: Path) -> None:
    """Draw the word error rate of groups of utterances over their mean length."""
    figure, axes = _axes(6, 4)
    axes.plot([seconds for seconds, _, _ in groups], [rate for _, rate, _ in groups], marker="o")
    for seconds, rate, count in groups:
        axes.annotate(str(count), (seconds, rate), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set(xlabel="seconds (mean of a group; its utterances beside the point)", ylabel="WER (%)", ylim=(0, None))
    figure.savefig(path, dpi=120)


def draw_confusion(counts: NDArray[Any], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as shares of each right class."""
    size = max(4.0, min(0.35 * len(counts), 14.0))
    figure, axes = _axes(size + 1, size)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, label="share of the right class")
    if len(counts) <= _NAMED_CLASSES and classes:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="found", ylabel="right")
    figure.savefig(path, dpi=120)
