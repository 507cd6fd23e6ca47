"""A real Slurm cluster of two nodes on this machine: munge, one controller, two node daemons, all on loopback.

Everything lies in one folder, on free ports, and belongs to the user who starts it; no file of the system is touched.
A cluster of the machine's own is neither needed nor used. Needs the programs of `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("n1", "n2")
# cred_expire: a requeued job waits that long (120 s by default) before it starts again. The nodes pretend to have four
# cores, and two GPUs each (of which Slurm wants to see files). GraceTime: what a preempted job is given between SIGTERM
# and SIGKILL.
CONF = """
ClusterName=selfsight
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ReturnToService=2
InactiveLimit=0
KillWait=20
MinJobAge=3600
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[2]}-{ports[3]}] CPUs=4 CoresPerSocket=4 \
ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
GPUS = "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n"


def missing() -> list[str]:
    """Programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"  # daemons are no commands for everybody


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on, below those that outgoing connections are given."""
    for first in range(20000 + os.getpid() % 8000, 32000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    s.bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise RuntimeError("no free ports from 20000 to 32000")


class Cluster:
    """Starts with `start()`, ends with `stop()`, also after a start that failed half way.

    folder: short, and nobody but this user may write to it or above it (munge insists), so not below a /tmp path whose
    names are long.
    """

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.env: Mapping[str, str] = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """RuntimeError, with what the daemons said, unless both nodes are idle within 30 s."""
        for name in ("munge", "run", "spool", "state", "log"):
            (self.folder / name).mkdir(mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        names = {"host": socket.gethostname().split(".")[0], "user": pwd.getpwuid(os.getuid()).pw_name}
        conf = CONF.format(folder=self.folder, ports=free_ports(4), **names)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GPUS)
        run, log = self.folder / "run", self.folder / "log"
        files = {"key-file": key, "socket": key.with_name("socket"), "pid-file": run / "munged.pid",
                 "log-file": log / "munged.log", "seed-file": run / "munge.seed"}  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        self._until(lambda: files["socket"].exists())
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, name=node)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%D %T", check=False) == "2 idle")

    def _daemon(self, *argv: str, name: str = "") -> None:
        name = name or argv[0]
        if shutil.which("setpriv"):  # it ends with this process, however that ends
            argv = ("setpriv", "--pdeathsig", "TERM", *argv)
        with (self.folder / "log" / f"{name}.out").open("w") as out:
            self.daemons[name] = subprocess.Popen(
                argv, env=self.env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _until(self, true) -> None:
        until = time.monotonic() + 30
        while not true():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > until:
                raise RuntimeError(f"{ended or 'nobody'} ended; the cluster does not stand:\n{self.said()}")
            time.sleep(0.1)

    def said(self) -> str:
        """The last lines of every log of the daemons."""
        logs = sorted([*(self.folder / "log").glob("*.log"), *(self.folder / "log").glob("*.out")])
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text().splitlines()[-15:]) for p in logs)

    def run(self, *argv: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """What a client of Slurm prints."""
        env = {**self.env, **env}
        done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job (JobState, Restarts …)."""
        shown = self.run("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def stop(self) -> None:
        """End all jobs, then the daemons, by the processes that were started here."""
        if (self.folder / "slurm.conf").exists() and "slurmctld" in self.daemons:
            with suppress(RuntimeError, subprocess.TimeoutExpired, OSError):
                for partition in ("low", "high"):
                    self.run("scancel", "--signal=KILL", "--full", f"--partition={partition}", check=False)
                    self.run("scancel", f"--partition={partition}", check=False)
                until = time.monotonic() + 15
                while self.run("squeue", "-h", check=False) and time.monotonic() < until:
                    time.sleep(0.3)
        for name in (*NODES, "slurmctld", "munged"):
            if name in self.daemons:
                self._end(self.daemons[name])

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
