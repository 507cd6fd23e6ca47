"""Tiny training runs for tests: in this process, or as the command that a user types."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from selfsight import config
from selfsight.training import checkpoint
from selfsight.training.run import train

ROOT = Path(__file__).parents[1]
TINY = (
    "image_size=32", "batch_size=8", "data.num_train=40", "data.num_val=16", "knn.bank=24", "knn.queries=16",
    "trainer.accelerator=cpu", "trainer.devices=1", "num_workers=0", "log_every_n_steps=1", "pictures.every_n_steps=0",
)  # fmt: skip


def run_here(run_dir: Path, *overrides: str, without: tuple[str, ...] = ()) -> dict:
    """Train in this process; signal handlers are put back. without: keys of TINY that do not apply."""
    tiny = [word for word in TINY if word.split("=")[0] not in without]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        return train(config.load("train", [*tiny, f"run_dir={run_dir}", *overrides]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    """Start `python train.py …` with its output in <run_dir>.log; its own process group."""
    command = [sys.executable, "train.py", *TINY, f"run_dir={run_dir}", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other sums with other numbers of threads
    with run_dir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=env
        )


def wait_for_step(run_dir: Path, process: subprocess.Popen, step: int, seconds: float = 120) -> None:
    """Until metrics.csv has a row of at least this step."""
    until = time.monotonic() + seconds
    path = run_dir / "metrics.csv"
    while time.monotonic() < until:
        if path.exists() and any(r.split(",")[0].isdigit() and int(r.split(",")[0]) >= step for r in _lines(path)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early with {process.returncode}:\n{run_dir.with_suffix('.log').read_text()}")
        time.sleep(0.02)
    raise AssertionError(f"step {step} not reached:\n{run_dir.with_suffix('.log').read_text()}")


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()[1:]
    return []


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, buffers and optimizer."""
    path = checkpoint.newest(run_dir / "checkpoints")
    assert path is not None
    model, _ = checkpoint.load(path)
    optim, _ = checkpoint.load(path, "optim")
    return {f"model/{k}": v for k, v in model.items()} | {f"optim/{k}": v for k, v in optim.items()}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[:3]}"
