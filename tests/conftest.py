"""Test-wide settings: one thread (the same sums everywhere), no network, a cache of its own."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

# Files that take minutes, longest first: processes that share the files get them first and end together.
LONG = ("slurm", "grid", "faults", "sharded", "two_processes", "contracts", "eval_run", "watchdog", "bench", "resume",
        "remote", "distill", "goldens_dinov3", "goldens_ibot", "finetune")  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """One cache folder per test session, so that tests neither use nor fill the user's."""
    if "SELFSIGHT_CACHE" not in os.environ:
        os.environ["SELFSIGHT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmark scripts, importable."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
