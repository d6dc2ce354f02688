"""Figures of a run for TensorBoard and for the report at its end. Only this module imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v2ds.errors import MissingExtraError


def new_figure(rows: int, columns: int, size: tuple[float, float], *, constrained: bool = False) -> tuple[Any, Any]:
    """Make a figure and its axes. A constrained layout draws several times, which takes seconds beside training."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib", "eval") from error
    figure = Figure(figsize=size, layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def mask_figure(masked: Tensor, columns: int | None = None) -> Any:
    """Draw the M masks of one sample.

    Args:
        masked: (M, T) bool, True = masked.
        columns: tokens in a row of a grid, drawn as one rectangle for each mask; None for a sequence.
    """
    count, picture = masked.shape[0], masked.cpu().numpy()
    height = 0.25 * count
    if columns is not None:
        grids = picture.reshape(count, -1, columns)
        height = 10 / count * grids.shape[1] / columns
        picture = grids.transpose(1, 0, 2).reshape(-1, count * columns)
    size = (10.0, 1 + height)
    figure, axes = new_figure(1, 1, size)
    axes[0, 0].imshow(picture, aspect="auto" if columns is None else "equal", cmap="Greys", interpolation="nearest")
    if columns is not None:
        for edge in range(1, count):
            axes[0, 0].axvline(edge * columns - 0.5, color="tab:red", linewidth=1)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.55 / size[1], top=1 - 0.35 / size[1])
    axes[0, 0].set(xlabel="token", ylabel="mask", title=f"masked (black): {float(masked.float().mean()):.1%}")
    return figure


def alibi_figure(scale: Tensor, slopes: Sequence[float]) -> Any:
    """Draw the learned scale of every head, and the penalty per token: scale times slope of the head.

    Args:
        scale: (L or 1, H or 1), learned.
        slopes: slope of each of the H heads.
    """
    figure, axes = new_figure(1, 2, (10, 3))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.17, top=0.89, wspace=0.4)
    scale = scale.expand(-1, len(slopes))
    for row in scale.tolist():
        axes[0, 0].plot(range(1, len(row) + 1), row, "o-")
    for row in (scale.clamp(min=0) * scale.new_tensor(slopes)).tolist():
        axes[0, 1].plot(range(1, len(row) + 1), row, "o-")
    axes[0, 0].set(xlabel="head", ylabel="scale", title="ALiBi scale (1 at the start)")
    axes[0, 1].set(xlabel="head", ylabel="penalty per token", title="slope x scale", yscale="symlog")
    return figure


def save_curves(records: Sequence[dict[str, float]], names: Sequence[str], path: Path, title: str) -> None:
    """Draw metrics over steps, one panel each, into a PNG.

    Args:
        records: from `read_metrics`.
        names: metrics to draw; one without values gets an empty panel.
        path: file to write.
        title: of the figure.
    """
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure, axes = new_figure(rows, columns, (5 * columns, 3.5 * rows), constrained=True)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot([step for step, _ in points], [value for _, value in points])
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
