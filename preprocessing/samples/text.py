"""Python's own documentation as labelled text: ``python -m preprocessing.samples.text --output DIR``.

For demonstrations and tests without a network: about two megabytes of English that come with every Python. A document
is one docstring of a module, class or function, or one topic of the language reference that ``help()`` shows. Source
files are parsed, not imported; only modules that have no Python source are imported for theirs. The label is the topic
of the module, from the table `TOPICS`.

Written are ``train.jsonl`` and ``valid.jsonl`` with `id`, `text` and `label`, which `preprocessing.pack_text` takes as
input. One document in five is in ``valid``; none is in both. The same build of Python gives the same bytes.
"""

import argparse
import ast
import importlib
import inspect
import json
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

MIN_WORDS = 12
"""Shorter docstrings say too little to have a topic."""
_ONE_IN = 5
"""So many documents for one that goes to ``valid``."""

LANGUAGE_REFERENCE = "pydoc_data.topics"
"""Texts that ``help()`` shows for words such as FLOAT or LAMBDA; a module with one dictionary of texts."""
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))

TOPICS: Mapping[str, tuple[str, ...]] = {
    "network": (
        "http", "urllib", "socket", "_socket", "ssl", "smtplib", "ftplib", "imaplib", "poplib", "nntplib", "telnetlib",
        "xmlrpc", "socketserver", "ipaddress", "wsgiref", "cgi", "webbrowser", "uuid", "netrc",
    ),
    "text": (
        "re", "string", "textwrap", "difflib", "unicodedata", "html", "xml", "json", "csv", "configparser", "codecs",
        "encodings", "locale", "gettext", "email", "quopri", "base64", "plistlib", "tomllib", "shlex", "pprint",
        "reprlib",
    ),
    "mathematics": (
        "math", "cmath", "_pydecimal", "fractions", "random", "statistics", "numbers", "datetime", "_pydatetime",
        "calendar", "zoneinfo", "time", "hashlib", "hmac", "secrets", "colorsys", "operator",
    ),
    "concurrency": (
        "asyncio", "threading", "_threading_local", "multiprocessing", "concurrent", "queue", "sched", "subprocess",
        "signal", "select", "selectors", "contextvars", "_thread",
    ),
    "files": (
        "os", "posixpath", "ntpath", "genericpath", "pathlib", "shutil", "tempfile", "glob", "fnmatch", "zipfile",
        "tarfile", "gzip", "bz2", "lzma", "zlib", "_pyio", "fileinput", "filecmp", "mimetypes", "mailbox", "dbm",
        "shelve", "pickle", "pickletools", "sqlite3", "wave", "linecache", "zipapp", "stat",
    ),
    "containers": (
        "collections", "_collections_abc", "heapq", "bisect", "array", "itertools", "functools", "copy", "weakref",
        "_weakrefset", "graphlib", "enum", "dataclasses", "types", "struct",
    ),
    "tools": (
        "ast", "dis", "inspect", "unittest", "doctest", "pdb", "bdb", "trace", "traceback", "profile", "cProfile",
        "pstats", "timeit", "importlib", "pkgutil", "logging", "argparse", "optparse", "getopt", "pydoc", "tokenize",
        "symtable", "warnings", "distutils", "venv", "sysconfig", "site", "platform", "code", "cmd", "typing", "ctypes",
    ),
    "windows": ("tkinter", "turtle", "turtledemo", "idlelib", "curses"),
    "language": (LANGUAGE_REFERENCE, "builtins", "gc", "abc", "contextlib"),
}  # fmt: skip
"""Modules by topic; those that a version of Python lacks are passed over."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One line of a file."""

    id: str
    text: str
    label: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.samples.text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    documents = collect()
    for split in ("train", "valid"):
        lines = [json.dumps(asdict(one), ensure_ascii=False) for one in documents if split_of(one) == split]
        (options.output / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = sum(len(one.text) for one in documents) / 1e6
    counts = ", ".join(f"{label} {number:,}" for label, number in Counter(one.label for one in documents).items())
    print(
        f"{options.output}: {len(documents):,} documents, {size:.2f} million characters of documentation inside Python "
        f"{sys.version_info.major}.{sys.version_info.minor}: {counts}"
    )
    return 0


def collect(topics: Mapping[str, tuple[str, ...]] = TOPICS) -> list[Document]:
    """All documents in the order of the table, without repetitions of a text."""
    documents, seen = [], set()
    for label, modules in topics.items():
        for module in modules:
            for id, text in texts_of(module):
                if len(text.split()) >= MIN_WORDS and text not in seen:
                    seen.add(text)
                    documents.append(Document(id=id, text=text, label=label))
    return documents


def split_of(document: Document) -> str:
    """``train`` or ``valid``, by the text alone."""
    return "train" if zlib.crc32(document.text.encode()) % _ONE_IN else "valid"


def texts_of(name: str) -> Iterator[tuple[str, str]]:
    """Names and texts of what a module or package documents; nothing if this Python has no such module."""
    path = STANDARD_LIBRARY / name
    if name == LANGUAGE_REFERENCE:
        topics = importlib.import_module(name).topics
        yield from ((f"{name}:{topic}", text) for topic, text in sorted(topics.items()))
    elif path.with_suffix(".py").is_file():
        yield from _texts_of_source(name, path.with_suffix(".py"))
    elif path.is_dir():
        for source in sorted(path.rglob("*.py")):
            parts = source.relative_to(path).with_suffix("").parts
            if not any("test" in part for part in parts):
                yield from _texts_of_source(".".join((name, *parts)), source)
    else:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            return
        yield from _texts_of_compiled(module)


def _texts_of_source(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings of a module and of everything defined in it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module):
            place, text = name, ast.get_docstring(node)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            place, text = f"{name}.{node.name}:{node.lineno}", ast.get_docstring(node)
        else:
            continue
        if text:
            yield place, text


def _texts_of_compiled(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Docstrings of a module without Python source, of its functions and classes and of their methods."""
    if text := inspect.getdoc(module):
        yield module.__name__, text
    for name, value in sorted(vars(module).items()):
        if inspect.isclass(value) or inspect.isbuiltin(value):
            members = sorted(vars(value).items()) if inspect.isclass(value) else []
            for place, one in [(name, value), *((f"{name}.{member}", one) for member, one in members)]:
                text = getattr(one, "__doc__", None)
                if isinstance(text, str) and not place.endswith("__doc__"):
                    yield f"{module.__name__}.{place}", inspect.cleandoc(text)


if __name__ == "__main__":
    sys.exit(main())
