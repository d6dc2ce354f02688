"""Fetch a corpus, check it, unpack it: ``python -m preprocessing.download CORPUS --to DIR``.

Corpora: `librispeech` and `librilight` in parts, `urls` for any list of URLs, `imagenet` for instructions. The same
command, started again, goes on where it was, byte for byte; what is finished is not fetched or read again. Archives
are unpacked into a folder of their own, which appears whole, and removed after that.

Exit codes: 0 done; 2 wrong input or settings, nothing was fetched; 4 something could not be fetched, checked, unpacked
or written, the rest is there, run again; 130 interrupted, run again.
"""

import argparse
import errno
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TextIO, TypeVar

from d2v2ds.errors import ConfigError, D2V2Error
from preprocessing.download.corpora import (
    IMAGENET,
    LIBRILIGHT,
    LIBRISPEECH,
    archives_of,
    beside,
    read_md5_list,
    read_url_list,
)
from preprocessing.download.fetch import WORK_NAME, Patience, Source, Transfer
from preprocessing.download.unpack import check_tar_filter, folder_name, unpack
from preprocessing.download.web import DownloadError
from preprocessing.driver.exit_codes import EXIT_INTERRUPTED, exit_code
from preprocessing.driver.input_files import listed
from preprocessing.driver.progress import Progress

Answer = TypeVar("Answer")

_CORPORA = {"librispeech": LIBRISPEECH, "librilight": LIBRILIGHT}
_LONGEST_WAIT_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One source, and the folder for what is in it; None if it stays as it is."""

    transfer: Transfer
    folder: Path | None

    @property
    def place(self) -> Path:
        """Where the user finds it."""
        return self.folder or self.transfer.path

    @property
    def is_done(self) -> bool:
        """Nothing is left to do."""
        if self.folder:
            return self.transfer.is_checked and self.transfer.record.unpacked and self.folder.is_dir()
        return self.transfer.is_finished


class Download:
    """Files on their way into one folder.

    Args:
        folder: exists, with its work folder.
        jobs: files at the same time.
        patience: with servers.
    """

    def __init__(self, folder: Path, jobs: int, patience: Patience) -> None:
        self._folder = folder
        self._jobs = jobs
        self._patience = patience
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._progress: Progress | None = None

    def run(self, sources: Sequence[Source], extract: bool, keep_archives: bool) -> list[D2V2Error]:
        """Bring all sources; a line about each on standard output. Returns what went wrong; the rest is there.

        Raises:
            ConfigError: if folders are taken, before anything is fetched.
            DownloadError: if the disk is too small for all of it, before anything is fetched.
        """
        jobs = [self._job(source, extract) for source in sources]
        _check_places(jobs)
        todo = [job for job in jobs if not job.is_done]
        for job in jobs:
            if job.is_done:
                print(f"{job.place}: there already")
        if not todo:
            return []
        with ThreadPool(self._jobs) as pool:  # of daemon threads: an interrupt need not wait for a silent server
            try:
                sizes = _done_by(pool, _size, todo)
                left = sum(size - _bytes_there(job) for job, size in zip(todo, sizes, strict=True))
                self._check_space(
                    left, [size for job, size in zip(todo, sizes, strict=True) if job.folder], keep_archives
                )
                self._progress = Progress("downloading", len(todo), left)
                errors = _done_by(pool, lambda job: self._obtain(job, keep_archives), todo)
                self._progress.finish()
            finally:
                self._stop.set()
        return [error for error in errors if error]

    def fetch(self, source: Source) -> Path:
        """Bring one small file, before the others."""
        transfer = self._job(source, extract=False).transfer
        transfer.fetch()
        return transfer.path

    def _job(self, source: Source, extract: bool) -> Job:
        name = folder_name(source.name) if extract else None
        transfer = Transfer(
            source, self._folder, self._patience, lambda size: self._add(0, size), self._say, self._stop
        )
        return Job(transfer=transfer, folder=self._folder / name if name else None)

    def _obtain(self, job: Job, keep_archives: bool) -> D2V2Error | None:
        """Fetch and unpack one source, in a thread; hands an error back, for it must not stop the others."""
        transfer = job.transfer
        try:
            transfer.fetch()
            what = _verdict(transfer)
            if job.folder:
                self._say(f"{transfer.path.name}: whole, unpacking")
                # Noted before the folder appears: killed between the two, the next start finds none and unpacks again.
                transfer.save(unpacked=True)
                work = self._folder / WORK_NAME
                files = unpack(transfer.path, job.folder, work / f"{transfer.path.name}.unpacking")
                what = f"{files:,} files of {transfer.path.name}, {what}"
                if not keep_archives:
                    os.sync()  # the archive may go only when what came out of it is on the disk
                    transfer.path.unlink()
            self._say(f"{job.place}: {what}", sys.stdout)
        except D2V2Error as error:
            return error
        except OSError as error:
            return DownloadError(f"{error.filename or transfer.path}: {error.strerror}; run the same command again")
        self._add(1, 0)
        return None

    def _check_space(self, left: int, archives: Sequence[int], keep_archives: bool) -> None:
        """Raise a `DownloadError` if the disk cannot hold what is to come; what servers do not say counts as nothing.

        What comes out of an archive is at least as large as it. If archives are removed, as many take their space twice
        as are unpacked at the same time.
        """
        twice = archives if keep_archives else sorted(archives, reverse=True)[: self._jobs]
        needed, free = left + sum(twice), shutil.disk_usage(self._folder).free
        if needed > free:
            raise DownloadError(
                f"--to {self._folder}: needs {needed:,} bytes or more, {free:,} are free: free space, or take another "
                "disk, or less at once"
            )

    def _add(self, files: int, size: int) -> None:
        with self._lock:
            if self._progress:
                self._progress.add(files, size)

    def _say(self, line: str, stream: TextIO | None = None) -> None:
        """Print a line, on standard error unless told otherwise."""
        with self._lock:
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)  # what `Progress` left there
            print(line, file=stream or sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None, patience: Patience | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: of the command line; None for those of the process.
        patience: with servers; None for the usual.
    """
    options = _parser().parse_args(arguments)
    if options.corpus == "imagenet":
        print(IMAGENET)
        return 0
    try:
        return _run(options, patience or Patience())
    except D2V2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; what has arrived is kept, the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace, patience: Patience) -> int:
    extract = not options.no_extract
    if extract:
        check_tar_filter()
    if options.jobs < 1:
        raise ConfigError(f"--jobs: expected 1 or more, found {options.jobs}")
    corpus = _CORPORA.get(options.corpus)
    sources = archives_of(corpus, options.parts, options.base_url) if corpus else read_url_list(options.list)
    with _alone(options.to):
        download = Download(options.to, options.jobs, patience)
        if corpus and corpus.md5_list:
            published = download.fetch(beside(corpus, options.base_url, corpus.md5_list))
            sources = _with_checksums(sources, published)
        errors = download.run(sources, extract, options.keep_archives)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if corpus:
        print(corpus.licence)
    return max((exit_code(error) for error in errors), default=0)


