"""Log lines about a run before its first step."""

import logging
import sys
from pathlib import Path

import yaml

from d2v2ds.config.load import to_yaml
from d2v2ds.config.schema import RunConfig
from d2v2ds.data.folders import folders_of
from d2v2ds.data.loader import DataStream
from d2v2ds.distributed import comm
from d2v2ds.errors import ConfigError, D2V2Error
from d2v2ds.io.read import parse_yaml, read_text
from d2v2ds.run.prepare import Streams
from d2v2ds.train.checkpointing import differing_fields

logger = logging.getLogger(__name__)


class _LogFile(logging.FileHandler):
    """Appends to a file; what cannot be written, such as on a full disk, is left out and said once on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name in `logging`
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(f"{self.baseFilename} cannot be written, the run continues without: {error}", file=sys.stderr)

    _has_failed = False


def start_logging(run_dir: Path) -> None:
    """Log INFO of d2v2ds on rank 0 and WARNING of everything else; rank 0 also appends to `<run>/log.txt`."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    fault = ""
    if comm.rank() == 0:
        try:
            handlers.append(_LogFile(run_dir / "log.txt"))
        except OSError as error:
            fault = f"{run_dir / 'log.txt'} cannot be written, the run continues without: {error}"
    logging.basicConfig(
        format="%(asctime)s %(message)s" if comm.rank() == 0 else f"%(asctime)s rank {comm.rank()} %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("d2v2ds").setLevel(logging.INFO if comm.rank() == 0 else logging.WARNING)
    if comm.rank() > 0:  # every rank sees the same; rank 0 logs it
        logging.getLogger("d2v2ds.train.guard").setLevel(logging.ERROR)
    if fault:
        logger.warning("%s", fault)


def warn_once(message: str) -> None:
    """Log a warning on rank 0, if every rank would log the same."""
    if comm.rank() == 0:
        logger.warning("%s", message)


def changed_settings(config: RunConfig) -> list[str]:
    """Return `field: value before -> value now` for each setting that changed since the last start of this run."""
    file = config.run.dir / "config.yaml"
    try:
        before = parse_yaml(read_text(file, ConfigError), file, ConfigError)
    except D2V2Error:
        return []
    found = differing_fields(before, yaml.safe_load(to_yaml(config))) if isinstance(before, dict) else []
    return [line for line in found if not line.startswith("run.dir:")]  # the folder has been moved


def describe(config: RunConfig, streams: Streams) -> None:
    """Log sizes, derived steps and accumulation, length of an epoch, and settings that may not be meant."""
    logger.info(
        "%d ranks on %s, %s: %d steps", comm.world(), comm.device().type, config.engine.deepspeed, config.total_steps
    )
    for name, stream in streams.items():
        _describe_data(name, stream, config)
    logger.info("watch: tensorboard --logdir %s", config.run.dir / "tensorboard")


def _describe_data(name: str, stream: DataStream, config: RunConfig) -> None:
    reader, plan, epoch = stream.reader, stream.plan, stream.plan.estimate_epoch()
    unit, accumulation = reader.unit.name, plan.config.accumulation(comm.world())
    folders = ", ".join(str(folder) for folder in folders_of(config.data.modalities[name].shards))
    logger.info(
        "%s: %s, %d rows; global batch %.6g %s in %d micro-batches, accumulation %d; epoch of %.0f steps, %.6g %s; "
        "%.1f epochs in all",
        name, folders, len(reader), _units(stream, epoch.size_per_step), unit, plan.config.num_micro, accumulation,
        epoch.steps, _units(stream, epoch.size), unit, config.total_steps / max(epoch.steps, 1e-9),
    )  # fmt: skip
    count, slots = plan.config.num_micro, accumulation * comm.world()
    if count < slots:
        warn_once(
            f"{name}: {slots - count} of the {slots} forward passes of a step have no data, because {comm.world()} "
            f"ranks do not divide its {count} micro-batches; take micro-batches of another size, or fewer ranks"
        )
    for remark in reader.remarks():
        logger.info("%s", remark)


def _units(stream: DataStream, size: float) -> float:
    """Convert a sum of sizes to the reader's unit."""
    largest = stream.plan.config.max_size
    return stream.reader.units(1, largest) * size / largest
