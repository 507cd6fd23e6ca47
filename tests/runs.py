"""Tiny training runs for tests: in this process, or as the command that a user types."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image

from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.export import export_backbone
from selfsight.training import checkpoint
from selfsight.training.run import train

ROOT = Path(__file__).parents[1]
TINY = (
    "image_size=32", "batch_size=8", "data.num_train=40", "data.num_val=16", "knn.bank=24", "knn.queries=16",
    "trainer.accelerator=cpu", "trainer.devices=1", "num_workers=0", "log_every_n_steps=1", "pictures.every_n_steps=0",
)  # fmt: skip

SCENES = ("data.num_train", "data.num_val")  # keys of TINY that belong to the built-in scenes


def run_here(run_dir: Path, *overrides: str, without: tuple[str, ...] = ()) -> dict:
    """Train in this process; signal handlers are put back. without: keys of TINY that do not apply."""
    cfg = config.load("train", [*_tiny(without), f"run_dir={run_dir}", *overrides])
    return with_handlers_put_back(lambda: train(cfg))


def _tiny(without: tuple[str, ...]) -> list[str]:
    return [word for word in TINY if word.split("=")[0] not in without]


def with_handlers_put_back(call: Callable[[], Any]) -> Any:
    """The result of a call that installs signal handlers of its own."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        return call()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(run_dir: Path, *overrides: str, without: tuple[str, ...] = (), script: str = "train.py") -> subprocess.Popen:
    """Start `python train.py …` with its output in <run_dir>.log; its own process group.

    Threads as here, since other numbers of threads give other sums; one per process where there are two, since threads
    of two processes that wait for each other on the same cores are many times slower.
    """
    command = [sys.executable, script, *_tiny(without), f"run_dir={run_dir}", *overrides]
    threads = 1 if "trainer.devices=2" in overrides else torch.get_num_threads()
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with run_dir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=env
        )


def wait_for_step(run_dir: Path, process: subprocess.Popen, step: int, seconds: float = 240) -> None:
    """Until metrics.csv has a row of at least this step."""
    until = time.monotonic() + seconds
    path = run_dir / "metrics.csv"
    while time.monotonic() < until:
        if path.exists() and any(r.split(",")[0].isdigit() and int(r.split(",")[0]) >= step for r in _lines(path)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended early with {process.returncode}:\n{run_dir.with_suffix('.log').read_text()}")
        time.sleep(0.02)
    # or it would take the processor from all tests that follow
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    raise AssertionError(f"step {step} not reached:\n{run_dir.with_suffix('.log').read_text()}")


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()[1:]
    return []


def shard(path: Path, n: int, bad: Collection[int] = (), labelled: bool = True) -> str:
    """A shard of n images; those in `bad` are cut short. Returns its path."""
    with wds.TarWriter(str(path)) as writer:
        for i in range(n):
            out = io.BytesIO()
            Image.effect_noise((32, 32), 60 + i).convert("RGB").save(out, "JPEG")
            image = out.getvalue()[:40] if i in bad else out.getvalue()
            writer.write({"__key__": f"s{i:04d}", "jpg": image} | ({"cls": str(i % 3)} if labelled else {}))
    return str(path)


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    """The bad samples that a run has listed."""
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


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


def exported_vit(folder: Path, depth: int) -> Path:
    """The export folder of a fresh tiny ViT for images of 16 px, in patches of 4."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(16,), depth=depth, patch_size=4)
    card = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 7}
    return export_backbone(backbone, folder, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=16, card=card)


class Burst(torch.autograd.Function):
    """Hands a value on; its gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan
