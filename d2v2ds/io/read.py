"""Read small files as if a stranger had written them: text, JSON, JSON lines and YAML.

Every file of a run, a packed folder, a checkpoint or an export is opened here or by a reader of its own format. What
is no regular file, too large, not UTF-8, nested too deeply or of other types than expected is an error of the kind that
the caller names, with the file and the place in it. An error of the machine is a `MachineError`, whatever the file.
"""

import errno
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from d2v2ds.errors import D2V2Error
from d2v2ds.io.crc import crc32
from d2v2ds.io.machine_faults import reading_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

TEXT_BYTES = 64 << 20
"""Largest text that is read as a whole."""
LINE_BYTES = 4 << 20
"""Longest line of a file of JSON lines."""
YAML_BYTES = 1 << 20
"""Largest YAML file."""
YAML_NODES = 20_000
"""Most values of a YAML file, each counted as often as it is referred to."""
YAML_DEPTH = 30
_FAULTS_SAID = 3
_BLOCK_BYTES = 1 << 22


def open_regular(path: Path | str, kind: type[D2V2Error]) -> BinaryIO:
    """Open a file for reading; a FIFO, which would block for ever, a device or a folder is refused.

    Raises:
        kind: it is absent, not allowed or no regular file.
        MachineError: the machine is at fault.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV) and (fault := irregular(Path(path).stat().st_mode)):
            raise kind(f"{path}: expected a file, found {fault}") from None
        raise reading_error(path, error, kind) from error
    if fault := irregular(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise kind(f"{path}: expected a file, found {fault}")
    return os.fdopen(descriptor, "rb")


def is_there(path: Path | str, kind: type[D2V2Error]) -> bool:
    """True if there is something of this name; a link to nothing is nothing.

    Raises:
        kind, MachineError: as `open_regular`, where that cannot be found out.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise reading_error(path, error, kind) from error
    return True


def irregular(mode: int) -> str:
    """Return what a file is by its mode, empty for a regular one."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return "" if stat.S_ISREG(mode) else next((name for test, name in kinds.items() if test(mode)), "a device")


def read_bytes(path: Path | str, kind: type[D2V2Error], limit: int = TEXT_BYTES) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        kind, MachineError: as `open_regular`; `kind` too if it is larger.
    """
    with open_regular(path, kind) as file:
        try:
            size = os.fstat(file.fileno()).st_size  # 0 for files that the kernel makes up
            data = file.read(min(size, limit) + 1) + file.read(0 if size else limit)
        except OSError as error:
            raise reading_error(path, error, kind) from error
    if len(data) > limit:
        raise kind(f"{path}: expected at most {limit:,} bytes, found more")
    return data


def crc32_of(path: Path | str, kind: type[D2V2Error]) -> int:
    """CRC-32 of a file of any size.

    Raises:
        kind, MachineError: as `open_regular`.
    """
    found = 0
    with open_regular(path, kind) as file:
        try:
            while block := file.read(_BLOCK_BYTES):
                found = crc32(block, found)
        except OSError as error:
            raise reading_error(path, error, kind) from error
    return found


def decode(data: bytes, where: Path | str, kind: type[D2V2Error]) -> str:
    """Decode UTF-8.

    Raises:
        kind: naming the first byte that is none.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{where}: expected UTF-8, found byte {data[error.start]:#04x} at {error.start:,}") from None


def read_text(path: Path | str, kind: type[D2V2Error], limit: int = TEXT_BYTES) -> str:
    """Read a UTF-8 text; line ends stay as they are.

    Raises:
        kind, MachineError: as `read_bytes` and `decode`.
    """
    return decode(read_bytes(path, kind, limit), path, kind)


def check_name(name: str, where: Path | str, kind: type[D2V2Error]) -> None:
    """Check that a name from a file is one of a file in the same folder.

    Raises:
        kind: it has separators, is `..` or the like.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise kind(f"{where}: expected the name of a file beside it, found {name[:80]!r}")


