"""Search for text files: folders, files of any name, and TSV manifests."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from d2v2ds.errors import ConfigError
from d2v2ds.io.machine_faults import is_machine_fault, reading_error, retried
from d2v2ds.io.read import irregular
from d2v2ds.io.walk import walk
from preprocessing.driver.input_files import check_present, read_manifest, source_name, unreadable
from preprocessing.text.documents import DocumentOptions, Form, TextFile
from preprocessing.text.tsv import check_columns, tsv_columns

FORMS: dict[str, Form] = {".txt": "text", ".text": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
"""Suffixes that a folder is searched for. Not ``.tsv``, because folders often hold a table of their own files."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
SUFFIXES = frozenset({*FORMS, *COMPRESSIONS})


def find_text_files(
    inputs: Sequence[Path], options: DocumentOptions, ignored: Counter[str] | None = None
) -> list[TextFile]:
    """List the files of all inputs, in the order of the inputs and, in a folder, of the names.

    Args:
        inputs: folders, and files of any name (what is neither JSON nor TSV by its suffix is plain text). A TSV file
            without the text's column but with a column ``path`` is a manifest: it stands for the files it names.
        options: names of the text's and the label's column.
        ignored: counts the other files of folders by suffix.

    Raises:
        ConfigError: if an input is missing, a folder holds no text, or a TSV file is malformed.
    """
    files: list[TextFile] = []
    ignored = Counter() if ignored is None else ignored
    for root in inputs:
        if root.is_dir():
            found = list(_files_of_folder(root, ignored))
        elif root.is_file():
            file = _text_file(str(root), root.parent)
            found = _files_of_manifest(root, options) if file.form == "tsv" and _is_manifest(file, options) else [file]
        else:
            there = irregular(root.stat().st_mode) if root.exists() else "nothing there"
            raise ConfigError(f"--input {root}: expected a folder or a file, found {there}")
        if not found:
            known = ", ".join(sorted(FORMS))
            raise ConfigError(f"--input {root}: expected text ({known}, each also with .gz or .zst), found none")
        files.extend(found)
    return files


def _files_of_folder(root: Path, ignored: Counter[str]) -> Iterator[TextFile]:
    for folder, names in walk(root, SUFFIXES, ignored):
        for name in names:
            suffix = _split_name(name)[0]
            if suffix in FORMS:
                yield _text_file(os.path.join(folder, name), root)  # noqa: PTH118  (a corpus may have a million files)
            else:  # a compressed file of another kind
                ignored[suffix + os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122


def _is_manifest(file: TextFile, options: DocumentOptions) -> bool:
    columns = tsv_columns(file)
    is_manifest = "path" in columns and options.text_field not in columns
    if not is_manifest:
        check_columns(file, columns, options)
    return is_manifest


def _files_of_manifest(manifest: Path, options: DocumentOptions) -> list[TextFile]:
    optional = [options.label_field] if options.label_field else []
    lines = list(read_manifest(manifest, optional, required=optional))
    check_present([line.place for line in lines if not (manifest.parent / line.path).exists()])
    return [
        _text_file(str(manifest.parent / line.path), manifest.parent, label=next(iter(line.values.values()), None))
        for line in lines
    ]


def _split_name(name: str) -> tuple[str, str | None]:
    """Return the suffix in front of the compression's suffix, and the compression."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122
    compression = COMPRESSIONS.get(suffix)
    return (os.path.splitext(stem)[1] if compression else suffix), compression  # noqa: PTH122


def _text_file(path: str, root: Path, label: str | None = None) -> TextFile:
    suffix, compression = _split_name(path)
    size = retried(partial(_file_size, path))
    return TextFile(
        path=path,
        source=source_name(root, path),
        bytes=size,
        form="tsv" if suffix == ".tsv" else FORMS.get(suffix, "text"),
        compression=compression,
        label=label,
    )


def _file_size(path: str) -> int:
    """Return the bytes of a text file.

    Raises:
        ConfigError: it is absent or no regular file.
        MachineError: the machine is at fault.
    """
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError as error:
        if is_machine_fault(error):
            raise reading_error(path, error, ConfigError) from error
        raise ConfigError(f"{path}: {unreadable(path, error)}; mend or remove it") from error
    if fault := irregular(facts.st_mode):
        raise ConfigError(f"{path}: expected a file, found {fault}; remove it")
    return facts.st_size
