"""Kinds of packed folders: the shipped ones, those of installed packages, and names that occur twice."""

from pathlib import Path

import pytest

from d2v2ds.data.schema import FileEntry, Index, write_index
from d2v2ds.errors import ConfigError
from preprocessing import inspect, verify
from preprocessing.formats import format_of, known_formats, open_shards
from tests.installed_package import install, run_beside

SENSORS = """
import pyarrow as pa

from d2v2ds.data.schema import Layout, column
from d2v2ds.data.shards import Shards
from preprocessing.formats import PackedFormat


class SensorShards(Shards):
    layout = Layout(
        name={name!r},
        fields=(column("id", pa.large_string()), column("values", pa.large_binary()), column("num", pa.int64())),
        payload="values",
        size=("num",),
        total="values",
        format=frozenset({{"rate"}}),
    )


FORMAT = PackedFormat(SensorShards, lambda: None)
"""
ENTRY_POINTS = "[d2v2ds.packed_formats]\nsensors = sensors:FORMAT\n"


def empty_folder(folder: Path, modality: str) -> Path:
    """A finished folder without rows."""
    folder.mkdir(parents=True)
    (folder / "rows.npy").touch()
    rows_file = FileEntry(file="rows.npy", bytes=0, crc32="00000000")
    write_index(
        folder,
        Index(
            modality=modality, format={"rate": 100}, settings={}, files=0, files_skipped=0, plan_sha256="", rows=0,
            totals={}, rows_file=rows_file, shards=(),
        ),
    )  # fmt: skip
    return folder


def test_a_format_of_an_installed_package_opens_its_folders(tmp_path: Path) -> None:
    install(tmp_path / "site", {"sensors": SENSORS.format(name="sensors")}, ENTRY_POINTS)
    folder = empty_folder(tmp_path / "packed", "sensors")
    program = (
        "import sys; from pathlib import Path; from preprocessing.formats import known_formats, open_shards\n"
        "shards = open_shards(Path(sys.argv[1]))\n"
        "print(*known_formats(), type(shards).__name__, shards.index.format['rate'], 'torch' in sys.modules)"
    )
    done = run_beside(tmp_path / "site", "-c", program, str(folder))
    assert (done.stdout, done.stderr) == ("audio image text sensors SensorShards 100 False\n", "")


def test_a_format_whose_name_is_taken_is_refused(tmp_path: Path) -> None:
    install(tmp_path / "site", {"sensors": SENSORS.format(name="image")}, ENTRY_POINTS)
    folder = empty_folder(tmp_path / "packed", "image")
    done = run_beside(tmp_path / "site", "-m", "preprocessing.verify", str(folder))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: entry point sensors:FORMAT of d2v2ds.packed_formats: format 'image' exists already; rename its layout\n"
    )


@pytest.mark.parametrize("command", [verify, inspect], ids=["verify", "inspect"])
def test_a_folder_of_an_unknown_modality_is_named(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = empty_folder(tmp_path / "packed", "smell")
    message = (
        f"{folder}: modality 'smell' is not known here, expected one of audio, image, text; install the package that "
        "packed the folder"
    )
    assert command.main([str(folder)]) == 2  # type: ignore[attr-defined]
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(ConfigError) as raised:
        open_shards(folder)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["audio", "image", "text"])
def test_reports_answer_what_verify_and_inspect_ask(name: str) -> None:
    assert list(known_formats()) == ["audio", "image", "text"]
    report = format_of(name, Path("x")).report()
    assert all(callable(getattr(report, member)) for member in ("batch_faults", "headline", "lines", "plot"))