def is_inside(path: Path, folder: Path) -> bool:
    """True if a file, its links followed, lies in a folder, whose own links may lead anywhere."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def parse_json(data: bytes, where: Path | str, kind: type[D2V2Error]) -> Any:
    """Parse JSON; NaN, infinity and numbers beyond float64 are refused.

    Raises:
        kind: it is no JSON, with the place.
    """
    try:
        return json.loads(decode(data, where, kind), parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise kind(f"{where}: expected JSON, found values nested too deeply") from None
    except ValueError as error:
        raise kind(f"{where}: expected JSON, found: {error}") from None


def read_json(path: Path | str, kind: type[D2V2Error], limit: int = TEXT_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        kind, MachineError: as `read_bytes` and `parse_json`; `kind` too if it is a list or a value.
    """
    value = parse_json(read_bytes(path, kind, limit), path, kind)
    if not isinstance(value, dict):
        raise kind(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def validate(schema: type[T], value: Any, where: Path | str, kind: type[D2V2Error]) -> T:
    """Make a dataclass of parsed JSON; strict: text is no number, a number no text, an unknown key is an error.

    Raises:
        kind: naming the first fields that do not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        more = f" and {len(faults) - _FAULTS_SAID} more" if len(faults) > _FAULTS_SAID else ""
        said = "; ".join(faults[:_FAULTS_SAID])
        raise kind(f"{where}: expected the fields of {schema.__name__}, found {said}{more}") from None


def json_lines(path: Path, kind: type[D2V2Error]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; none if it is absent.

    Lines that a crash cut off or damage made unreadable are left out, with one warning that counts them. NaN is
    allowed: the metrics of a run that went wrong have it.

    Raises:
        kind, MachineError: as `open_regular`.
    """
    if not is_there(path, kind):
        return
    damaged: list[int] = []
    with open_regular(path, kind) as file:
        number = 0
        while line := _read_line(file, path, kind):
            number += 1
            if not line.strip():
                continue  # between an incomplete line and the next
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            else:
                damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + ", ..." * (len(damaged) > 5)
        logger.warning("%s: %d damaged lines (cut off by a crash?) are left out: %s", path, len(damaged), shown)


def _read_line(file: BinaryIO, path: Path, kind: type[D2V2Error]) -> bytes:
    """Read a line; of one beyond `LINE_BYTES` only its beginning, which no JSON parser takes."""
    try:
        line = file.readline(LINE_BYTES)
        rest = line
        while len(rest) == LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(LINE_BYTES)
    except OSError as error:
        raise reading_error(path, error, kind) from error
    return line if rest is line else b"?\n"


def parse_yaml(text: str, where: Path | str, kind: type[D2V2Error]) -> Any:
    """Parse YAML of plain values; anchors that multiply, or that contain themselves, are refused.

    Raises:
        kind: it is no YAML, or too much of it.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _count_events(yaml.parse(text[: YAML_BYTES + 1], loader))
        if len(text) > YAML_BYTES:
            raise ValueError(f"expected at most {YAML_BYTES:,} characters, found more")
        _count_nodes(yaml.compose(text, loader), {}, 0)
        return yaml.load(text, loader)  # noqa: S506  (safe: plain values)
    except yaml.YAMLError as error:
        raise kind(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise kind(f"{where}: not valid YAML: values nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, a date of month 13
        raise kind(f"{where}: not valid YAML: {error}") from None


def _count_events(events: Iterable[Any]) -> None:
    """Look at the events of a parser as they come, before anything is made of them."""
    import yaml

    depth = 0
    for count, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > YAML_DEPTH:
            raise ValueError(f"expected at most {YAML_DEPTH} levels, found more")
        if count > 2 * YAML_NODES:
            raise ValueError(f"expected at most {YAML_NODES:,} values, found more")


def _count_nodes(node: Any, known: dict[int, int], depth: int) -> int:
    """Return the number of values below a YAML node, following aliases."""
    if depth > YAML_DEPTH:
        raise ValueError(f"expected at most {YAML_DEPTH} levels, found more, or a value that contains itself")
    if id(node) not in known:
        below = node.value if isinstance(getattr(node, "value", None), list) else []
        inner = [one for entry in below for one in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_count_nodes(one, known, depth + 1) for one in inner)
        if known[id(node)] > YAML_NODES:
            raise ValueError(f"expected at most {YAML_NODES:,} values, found more")
    return known[id(node)]


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise ValueError(f"expected a finite number, found {text[:40]}")
    return value
