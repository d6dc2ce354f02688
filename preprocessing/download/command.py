"""Fetch a corpus, check it and unpack it: ``python -m preprocessing.download CORPUS --to DIR``.

Corpora: `librispeech` and `librilight` in parts, `urls` for any list of URLs, `imagenet` for instructions. The same
command, run again, continues at the last byte; what is complete is neither fetched nor read again. Each archive becomes
a folder, which appears complete, and is removed then. The program `curl` makes the requests; its own settings (proxies
in the environment, `~/.curlrc`) apply.

Exit codes: 0 done; 2 wrong input or settings; 4 something could not be fetched, checked, unpacked or written, the rest
is complete, run it again; 130 interrupted, run it again.
"""

import argparse
import fcntl
import os
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from d2v2ds.errors import ConfigError, D2V2Error
from preprocessing.download.corpora import CORPORA, IMAGENET, archives_of, beside, read_url_list, with_published_md5
from preprocessing.download.fetch import WORK_NAME, DownloadError, Source, Transfer, say
from preprocessing.download.unpack import folder_name, unpack
from preprocessing.driver.exit_codes import EXIT_INTERRUPTED, exit_code
from preprocessing.driver.progress import Progress

_SIZE_REQUESTS = 8
"""Number of files whose size is asked for at the same time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    if options.corpus == "imagenet":
        print(IMAGENET)
        return 0
    errors: list[D2V2Error] = []
    try:
        errors += _run(options)
    except D2V2Error as error:
        errors.append(error)
    except OSError as error:
        errors.append(_disk_error(error, options.to))
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept: run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    for problem in errors:
        print(f"error: {problem}", file=sys.stderr)
    return max(map(exit_code, errors), default=0)


def _run(options: argparse.Namespace) -> list[D2V2Error]:
    if shutil.which("curl") is None:
        raise ConfigError("downloading needs the program curl, found none on the PATH: install it or load its module")
    if not options.no_extract and not hasattr(tarfile, "data_filter"):
        raise ConfigError("unpacking needs the filter of tarfile, in Python 3.11.4 or later: update, or --no-extract")
    corpus = CORPORA.get(options.corpus)
    sources = archives_of(corpus, options.parts, options.base_url) if corpus else read_url_list(options.list)
    with _locked(options.to):
        if corpus and corpus.md5_list:
            Transfer(beside(corpus, options.base_url, corpus.md5_list), options.to).fetch()
            sources = with_published_md5(sources, options.to / corpus.md5_list)
        errors = _download(sources, options)
    if corpus:
        print(corpus.licence)
    return errors


def _download(sources: Sequence[Source], options: argparse.Namespace) -> list[D2V2Error]:
    """Fetch and unpack all sources; return the errors of those that failed.

    Raises:
        ConfigError: if two files have one path, or another folder is in it; nothing is fetched.
        DownloadError: if the disk is too small; nothing is fetched.
    """
    jobs = []
    for source in sources:
        name = None if options.no_extract else folder_name(source.name)
        jobs.append((Transfer(source, options.to), options.to / (name or source.name)))
    _check_results(jobs)
    for transfer, result in jobs:
        if transfer.is_done(result):
            print(f"{result}: complete already")
    jobs = [(transfer, result) for transfer, result in jobs if not transfer.is_done(result)]
    with ThreadPool(_SIZE_REQUESTS) as pool:
        needed = sum(pool.map(Transfer.remaining_bytes, [transfer for transfer, _ in jobs]))
    free = shutil.disk_usage(options.to).free
    if needed > free:
        raise DownloadError(f"--to {options.to}: expected {needed:,} free bytes or more, found {free:,}: free space")
    progress = Progress("downloading", len(jobs), needed)
    errors: list[D2V2Error] = []
    for transfer, result in jobs:
        transfer.report = partial(progress.add, 0)
        try:
            transfer.fetch()
            if result != transfer.path:
                _unpack(transfer, result, options.keep_archives)
            say(f"{result}: complete")
            progress.add(1, 0)
        except D2V2Error as error:
            errors.append(error)
        except OSError as error:
            errors.append(_disk_error(error, transfer.path))
    if jobs:
        progress.finish()
    return errors


def _check_results(jobs: Sequence[tuple[Transfer, Path]]) -> None:
    uses = Counter(path for transfer, result in jobs for path in {transfer.path, result})
    if double := [str(path) for path, count in uses.items() if count > 1]:
        raise ConfigError(
            f"{', '.join(double)}: expected one file for each path, found several: leave out or rename one"
        )
    for transfer, result in jobs:
        if result != transfer.path and result.exists() and not transfer.is_done(result):
            raise ConfigError(
                f"{result}: expected no folder or one unpacked from {transfer.path.name}, found another: move it away"
            )


def _unpack(transfer: Transfer, folder: Path, keep_archive: bool) -> None:
    say(f"{transfer.path.name}: unpacking")
    transfer.record(folder)
    unpack(transfer.path, folder, transfer.work / f"{folder.name}.unpacking")
    if not keep_archive:
        os.sync()  # the archive may go only when its content is on the disk
        transfer.path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other downloads out of it: two of them would write into the same files."""
    (folder / WORK_NAME).mkdir(parents=True, exist_ok=True)
    # a link would be written through, a FIFO would block for ever
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(folder / WORK_NAME / "lock", flags, 0o666), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--to {folder}: another download is at work in it; wait for it, or end it") from error
        except OSError as error:
            print(f"--to {folder}: cannot be locked ({error.strerror}); start no second download into it")
        yield


def _disk_error(error: OSError, path: Path) -> DownloadError:
    return DownloadError(
        f"{error.filename or path}: {error.strerror}; what has arrived is kept: repair this and run the same command "
        "again to continue"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    for name, corpus in CORPORA.items():
        add = corpora.add_parser(name, help=f"in parts, from {corpus.base_url}").add_argument
        add("--parts", type=lambda text: text.split(","), required=True, metavar="A,B", help=", ".join(corpus.parts))
        add("--base-url", metavar="URL", help="folder of a mirror")
    add = corpora.add_parser("urls", help="the files of a list").add_argument
    add("--list", type=Path, required=True, metavar="FILE", help="lines of URL, checksum, file name between tabs")
    for each in list(corpora.choices.values()):
        add = each.add_argument
        add("--to", type=Path, required=True, metavar="DIR", help="new folder, or one to continue with")
        add("--no-extract", action="store_true", help="leave archives as they are")
        add("--keep-archives", action="store_true", help="do not remove archives that were unpacked")
    corpora.add_parser("imagenet", help="how to get it; its terms do not allow programs to")
    return parser
