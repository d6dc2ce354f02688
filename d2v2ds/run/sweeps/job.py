"""The script of a SLURM job array that runs a sweep, a task for each cell."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io import durable
from d2v2ds.io.read import is_there, read_text
from d2v2ds.run.sweeps.settings import Sweep

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).parents[3]


def write_job(sweep: Sweep, count: int, words: Sequence[str], checkout: Path = CHECKOUT) -> Path:
    """Write DIR/sweep.sh, whose tasks run `slurm/sweep.sh` of the checkout, and log how to submit it.

    Args:
        sweep: gives folder and ranks.
        count: cells.
        words: file and settings, as on the command line.
        checkout: with the job scripts.

    Raises:
        ConfigError: there are no job scripts beside the package.
    """
    body = checkout / "slurm" / "sweep.sh"
    if not is_there(body, ConfigError):
        raise ConfigError(f"{body}: no such file; --slurm needs the checkout of d2v2ds, not the package alone")
    lines = [line for line in read_text(body, ConfigError).splitlines() if line.startswith("#SBATCH ")]
    ranks = sweep.launch.ranks
    lines = [f"#SBATCH --gpus-per-node={ranks}" if "--gpus-per-node=" in line else line for line in lines]
    text = [
        "#!/bin/bash",
        f"# Sweep {sweep.dir}: a task for each of {count} cells. Written by `d2v2ds.sweep --slurm`.",
        *lines,
        f"#SBATCH --array=0-{count - 1}",
        "",
        f"export D2V2DS_HOME=${{D2V2DS_HOME:-{shlex.quote(str(checkout))}}}",
        f'exec bash "$D2V2DS_HOME/slurm/sweep.sh" {shlex.join(words)}',
    ]
    script = sweep.dir / "sweep.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    durable.replace_text(script, "\n".join(text) + "\n")
    logger.info("sbatch %s; when all tasks have ended: python -m d2v2ds.sweep %s --report", script, shlex.join(words))
    return script
