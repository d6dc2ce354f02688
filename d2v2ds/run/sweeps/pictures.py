"""Pictures of a sweep (matplotlib, extra `eval`)."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from d2v2ds.run.sweeps.scores import Row
from d2v2ds.run.sweeps.statistics import mean_interval, pareto_front
from d2v2ds.train.figures import new_figure


def draw_time(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the score of every setting against its training time, mean over seeds, with the Pareto front of the means.

    Args:
        rows: of one measure.
        path: file to write.
        title: of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure(1, 1, (8, 5), constrained=True)
    axis = axes[0, 0]
    means: list[tuple[float, float]] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        curve = _mean_curve(own)
        means += [point for point in curve if point[0] > 0]
        seeds = len({row.seed for row in own})
        (line,) = axis.plot(*zip(*curve, strict=True), "o-", label=f"{setting} ({seeds} seed{'s' * (seeds > 1)})")
        if seeds > 1:
            axis.plot([row.seconds for row in own], [row.score for row in own], ".", color=line.get_color(), alpha=0.35)
    front = [means[number] for number in pareto_front(means, is_error=rows[0].is_error)]
    if front:
        axis.plot(
            *zip(*front, strict=True), drawstyle="steps-post", color="black", linestyle="--", label="Pareto front",
            zorder=0,
        )  # fmt: skip
    axis.set(xlabel="seconds of training, without probes, validation and saving", ylabel=f"{rows[0].measure} (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _mean_curve(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Mean time and score over seeds at each point of a setting, in order; a seed that lacks it is left out."""
    points: dict[int, list[Row]] = {}
    for seed in dict.fromkeys(row.seed for row in rows):
        own = sorted((row for row in rows if row.seed == seed), key=lambda row: row.steps)
        for number, row in enumerate(own):
            points.setdefault(number, []).append(row)
    return [(fmean(row.seconds for row in at), fmean(row.score for row in at)) for _, at in sorted(points.items())]


def draw_switches(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the last score by the value of each switch, with intervals over seeds; a line for each value of the others.

    Args:
        rows: the last score of every cell, of one measure.
        path: file to write.
        title: of the picture.

    Raises:
        MissingExtraError: matplotlib or SciPy is not installed.
    """
    if not rows:
        return
    switches = list(rows[0].switches)
    figure, axes = new_figure(1, len(switches), (max(5.0, 4.5 * len(switches)), 4.5), constrained=True)
    for axis, switch in zip(axes[0], switches, strict=True):
        _draw_switch(axis, rows, switch)
        axis.set(xlabel=switch, ylabel=f"{rows[0].measure} (%)")
        axis.grid(alpha=0.3)
    seeds = sorted({len({row.seed for row in rows if row.setting == one}) for one in {row.setting for row in rows}})
    count = "1 seed, no intervals" if seeds == [1] else f"95 % t intervals over {' to '.join(map(str, seeds))} seeds"
    figure.suptitle(f"{title}\n{count}" if title else count, fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_switch(axis: Any, rows: Sequence[Row], switch: str) -> None:
    """Draw one panel."""
    values = list(dict.fromkeys(row.switches[switch] for row in rows))
    lines: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in rows:
        others = tuple((name, value) for name, value in row.switches.items() if name != switch)
        lines.setdefault(others, []).append(row)
    for number, (others, own) in enumerate(lines.items()):
        shift = 0.06 * (number - (len(lines) - 1) / 2)
        places, means, margins = [], [], []
        for place, value in enumerate(values):
            scores = [row.score for row in own if row.switches[switch] == value]
            if scores:
                found = mean_interval(scores)
                places.append(place + shift)
                means.append(found.mean)
                margins.append(0.0 if math.isnan(found.low) else found.mean - found.low)
        label = ", ".join(f"{name} {value}" for name, value in others)
        line = axis.errorbar(places, means, margins, fmt="o-", capsize=4, label=label or None)[0]
        seeds = [(values.index(row.switches[switch]) + shift, row.score) for row in own]
        axis.plot(*zip(*seeds, strict=True), ".", color=line.get_color(), alpha=0.35)
    axis.set_xticks(range(len(values)), values, rotation=0 if max(map(len, values)) < 9 else 20)
    if len(lines) > 1:
        axis.legend(fontsize="small")
