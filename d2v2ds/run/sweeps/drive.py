"""Run the cells of a sweep in turn, or one of them as a task of a job array."""

import json
import logging
import time
from pathlib import Path

from d2v2ds.config.load import to_dict
from d2v2ds.errors import CellsFailedError, ConfigError
from d2v2ds.io import durable
from d2v2ds.io.lock import FolderLock
from d2v2ds.run.preempt import StopRequest
from d2v2ds.run.sweeps.cells import Cell, check_cells, expand
from d2v2ds.run.sweeps.report import report
from d2v2ds.run.sweeps.settings import Sweep
from d2v2ds.run.sweeps.work import DONE, CellFailedError, Work, note_failure
from d2v2ds.train.loop import clock

logger = logging.getLogger(__name__)


def run_sweep(sweep: Sweep) -> None:
    """Run every cell that is not done, one after the other, and write the tables and pictures after each.

    Raises:
        ConfigError: before the first cell starts; another sweep is at work in the folder, or has other settings.
        CellsFailedError: cells failed; the others are done, unless too many failed in a row.
        PreemptedError: a signal stopped it; the same command goes on.
    """
    cells = expand(sweep)
    waiting = [cell for cell in cells if not is_done(cell)]
    firsts = {cell.setting: cell for cell in reversed(waiting)}
    check_cells(sweep, cells, list(firsts.values()))
    with StopRequest() as stop, _lock(sweep.dir / "lock"):
        durable.replace_text(sweep.dir / "sweep.json", json.dumps(to_dict(sweep), indent=1) + "\n")
        logger.info("%s: %d cells, %d of them done", sweep.dir, len(cells), len(cells) - len(waiting))
        failed, in_a_row, began = list[str](), 0, time.monotonic()
        for number, cell in enumerate(waiting, 1):
            if _run(sweep, cell, stop, f"{cell.number + 1}/{len(cells)}"):
                in_a_row = 0
            else:
                failed.append(cell.name)
                in_a_row += 1
            left = (time.monotonic() - began) / number * (len(waiting) - number)
            logger.info("%d of %d cells are left, about %s", len(waiting) - number, len(cells), clock(left))
            report(sweep, cells, quiet=number < len(waiting))
            if in_a_row >= sweep.max_failures and number < len(waiting):
                raise CellsFailedError(
                    f"stopped: {in_a_row} cells failed in a row, the last {cell.name}; mend the cause and start the "
                    "same command"
                )
        if not waiting:
            report(sweep, cells)
        if failed:
            raise CellsFailedError(
                f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; the others are done"
            )


def run_cell(sweep: Sweep, number: int) -> None:
    """Run one cell, beside others of the same sweep. Tables are left to `report`.

    Args:
        sweep: of the cell.
        number: from 0.

    Raises:
        ConfigError, CellsFailedError, PreemptedError: as `run_sweep`.
    """
    cells = expand(sweep)
    if not 0 <= number < len(cells):
        raise ConfigError(f"cell {number}: the sweep has cells 0 to {len(cells) - 1}")
    cell = cells[number]
    check_cells(sweep, cells, [] if is_done(cell) else [cell])
    if is_done(cell):
        logger.info("%s is done", cell.name)
        return
    with StopRequest() as stop, _lock(sweep.dir / "lock", shared=True), _lock(cell.folder / "cell.lock"):
        if not _run(sweep, cell, stop, f"{number + 1}/{len(cells)}"):
            raise CellsFailedError(f"{cell.name} failed")


def is_done(cell: Cell) -> bool:
    """True if a cell is trained and scored."""
    return (cell.folder / DONE).exists()


def _run(sweep: Sweep, cell: Cell, stop: StopRequest, place: str) -> bool:
    """Run one cell; False if it failed, which is noted."""
    began = time.monotonic()

    def say(what: str) -> None:
        logger.info("%s %s: %s", place, cell.name, what)

    try:
        Work(sweep, cell, stop, say).run()
    except CellFailedError as error:
        logger.error("%s %s failed: %s", place, cell.name, error)
        note_failure(cell, error)
        return False
    say(f"done in {clock(time.monotonic() - began)}")
    return True


def _lock(path: Path, *, shared: bool = False) -> FolderLock:
    """Take the lock of a folder.

    Raises:
        ConfigError: another process has it, or it cannot be written.
    """
    lock = FolderLock(path, shared=shared)
    try:
        lock.take()
    except OSError as error:
        raise ConfigError(str(error)) from error
    return lock
