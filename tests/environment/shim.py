"""A library for LD_PRELOAD that takes abilities away from the file system, or moves the clock. Built by the tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int lacks(const char *name) {
    const char *list = getenv("LACKS");
    return list && strstr(list, name) != NULL;
}
#define NEXT(name) dlsym(RTLD_NEXT, #name)

int fsync(int file) {
    struct stat found;
    int is_folder = fstat(file, &found) == 0 && S_ISDIR(found.st_mode);
    if (lacks("fsync-all") || (lacks("fsync-folder") && is_folder)) { errno = EINVAL; return -1; }
    if (lacks("disk") && !is_folder) { errno = EIO; return -1; }
    return ((int (*)(int))NEXT(fsync))(file);
}
ssize_t write(int file, const void *data, size_t count) {
    int (*control)(int, int, ...) = NEXT(fcntl);
    int flags = control(file, F_GETFL);
    if (lacks("direct-write") && flags != -1 && (flags & O_DIRECT)) { errno = EINVAL; return -1; }
    return ((ssize_t (*)(int, const void *, size_t))NEXT(write))(file, data, count);
}
static int lock(int file, int command, void *argument, const char *name) {
    if (lacks("locks") && (command == F_SETLK || command == F_SETLKW)) { errno = ENOLCK; return -1; }
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(file, command, argument);
}
int fcntl(int file, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return lock(file, command, argument, "fcntl");
}
int fcntl64(int file, int command, ...) {
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list);
    return lock(file, command, argument, "fcntl64");
}
int link(const char *from, const char *to) {
    if (lacks("links")) { errno = EPERM; return -1; }
    return ((int (*)(const char *, const char *))NEXT(link))(from, to);
}
int symlink(const char *from, const char *to) {
    if (lacks("links")) { errno = EPERM; return -1; }
    return ((int (*)(const char *, const char *))NEXT(symlink))(from, to);
}
int clock_gettime(clockid_t kind, struct timespec *now) {
    int code = ((int (*)(clockid_t, struct timespec *))NEXT(clock_gettime))(kind, now);
    if (kind == CLOCK_REALTIME && lacks("steady-clock")) {
        static int calls = 0;
        now->tv_sec += (++calls / 50) % 2 ? -86400 : 86400; /* a day forth and back, every fifty calls */
    }
    return code;
}
"""


def build(folder: Path) -> Path:
    """Compile the library; skips the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def without(library: Path, *abilities: str) -> dict[str, str]:
    """Environment of a process that lacks abilities."""
    return {**os.environ, "LD_PRELOAD": str(library), "LACKS": " ".join(abilities), "OMP_NUM_THREADS": "1"}


def can_mount() -> bool:
    """True if this user may mount a file system of its own."""
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", "/dev/shm"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0
