"""Commands beside a training: a process of its own session, its log, a lock that lives as long as it does; and Slurm.

The lock is the process's own (it inherits the open file), so a training that was killed and started again sees whether
an evaluation of the earlier session is still at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

NICE = 10  # how far a process steps back for the training
TOLD_TO_STOP = tuple(-getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"))
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
STARTER = "SELFSIGHT_STARTER"  # process id of the first process of a machine, which starts the others
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
                "MASTER_PORT", "TORCHELASTIC_RUN_ID", STARTER)  # fmt: skip


class Job:
    """A process that was started here, or one of an earlier session that still holds its lock (process None)."""

    def __init__(self, lock: Path, process: subprocess.Popen | None = None):
        self.lock, self.process = lock, process

    def poll(self) -> int | None:
        """None while it works, else its exit status (0 for one of an earlier session: its result tells)."""
        if self.process is not None:
            return self.process.poll()
        return None if held(self.lock) else 0

    def stop(self) -> None:
        """Ask the process to end and wait for it; one of an earlier session is left alone."""
        if self.process is None or self.process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
                return


def start(argv: Sequence[str], *, log: Path, lock: Path, env: Mapping[str, str], out: Path | None = None) -> Job:
    """Start a command without a shell, its output in log (standard output in `out`, if given), at a lower priority.

    If another process holds the lock, nothing is started, and the job is that one.
    """
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Job(lock)
        except OSError:  # a file system without locks: at worst a number is measured twice
            pass
        with log.open("a") as said, (out or log).open("a" if out is None else "w") as printed:
            said.write(f"$ {shlex.join(argv)}\n")
            said.flush()
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=printed, stderr=said, env=dict(env), start_new_session=True,
                pass_fds=(fd,),
            )  # fmt: skip
        with contextlib.suppress(OSError, AttributeError):  # it may have ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, min(19, os.nice(0) + NICE))
        return Job(lock, process)
    finally:
        os.close(fd)


def held(lock: Path) -> bool:
    """Whether a process holds this lock."""
    if not lock.exists():
        return False
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def process_env(threads: int, hide_gpus: bool) -> dict[str, str]:
    """The environment of a process that shares the machine with the training."""
    env = _plain_env()
    env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})


def slurm_env() -> dict[str, str]:
    """The environment to submit from: of the job that the training runs in nothing but where Slurm is configured, or
    the new job would take over its sizes."""
    env = {k: v for k, v in _plain_env().items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    return env | {"SELFSIGHT_PYTHON": sys.executable}


def _plain_env() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in _DISTRIBUTED}
    env["PYTHONPATH"] = os.pathsep.join([str(source_dir()), *filter(None, [env.get("PYTHONPATH")])])
    return env


def source_dir() -> Path:
    """The folder to import this package from: a checkout may be used without being installed."""
    return Path(__file__).parents[2]


def last_line(log: Path) -> str:
    """What a command said last; of an error that this package words, the sentence."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("error: ")[:300]
    return "it said nothing"


# --- Slurm ---------------------------------------------------------------------------------------------------------


def batch_script(command: str) -> Path:
    """slurm/<command>.sbatch, in an installed package or in a checkout."""
    inside = Path(__file__).parents[1] / "slurm" / f"{command}.sbatch"
    return inside if inside.is_file() else Path(__file__).parents[3] / "slurm" / f"{command}.sbatch"


def sbatch_argv(options: Sequence[str], log: Path, name: str, words: Sequence[str]) -> list[str]:
    """The command that submits one probe. Slurm prints the job's number and nothing else."""
    own = ["--parsable", f"--job-name=selfsight-{name}", f"--output={log}", "--open-mode=append"]
    own += ["--gpus-per-node=0"] if "device=cpu" in words else []  # the batch file asks for one
    return ["sbatch", *own, *options, str(batch_script("probe")), *words]


def job_number(file: Path) -> str | None:
    """The number that sbatch printed (number or number;cluster); None if it has not."""
    with contextlib.suppress(OSError):
        number = file.read_text().strip().split(";")[0]
        return number if number.isdigit() else None
    return None


def in_queue(number: str) -> bool:
    """Whether Slurm still knows the job as waiting or running; True where it does not answer."""
    argv = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if said.returncode:
        return "invalid job id" not in said.stderr.lower()
    return any(state not in ENDED for state in said.stdout.split())
