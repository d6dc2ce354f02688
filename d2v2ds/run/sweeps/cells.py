"""Cells of a sweep: which runs there are, their settings, and whether they may start or go on."""

import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from d2v2ds.config.load import config_error, read_config, to_dict
from d2v2ds.config.schema import LENGTHS, RunConfig
from d2v2ds.data.schema import read_index
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, read_json
from d2v2ds.run.prepare import prepare
from d2v2ds.run.sweeps.settings import MOST_CELLS, Choice, ProbeScore, Sweep, Switch
from d2v2ds.train.checkpointing import differing_fields

logger = logging.getLogger(__name__)

IDENTITY = "cell.json"
"""File in a cell's folder with what it was made of."""
_UNKNOWN_STEPS = 1_000_000
"""Steps of a run whose length follows from its pace, until that is measured."""
CELLS = "setting"
"""Switch of a sweep that lists its cells."""
_HEADING = re.compile(r": \d+ problem\(s\)$")
_MOST_NAMED = 3
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    number: int
    """Position in the sweep, from 0: the task of a job array."""
    setting: str
    """Switches in one word, without the seed."""
    switches: Mapping[str, str]
    """Value of each switch."""
    seed: int
    config: str
    settings: tuple[tuple[str, float | None], ...]
    """Settings in order: a word `section.field=value` and None, or a field and its fraction of the steps."""
    folder: Path
    """Folder of the run."""

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return self.folder.name

    def overrides(self, sweep: Sweep, total_steps: int) -> list[str]:
        """Return the settings of the run.

        Args:
            sweep: whose cell this is.
            total_steps: length of the run.
        """
        words = [
            word if fraction is None else f"{word}={max(1, round(fraction * total_steps))}"
            for word, fraction in self.settings
        ]
        words += [f"run.{name}=null" for name in LENGTHS if name != "total_steps"]
        probe = sweep.score.probe
        is_kept = probe is not None and probe.when == "after"
        return [
            *words,
            f"run.total_steps={total_steps}",
            f"run.seed={self.seed}",
            f"run.dir={self.folder}",
            f"run.save_every_steps={score_interval(probe, total_steps)}",
            f"run.keep_checkpoints={0 if is_kept else 1}",
            "run.keep_every_steps=null",
        ]


def score_interval(probe: ProbeScore | None, total_steps: int) -> int:
    """Return the optimizer steps between two scores of a run."""
    return max(1, total_steps // (1 if probe is None else probe.points))


def score_steps(probe: ProbeScore, total_steps: int) -> list[int]:
    """Return the steps at which a run is scored; the last is always one."""
    every = score_interval(probe, total_steps)
    return [*range(every, total_steps, every)][: probe.points - 1] + [total_steps]


def word_of(value: Any) -> str:
    """Write a value of YAML as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple | dict):
        plain = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(plain, default_flow_style=True, width=10**6).strip()
    return str(value)


def expand(sweep: Sweep) -> list[Cell]:
    """List the cells of a sweep: all combinations of switches, first with the first seed.

    Raises:
        ConfigError: there are too many, two have one name, or two switches choose the configuration.
    """
    switches = {name: _choices(switch) for name, switch in sweep.grid.items()} or {CELLS: dict(sweep.cells)}
    count = len(sweep.seeds) * math.prod(len(choices) for choices in switches.values())
    if count > MOST_CELLS:
        raise ConfigError(f"grid: expected at most {MOST_CELLS:,} cells, found {count:,}")
    combinations = [
        dict(zip(switches, values, strict=True)) for values in itertools.product(*(one for one in switches.values()))
    ]
    cells, problems = list[Cell](), list[str]()
    for seed in sweep.seeds:
        for values in combinations:
            chosen = [switches[name][value] for name, value in values.items()]
            configs = list(dict.fromkeys(choice.config for choice in chosen if choice.config is not None))
            setting = _setting(values)
            if len(configs) > 1:
                problems.append(f"{setting}: expected one configuration, found {' and '.join(configs)}")
            cell = Cell(
                number=len(cells),
                setting=setting,
                switches=values,
                seed=seed,
                config=configs[0] if configs else sweep.config,
                settings=tuple(_settings([sweep, *chosen])),
                folder=sweep.dir / "cells" / f"{setting}-seed_{seed}",
            )
            cells.append(cell)
    names = Counter(cell.name for cell in cells)
    problems += [
        f"{name}: {n} cells have this name; name their values in `choices`" for name, n in names.items() if n > 1
    ]
    known = settings_of(cells)
    if sweep.reference is not None and sweep.reference not in known:
        problems.append(f"reference {sweep.reference}: no such cell; there are {', '.join(known)}")
    if problems:
        raise config_error(str(sweep.dir), list(dict.fromkeys(problems)))
    return cells


def _setting(values: Mapping[str, str]) -> str:
    """Name of a combination of values, as a part of a folder's name."""
    word = "-".join(value if name == CELLS else f"{name}_{value}" for name, value in values.items())
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", word).strip("_.-") or "cell"


def settings_of(cells: Iterable[Cell]) -> list[str]:
    """List the combinations of switches, in order, without the seeds."""
    return list(dict.fromkeys(cell.setting for cell in cells))


def _choices(switch: Switch) -> dict[str, Choice]:
    if switch.field is None:
        return dict(switch.choices)
    words = [word_of(value) for value in switch.values]
    return {word: Choice(overrides=(f"{switch.field}={word}",)) for word in words}


def _settings(parts: Sequence[Sweep | Choice]) -> Iterator[tuple[str, float | None]]:
    """Yield settings so that later ones win: of the sweep, then of each switch."""
    for one in parts:
        yield from ((word, None) for word in one.overrides)
        yield from one.fractions.items()


# -------------------------------------------------------------------- checks


def total_steps(cell: Cell, sweep: Sweep) -> int | None:
    """Return the length of a cell's run; None if it follows from its pace.

    Raises:
        ConfigError: its configuration cannot be built.
    """
    if sweep.budget.steps is not None or sweep.budget.minutes is not None:
        return sweep.budget.steps
    assert sweep.budget.samples is not None
    config, problems = read_config(cell.config, cell.overrides(sweep, _UNKNOWN_STEPS))
    if config is None:
        raise config_error(cell.config, problems)
    batch = next(iter(config.data.modalities.values())).global_batch
    return max(1, round(sweep.budget.samples / batch))


def check_cells(sweep: Sweep, cells: Sequence[Cell], opened: Sequence[Cell] | None = None) -> None:
    """Check every cell before the first one starts: configurations, their data, and what their folders hold.

    Args:
        sweep: of the cells.
        cells: all of them.
        opened: those whose data are opened; None: one of each setting, whose seeds read the same.

    Raises:
        ConfigError: listing everything that is wrong, each with the cells that have it.
    """
    firsts = {cell.setting: cell for cell in reversed(cells)}
    to_open = list(firsts.values()) if opened is None else opened
    found: dict[str, list[str]] = {}
    for cell in cells:
        for problem in _faults(sweep, cell, cell in to_open):
            found.setdefault(problem, []).append(cell.name)
    if found:
        raise config_error(str(sweep.dir), [f"{_named(names, len(cells))}: {fault}" for fault, names in found.items()])


def _named(names: Sequence[str], count: int) -> str:
    if len(names) == count > 1:
        return "all cells"
    return ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )


