"""Processes forked from a server that has torch, DeepSpeed and `d2v2ds.pretrain` imported.

A fresh interpreter spends several seconds on these imports. The server starts once in a test session; it holds no
process group and no thread that computes. Each process forked from it has its own environment, arguments, output,
signals and exit code.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PRELOAD = [
    "d2v2ds.pretrain",
    # what a run imports later: DeepSpeed when it builds an engine, the metrics when they draw a figure
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
]


class Server:
    """A fork server. It starts with the first process that is forked from it, and ends with the test session."""

    def __init__(self, **variables: str) -> None:
        """`variables` are those of the server beside the session's own, such as LD_PRELOAD."""
        # OpenMP reads the number of threads when it is loaded
        self._variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload(PRELOAD)

    def fork(self, function: Callable[..., Any], *args: Any, daemon: bool = False) -> BaseProcess:
        """Start `function(*args)` in a process forked from the server.

        Args:
            function: a function of an importable module.
            args: picklable arguments.
            daemon: end the process with the test session; a daemon cannot have data workers.
        """
        process = multiprocessing.get_context("forkserver").Process(target=function, args=args, daemon=daemon)
        variables = mock.patch.dict(os.environ, self._variables)
        with variables, mock.patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process):
            process.start()
        return process


_SERVER = Server()
fork = _SERVER.fork


class ForkedProgram:
    """`python -m MODULE ARGUMENTS` in a forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        server: Server = _SERVER,
        before: Sequence[Callable[[], None]] = (),
    ) -> None:
        """
        Args:
            module: has a function `main` that reads `sys.argv` and returns the exit code.
            arguments: of the program.
            environment: all of its variables. OMP_NUM_THREADS is 1 whatever it says.
            log: gets stdout and stderr.
            server: of which the process is forked.
            before: picklable functions that the process calls first, such as one that sets a limit.
        """
        log.write_bytes(b"")
        words = list(arguments), dict(environment), str(Path.cwd()), str(log), list(before)
        self._process = server.fork(_run, module, *words)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code of the process once it has ended.

        Raises:
            TimeoutError: if it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    log: str,
    before: list[Callable[[], None]],
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _share_server()
    for function in before:
        function()
    program = importlib.import_module(module)
    sys.argv = [str(program.__file__), *arguments]
    try:
        sys.exit(program.main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without them


def _share_server() -> None:
    """Let data workers be forked from the server too. Python 3.11 would start another one for them."""
    running = mock.Mock(return_value=None)
    forkserver.ensure_running = running
    forkserver._forkserver.ensure_running = running
