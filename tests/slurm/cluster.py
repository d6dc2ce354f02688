"""A SLURM controller and two nodes on this machine, for tests: real daemons, nothing outside of a scratch folder.

Each node is a slurmd with a port, a hostname, an /etc/hosts and a /dev/shm of its own (namespaces), 64 cores and 8
GPUs that it does not have. Jobs are requeued after seconds, a dead node is noticed after half a minute. Everything
that ran in a node's namespace is killed at the end.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from d2v2ds.distributed.comm import free_port

ROOT = Path(__file__).parents[2]
NODES = ("a1", "a2")
CLIENT_TIMEOUT_S = 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

CONFIG = """
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=5
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 Boards=1 SocketsPerBoard=2 "
    "CoresPerSocket=32 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:8"
)
SITE = """
D2V2DS_VENV=
export PATH={bin}:$PATH
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
# MPICH over UCX sends 4,096 bytes of its stack as an address, in lines whose length depends on what lies there (825
# characters were seen); SLURM's pmi2 plugin cuts lines above 1,024 and the step fails or hangs. Over OFI: 94 at most.
export MPIR_CVAR_CH4_NETMOD=ofi
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if it can."""
    needed = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "mount", "mknod")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd and namespaces need root"
    probe = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


class Cluster:
    """A context manager; daemons live as long as the `with` block."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sl"))  # short, for sockets; open, for munged
        self.folder.chmod(0o755)
        for name in ("munge", "run", "state", "log", "dev", "jobs", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        self.jobs = self.folder / "jobs"
        """Working folder of the jobs, where their output lies."""
        self.site = self.folder / "site.env"
        self.site.write_text(SITE.format(bin=Path(sys.executable).parent))
        self._namespaces: dict[str, int] = {}
        kept = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "D2V2DS_"))}
        self.environment = kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "D2V2DS_SITE": str(self.site)}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    # ------------------------------------------------------------------ daemons

    def _start(self) -> None:
        folder = self.folder
        nodes = "\n".join(NODE.format(name=node, port=free_port()) for node in NODES)
        config = CONFIG.format(folder=folder, controller_port=free_port(), nodes=nodes)
        (folder / "slurm.conf").write_text(config)
        for number in range(8):  # a character device is all that slurmd looks for
            subprocess.run(["mknod", folder / "dev" / f"gpu{number}", "c", "1", "3"], check=True)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-7]\n")
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", *NODES)))
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self._daemon(
            "munged", f"--key-file={key}", f"--socket={folder}/run/munge.sock", f"--pid-file={folder}/run/munged.pid",
            f"--log-file={folder}/munge/munged.log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.client("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES) * 3, 60)

    def start_controller(self) -> None:
        """Start slurmctld, with the state that it saved if it ran before."""
        self._daemon("slurmctld", "-f", str(self.folder / "slurm.conf"))

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        pid_file = self.folder / "run" / f"slurmd.{node}.pid"
        pid_file.unlink(missing_ok=True)
        enter = (
            'hostname "$0"; mount --bind "$1/hosts" /etc/hosts; mount -t tmpfs -o mode=1777 none /dev/shm; '
            'exec slurmd -f "$1/slurm.conf" -N "$0"'
        )
        self._daemon("unshare", "--uts", "--mount", "sh", "-c", enter, node, str(self.folder))
        self.until(lambda: pid_file.exists() and pid_file.read_text().strip() != "", 20)
        if node in self._namespaces:
            os.close(self._namespaces[node])
        # held open, so that the kernel gives its number to no other namespace
        self._namespaces[node] = os.open(f"/proc/{int(pid_file.read_text())}/ns/uts", os.O_RDONLY)

    def stop_controller(self) -> None:
        """As at a restart of the service: running jobs go on without it."""
        _end(self.folder / "run" / "slurmctld.pid")

    def crash_node(self, node: str) -> None:
        """SIGKILL of everything on a node."""
        for pid in self.processes(node):
            os.kill(pid, signal.SIGKILL)

    def processes(self, node: str) -> list[int]:
        """All processes of a node: slurmd, the steps, their tasks."""
        namespace = os.fstat(self._namespaces[node]).st_ino
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if _namespace(pid) == namespace]

    def ranks(self, node: str) -> list[int]:
        """The main processes of pretraining on a node; loader workers have another command line or parent."""
        found = {pid: _command(pid) for pid in self.processes(node)}
        mains = {pid for pid, words in found.items() if words[1:3] == ["-m", "d2v2ds.pretrain"]}
        return sorted(pid for pid in mains if _state(pid)[1] not in mains)

    def _daemon(self, *command: str) -> None:
        said = self.folder / "log" / "start.log"
        with said.open("a") as file:  # not a pipe, which a daemon would keep open
            done = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                timeout=CLIENT_TIMEOUT_S, check=False,
            )  # fmt: skip
        assert done.returncode == 0, f"{command}: {said.read_text()}"

    def _stop(self) -> None:
        for node in self._namespaces:
            _end(self.folder / "run" / f"slurmd.{node}.pid")
        for node, descriptor in self._namespaces.items():
            self.crash_node(node)
            os.close(descriptor)
        _end(self.folder / "run" / "slurmctld.pid")
        _end(self.folder / "run" / "munged.pid")
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------ clients

    def client(self, *command: str, **variables: str) -> str:
        """Run a client of the cluster; returns what it printed.

        Raises:
            AssertionError: if it fails.
        """
        done = self.attempt(*command, **variables)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a client that may fail."""
        return subprocess.run(
            command, env=self.environment | variables, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=CLIENT_TIMEOUT_S, check=False, errors="replace",
        )  # fmt: skip

    def submit(self, *arguments: str, **variables: str) -> int:
        """`sbatch` from the checkout, as a user does, with more variables in the environment; the job's number."""
        return int(self.client("sbatch", "--parsable", f"--chdir={self.jobs}", *arguments, **variables))

    def job(self, number: int) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.client("scontrol", "-o", "show", "job", str(number))))

    def output(self, number: int) -> str:
        """What the job's script has said so far."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.jobs.glob(f"*-{number}.out")))

    def until(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.2)

    def finished(self, number: int, timeout_s: float = 180.0) -> dict[str, str]:
        """What the controller knows of a job once it has ended for good."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, timeout_s)
        return self.job(number)

    def story(self) -> str:
        """Everything that could explain a failure."""
        parts = [self.attempt("squeue").stdout, self.attempt("scontrol", "show", "job").stdout[-6000:]]
        for path in [*sorted(self.jobs.rglob("*.out")), *sorted(self.jobs.rglob("*.log"))]:
            parts.append(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join([*parts, (self.folder / "log" / "slurmctld.log").read_text()[-3000:]])


def _namespace(pid: int) -> int:
    """Number of a process's hostname namespace; 0 if the process has ended or is none of ours."""
    try:
        return Path(f"/proc/{pid}/ns/uts").stat().st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _state(pid: int) -> tuple[str, int]:
    """State letter and parent of a process; Z for one that has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return state, int(parent)


def _is_running(pid: int) -> bool:
    """False too for a process that has ended and that nobody has waited for."""
    return _state(pid)[0] != "Z"


def _end(pid_file: Path) -> None:
    """End the daemon that wrote this file, gently and then not."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        if _is_running(pid):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while _is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    pid_file.unlink(missing_ok=True)