def _faults(sweep: Sweep, cell: Cell, opens: bool) -> list[str]:
    """Return one message for each reason why a cell cannot be run."""
    try:
        steps = total_steps(cell, sweep) or _UNKNOWN_STEPS
        words = [*cell.overrides(sweep, steps), *probe_words(sweep, steps)]
        config, problems = read_config(cell.config, words)
        if opens:
            prepare(cell.config, words, world=sweep.launch.ranks)
            if (tuning := sweep.score.finetune) is not None:
                prepare(tuning.config, fine_tuning_words(sweep, cell), world=sweep.launch.ranks)
    except D2V2Error as error:
        return [
            line.removeprefix("  - ") for line in str(error).splitlines() if not re.search(r": \d+ problem\(s\)$", line)
        ]
    if config is None or problems:
        return problems
    changed = changes(cell, identity(sweep, cell, config))
    if changed:
        more = f" and {len(changed) - _MOST_SHOWN} more" if len(changed) > _MOST_SHOWN else ""
        return [
            f"{cell.folder}: made with other settings ({'; '.join(changed[:_MOST_SHOWN])}{more}); "
            "take them again, another dir, or remove this folder"
        ]
    return []


def probe_words(sweep: Sweep, steps: int) -> list[str]:
    """Return settings of a run that is probed while it goes on; none if the sweep has no probe.

    Raises:
        ShardError: the labelled folder cannot be read.
    """
    probe = sweep.score.probe
    if probe is None:
        return []
    name = read_index(probe.shards).modality
    given = {
        name: probe.shards, f"test.{name}": probe.test_shards, "kinds": f"[{probe.kind}]", "label": probe.label,
        "divider": probe.divider, "leave_out": probe.leave_out, "block": probe.block, "threads": probe.threads,
        "memory_gib": probe.memory_gib, "limit_minutes": probe.limit_minutes, "niceness": probe.niceness,
        "every_steps": score_interval(probe, steps),
    }  # fmt: skip
    return [f"probe.{field}={value}" for field, value in given.items() if value is not None]


def fine_tuning_words(sweep: Sweep, cell: Cell, weights: Path | None = None) -> list[str]:
    """Return the settings of a cell's fine-tuning; without weights, which do not exist before it, for a check."""
    tuning = sweep.score.finetune
    assert tuning is not None
    network = [word for word, fraction in cell.settings if fraction is None and word.startswith("model.")]
    start = [] if weights is None else [f"init.weights={weights}"]
    own = [f"data.shards={tuning.shards}", f"run.seed={cell.seed}", f"run.dir={cell.folder / 'finetune'}"]
    return [*network, *tuning.overrides, *start, *own]


# -------------------------------------------------------------------- what a folder was made of


def identity(sweep: Sweep, cell: Cell, config: RunConfig) -> dict[str, Any]:
    """Return what decides a cell's numbers, in plain values; its folder may be moved."""
    settings = to_dict(config)
    settings["run"].pop("dir")
    settings.pop("probe")
    whole = to_dict(sweep)
    return {
        "config": settings,
        **{name: whole[name] for name in ("budget", "launch", "score")},
        "switches": dict(cell.switches),
    }


def changes(cell: Cell, now: Mapping[str, Any]) -> list[str]:
    """Return `field: before -> now` for each setting in which a cell's folder differs; none if it has not begun.

    Raises:
        ConfigError: its file is damaged.
    """
    file = cell.folder / IDENTITY
    if not is_there(file, ConfigError):
        return []
    return differing_fields(read_json(file, ConfigError), json.loads(json.dumps(now)))


def write_identity(sweep: Sweep, cell: Cell) -> None:
    """Write down what a cell is made of, once."""
    if (cell.folder / IDENTITY).exists():
        return
    steps = total_steps(cell, sweep) or _UNKNOWN_STEPS
    config, problems = read_config(cell.config, [*cell.overrides(sweep, steps), *probe_words(sweep, steps)])
    if config is None:
        raise config_error(cell.config, problems)
    cell.folder.mkdir(parents=True, exist_ok=True)
    durable.replace_text(cell.folder / IDENTITY, json.dumps(identity(sweep, cell, config), indent=1) + "\n")