def _with_checksums(sources: Sequence[Source], published: Path) -> list[Source]:
    """The sources with their sums of a published list; raises a `DownloadError` if one is not in it."""
    sums = read_md5_list(published)
    if missing := [source.name for source in sources if source.name not in sums]:
        raise DownloadError(
            f"{published}: expected an MD5 sum of {', '.join(missing)}, found those of {', '.join(sums) or 'no file'}; "
            "remove it to fetch it anew, or take another --base-url"
        )
    return [replace(source, checksum=sums[source.name]) for source in sources]


def _check_places(jobs: Sequence[Job]) -> None:
    """Raise a `ConfigError` if two files would have one place, or something else is in it."""
    places: dict[Path, str] = {}
    for job in jobs:
        for path in {job.place, job.transfer.path}:
            if path in places:
                raise ConfigError(
                    f"{path}: both {places[path]} and {job.transfer.source.name} would be there; give other names, or "
                    "--no-extract"
                )
            places[path] = job.transfer.source.name
    if taken := [str(job.folder) for job in jobs if job.folder and job.folder.exists() and not job.is_done]:
        raise ConfigError(
            f"expected no such folder, found one that this archive was not unpacked into; move it away or take another "
            f"--to:\n{listed(taken, len(taken))}"
        )


def _done_by(pool: ThreadPool, work: Callable[[Job], Answer], jobs: Sequence[Job]) -> list[Answer]:
    """What `work` answers for each job.

    Waits in short pieces: a signal that comes in the moment before a wait is seen only after it.
    """
    answers = pool.map_async(work, jobs, chunksize=1)
    while not answers.ready():
        answers.wait(_LONGEST_WAIT_S)
    return answers.get()


def _size(job: Job) -> int:
    """Bytes of the whole file; what is there already if the server does not say."""
    there = _bytes_there(job)
    return there if job.transfer.path.exists() else max(there, job.transfer.size() or 0)


def _bytes_there(job: Job) -> int:
    path = job.transfer.path
    return path.stat().st_size if path.exists() else job.transfer.bytes_there


def _verdict(transfer: Transfer) -> str:
    """What is known of a file that came."""
    if transfer.source.checksum:
        return f"{transfer.source.checksum} as it should be"
    found = ", ".join(f"{algorithm} {value}" for algorithm, value in transfer.record.digests.items())
    return f"{transfer.record.bytes:,} bytes, {found}; not checked, for no checksum was given"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second download out of it: both would append to the same files."""
    try:
        (folder / WORK_NAME).mkdir(parents=True, exist_ok=True)
        lock = (folder / WORK_NAME / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"--to {folder}: expected a folder that can be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--to {folder}: another download is at work in it; wait for it, or end it") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    for name, corpus in _CORPORA.items():
        add = corpora.add_parser(name, help=f"in parts, from {corpus.base_url}").add_argument
        add("--parts", type=lambda text: text.split(","), required=True, metavar="A,B", help=", ".join(corpus.parts))
        add("--base-url", metavar="URL", help="folder of a mirror")
    add = corpora.add_parser("urls", help="the files of a list").add_argument
    add("--list", type=Path, required=True, metavar="FILE", help="lines of URL, checksum, file name between tabs")
    for each in list(corpora.choices.values()):
        add = each.add_argument
        add("--to", type=Path, required=True, metavar="DIR", help="new folder, or one to go on with")
        add("--no-extract", action="store_true", help="leave archives as they are")
        add("--keep-archives", action="store_true", help="do not remove archives that were unpacked")
        add("--jobs", type=int, default=2, metavar="N", help="files at the same time (%(default)s)")
    corpora.add_parser("imagenet", help="how to get it; its terms do not allow programs to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
