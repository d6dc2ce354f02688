"""Tables and pictures of a sweep from the cells that are there."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2v2ds.errors import MissingExtraError
from d2v2ds.io import durable
from d2v2ds.run.sweeps.cells import Cell, settings_of
from d2v2ds.run.sweeps.pictures import draw_switches, draw_time
from d2v2ds.run.sweeps.scores import Row, rows_of
from d2v2ds.run.sweeps.settings import Sweep
from d2v2ds.run.sweeps.statistics import Interval, mean_interval, ratio_interval, time_to_reach

logger = logging.getLogger(__name__)

TABLE, REACH = "sweep.csv", "reach.csv"


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Time of one setting to a score."""

    setting: str
    measure: str
    target: float
    seeds: int
    """Seeds that were run."""
    at_start: int
    """Seeds whose random start has it already: they say nothing about the time."""
    reached: int
    """Seeds that reached it while they trained."""
    seconds: Interval | None
    """Over the seeds that reached it."""
    ratio: Interval | None
    """Time over that of the reference, of the seeds in which both reached it; the reference has none."""


def report(sweep: Sweep, cells: Sequence[Cell], *, quiet: bool = False) -> None:
    """Write sweep.csv, reach.csv and the pictures, and log the table of settings.

    Args:
        sweep: of the cells.
        cells: all of them; those without scores are left out.
        quiet: write sweep.csv alone.

    Raises:
        ConfigError: a file of a cell cannot be read.
    """
    rows = [row for cell in cells for row in rows_of(sweep, cell)]
    durable.replace_text(sweep.dir / TABLE, table_text(rows, list(cells[0].switches)))
    if quiet or not rows:
        return
    try:
        reached = reach_table(sweep, rows, settings_of(cells))
        if reached:
            durable.replace_text(sweep.dir / REACH, reach_text(reached))
        for line in [*summary(rows), *map(reach_line, reached)]:
            logger.info("%s", line)
        for measure in dict.fromkeys(row.measure for row in rows):
            own = [row for row in rows if row.measure == measure]
            name = measure.replace("/", "_")
            draw_time(own, sweep.dir / f"time_{name}.png", sweep.title)
            draw_switches(last_rows(own), sweep.dir / f"switches_{name}.png", sweep.title)
    except MissingExtraError as error:
        logger.info("left out: %s", error)
    logger.info("%s: %d scores of %d cells", sweep.dir / TABLE, len(rows), len({row.cell for row in rows}))


def table_text(rows: Sequence[Row], switches: Sequence[str]) -> str:
    """Write rows as CSV, a column for each switch."""
    own = ("seed", "measure", "steps", "samples", "unit", "seconds", "score", "low", "high", "memory_gib")
    lines = [["cell", *switches, *own]]
    for row in rows:
        lines.append([row.cell, *(row.switches[name] for name in switches), *(_cell(getattr(row, one)) for one in own)])
    return _csv(lines)


def last_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the last score of every cell and measure, without those of random starts."""
    last = {(row.cell, row.measure): row for row in sorted(rows, key=lambda row: row.steps) if row.steps > 0}
    return list(last.values())


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines with the last score of every setting: mean and t interval over its seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in last_rows(rows):
        groups.setdefault((row.measure, row.setting), []).append(row)
    width = max((len(setting) for _, setting in groups), default=0)
    lines = []
    for (measure, setting), own in groups.items():
        score, seconds = (mean_interval([getattr(row, name) for row in own]) for name in ("score", "seconds"))
        steps = "/".join(str(one) for one in sorted({row.steps for row in own}))
        lines.append(
            f"{setting:{width}}  {measure} {_interval(score)}  {seconds.mean:.1f} s of training, {steps} steps, "
            f"{len(own)} seed{'s' * (len(own) > 1)}"
        )
    return lines


# -------------------------------------------------------------------- time to a score


def reach_table(sweep: Sweep, rows: Sequence[Row], settings: Sequence[str]) -> list[Reached]:
    """Compare the times to reach fixed scores, of measures that have several points of time."""
    reference = sweep.reference or settings[0]
    found = []
    for measure in dict.fromkeys(row.measure for row in rows if row.steps == 0):
        for target in sweep.reach:
            times = {name: _times(rows, measure, name, target) for name in settings}
            found += [
                _reached(name, measure, target, own, {} if name == reference else times[reference])
                for name, own in times.items()
                if own
            ]
    return found


def _times(rows: Sequence[Row], measure: str, setting: str, target: float) -> dict[int, float | None]:
    """Time of each seed to a score; None if it did not reach it."""
    seeds = dict.fromkeys(row.seed for row in rows if row.setting == setting)
    found = {}
    for seed in seeds:
        own = [row for row in rows if (row.measure, row.setting, row.seed) == (measure, setting, seed)]
        points = sorted((row.seconds, row.score) for row in own)
        if points:
            found[seed] = time_to_reach(points, target, is_error=own[0].is_error)
    return found


def _reached(
    setting: str, measure: str, target: float, own: Mapping[int, float | None], reference: Mapping[int, float | None]
) -> Reached:
    times = {seed: seconds for seed, seconds in own.items() if seconds}  # 0 s is a random start
    pairs = [(seconds, other) for seed, seconds in times.items() if (other := reference.get(seed))]
    return Reached(
        setting=setting,
        measure=measure,
        target=target,
        seeds=len(own),
        at_start=sum(seconds == 0 for seconds in own.values()),
        reached=len(times),
        seconds=mean_interval(list(times.values())) if times else None,
        ratio=ratio_interval([one for one, _ in pairs], [other for _, other in pairs]) if pairs else None,
    )


def reach_line(one: Reached) -> str:
    """Line for a reader."""
    said = f"{one.setting}: {one.measure} {one.target:g} reached by {one.reached} of {one.seeds} seeds"
    if one.at_start:
        said += f" (the random start of {one.at_start} has it)"
    if one.seconds is not None:
        said += f", after {_interval(one.seconds)} s"
    if one.ratio is not None:
        said += f", {_interval(one.ratio, 2)} times the reference's time ({one.ratio.count} pairs of seeds)"
    return said


def reach_text(found: Sequence[Reached]) -> str:
    """Write times and ratios as CSV."""
    lines: list[list[Any]] = [
        ["setting", "measure", "target", "seeds", "at_start", "reached", "seconds", "seconds_low", "seconds_high",
         "ratio", "ratio_low", "ratio_high", "pairs"]
    ]  # fmt: skip
    for one in found:
        numbers = [
            _cell(value)
            for part in (one.seconds, one.ratio)
            for value in ((None,) * 3 if part is None else (part.mean, part.low, part.high))
        ]
        pairs = 0 if one.ratio is None else one.ratio.count
        lines.append(
            [one.setting, one.measure, _cell(one.target), one.seeds, one.at_start, one.reached, *numbers, pairs]
        )
    return _csv(lines)


def _interval(found: Interval, digits: int = 1) -> str:
    bounds = "" if math.isnan(found.low) else f" (95 %: {found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.mean:.{digits}f}{bounds}"


def _cell(value: Any) -> Any:
    """Value of a table: nothing for what is unknown, six digits of a number."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
    return "" if value is None else value


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
