"""Real commands in processes that are there at once: forks of a server that has imported everything.

A start of `python train.py` costs seconds of imports; a fork of the server runs the same `cli.main` after a fraction of
that, in its own session, with one thread. Kills hit the fork, as they would hit the command.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import runs
from selfsight.training.log import read_metrics

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
IMPORTED = (
    "lightning.pytorch", "timm", "simplejpeg", "webdataset.tariterators", "selfsight.cli", "selfsight.config",
    "selfsight.training.run", "selfsight.training.report", "selfsight.interop.export", "selfsight.data.manifest",
    "selfsight.probes.run", "selfsight.probes.knn", "runs", "kill_driver",
)  # fmt: skip


@functools.cache
def _context() -> Any:
    """The server starts at the first call, with the environment that its forks shall see."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "ssl"), os.environ.get("PYTHONPATH", "")])
    with _environment(ONE_THREAD | {"PYTHONPATH": paths}):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_child(log: str, env: dict[str, str]) -> None:
    """Make a fork what a command from a shell is: a session of its own, its output in a file."""
    import torch

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    torch.set_num_threads(1)


def command(words: list[str], log: str, env: dict[str, str]) -> None:
    """`selfsight <words>`."""
    in_child(log, env)
    from selfsight import cli

    code = cli.main(None, words)
    sys.stdout.flush()
    sys.exit(code)


class Job:
    """A command in one process, or in several as torchrun starts them. log: where its output is appended."""

    def __init__(
        self, words: list[str], log: Path, *, ranks: int = 1, faults: str = "", target: Callable[..., None] = command
    ):
        self.log, self.used = log, 0.0
        env = {"SELFSIGHT_FAULTS": faults} if faults else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
                     "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                     "TORCHELASTIC_RUN_ID": "test"} if ranks > 1 else {}  # fmt: skip
            self.processes.append(_context().Process(target=target, args=(words, str(log), env | place)))
            self.processes[-1].start()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all of them, if they are still there."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def spend(self, seconds: float, rank: int = 0, limit: float = 300) -> bool:
        """Wait until a process has used so much of a processor, however busy the machine is; False if it ended first.
        `used` tells what it has used so far."""
        until, process = time.monotonic() + limit, self.processes[rank]
        while process.exitcode is None and time.monotonic() < until:
            self.used = max(self.used, cpu_seconds(process.pid))
            if self.used >= seconds:
                return True
            process.join(0.005)
        return False

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes (negative: by that signal); AssertionError, with nothing left running, if it takes longer."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        slow = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not slow, f"processes {slow} did not end in {seconds} s:\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """The end of its output."""
        return self.log.read_text()[-4000:]


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processors; 0 where it is gone. Linux tells it in hundredths."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count(what: str, number: int = 1) -> None:
    """Add to the counts in the file $SELFSIGHT_TRUST; call it when everything about them was found right."""
    if path := os.environ.get("SELFSIGHT_TRUST"):
        with Path(path).open("a") as file:
            file.write(json.dumps({what: number}) + "\n")


# --- what a run has to come to ----------------------------------------------------------------------------------------

SMALL = (
    "image_size=16", "backbone.patch_size=4", "backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2",
    "objective=dino", "objective.num_prototypes=16", "objective.head_hidden=32", "objective.head_bottleneck=16",
    "objective.momentum=0.9", "views.local.n=1", "views.local.size=8", "optim.lr=1e-3", "optim.warmup=2",
    "knn.every_n_steps=0", "log_every_n_steps=3", "checkpoint.every_n_steps=1", "checkpoint.keep_last=2",
    "trainer.hang_minutes=1",  # where one of two is killed before they meet
)  # fmt: skip


def words_for(folder: Path, shard: str, steps: int, ranks: int = 1, *more: str) -> list[str]:
    """`selfsight train …` on a shard whose index is kept (and hence made by the run) in `folder`."""
    left = (*runs.SCENES, "image_size", "trainer.devices", "log_every_n_steps")
    tiny = [word for word in runs.TINY if word.split("=")[0] not in left]
    return ["train", *tiny, *SMALL, f"trainer.devices={ranks}", f"max_steps={steps}", f"run_dir={folder}/run",
            "data=shards", f"data.train={shard}", f"data.index_dir={folder}/index", *more]  # fmt: skip


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on how often a run was killed: weights, optimizer, export, index, log, file names."""
    run = folder / "run"
    found: dict[str, Any] = {k: v.numpy().tobytes() for k, v in runs.final_state(run).items()}
    found["export"] = (run / "export" / "model.safetensors").read_bytes()
    found["index"] = sorted(p.read_bytes() for p in (folder / "index").glob("[!.]*"))
    speeds = ("images_per_second", "data_wait", "mfu")
    found["metrics"] = [{k: v for k, v in row.items() if k not in speeds} for row in read_metrics(run / "metrics.csv")]
    found["latest"] = (run / "checkpoints" / "latest").read_text()
    found["files"] = sorted(p.relative_to(run).as_posix() for p in run.rglob("*"))
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], text: str = "") -> None:
    """Equal in every part, bit for bit."""
    different = [k for k in expected.keys() | found.keys() if found.get(k) != expected.get(k)]
    shown = {k: (found.get(k), expected.get(k)) for k in different if k in ("files", "metrics", "latest")}
    assert not different, f"{len(different)} of {len(expected)} differ, e.g. {different[:3]} {shown}\n{text}"
