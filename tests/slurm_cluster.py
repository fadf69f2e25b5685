"""A Slurm cluster on one machine: munged, slurmctld and two slurmd, on free ports, in one folder."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
# Debian keeps the daemons where only root's PATH leads.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"


def absent() -> str | None:
    """Why there can be no cluster here; None where there can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return None if os.getuid() == 0 else "slurmd starts jobs as root alone"


class Cluster:
    """Two nodes of one machine, `node1` and `node2`; a context manager."""

    def __init__(self, folder: Path, cpus: int = 8):
        self.folder, self._cpus, self._processes = folder, cpus, []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *words: str, **more: str) -> str:
        """Run one of Slurm's commands to its end, in the repository, and return what it printed."""
        done = subprocess.run(
            words, cwd=ROOT, env={**self.environment, **more}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", job)))

    def wait(self, what: str, true: Callable[[], bool], seconds: float = 240) -> None:
        """Look until something is true; raise with the daemons' last words where it does not become so."""
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        tails = (f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
        return "\n".join(tails)

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spoolnode1", "spoolnode2", "munge"):
            (folder / name).mkdir()
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o600)
        controller, first, second = free_ports(3)
        lines = {
            "ClusterName": "test",
            "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            # A job that is queued again waits until its credentials are void: two minutes unless told otherwise.
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=8",
            "CryptoType": "crypto/munge",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 1,  # a node that was set down stays down until it is resumed
            "SlurmdTimeout": 30,
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "KillWait": 60,
        }
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "slurm.conf").write_text(
            "".join(f"{name}={value}\n" for name, value in lines.items())
            + f"NodeName=node1 NodeAddr=127.0.0.1 Port={first} CPUs={self._cpus} Gres=gpu:1 State=UNKNOWN\n"
            + f"NodeName=node2 NodeAddr=127.0.0.1 Port={second} CPUs={self._cpus} Gres=gpu:1 State=UNKNOWN\n"
            + "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60\n"
            + "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF\n"
        )
        munge = folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={folder}/munged.log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.wait("munge's socket", (munge / "socket").exists, 10)
        self._daemon("slurmctld", "-D", "-c")
        for name in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", name)
        self.wait("both nodes idle", self._both_idle, 30)

    def _both_idle(self) -> bool:
        found = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T", "--partition=batch"],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout.split() == ["idle", "idle"]

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}-{len(self._processes)}.out.log", "w") as log:
            self._processes.append(subprocess.Popen([name, *arguments], env=self.environment, stdout=log, stderr=log))

    def _left(self) -> list[int]:
        """What this cluster has started and is still there: slurmstepd and its jobs outlive slurmd."""
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports
