"""Whole runs of two processes: they end where one does, and stop together. What a step computes: test_contracts.py."""

import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import runs
from selfsight.data.order import Order
from selfsight.training.log import read_metrics

BATCH = 8


@pytest.fixture(scope="module")
def command_runs(tmp_path_factory):
    """`python train.py trainer.devices=2`, left alone and with a signal to the second process only; and one process."""
    root = tmp_path_factory.mktemp("ddp")
    data = ("data=shards", f"data.train={runs.shard(root / 'a.tar', 40, bad=(_met_by_both(40),))}")
    common = ("max_steps=8", "knn.every_n_steps=0", "checkpoint.every_n_steps=100", *data)
    runs.run_here(root / "one", *common, without=runs.SCENES)
    process = runs.start(root / "two", *common, "trainer.devices=2", without=runs.SCENES)
    more = ("max_steps=300", "trainer.devices=2")
    stopped = runs.start(root / "signalled", *common[1:], *more, without=runs.SCENES)
    runs.wait_for_step(root / "signalled", stopped, 3)
    (child,) = [int(c) for c in _children(stopped.pid) if b"train.py" in _command(c)]
    os.kill(child, signal.SIGUSR1)
    codes = process.wait(120), stopped.wait(60)
    return root, codes


def _met_by_both(samples: int) -> int:
    """A sample that process 0 meets in the first epoch and process 1 in what 8 steps see of the second."""
    ids = Order(0, [samples])(np.arange(8 * BATCH)).tolist()
    process = [position % BATCH // (BATCH // 2) for position in range(8 * BATCH)]
    met = list(zip(ids, process))
    return min({id for id, who in met[:samples] if who == 0} & {id for id, who in met[samples:] if who == 1})


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as f:  # noqa: PTH123  (a kernel file, not a path of ours)
        return f.read().split()


def _command(pid: str) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as f:  # noqa: PTH123
        return f.read()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_whole_run_on_two_devices_agrees_with_one(command_runs):
    root, codes = command_runs
    assert codes[0] == 0, (root / "two.log").read_text()
    one, two = runs.final_state(root / "one"), runs.final_state(root / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_bad_sample_that_both_processes_meet_is_listed_once(command_runs):
    root, _ = command_runs
    one, two = (runs.skipped(root / name) for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert [entry["id"] for entry in one] == [entry["id"] for entry in two] == [_met_by_both(40)]
    assert read_metrics(root / "two" / "metrics.csv")[-1]["bad_samples"] == "1"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_signal_to_one_process_stops_both_after_a_checkpoint(command_runs):
    root, codes = command_runs
    log = (root / "signalled.log").read_text()
    assert codes[1] not in (0, -signal.SIGKILL), log
    assert "stopped by a signal at step" in log
    assert list((root / "signalled" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_and_leaves_no_process_that_waits(tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        process = runs.start(tmp_path / "r", "max_steps=2", "knn.every_n_steps=0", "trainer.devices=2")
        assert process.wait(120) == 7
        said, end = tmp_path / "r.log", time.monotonic() + 120
        while "stopped: the process that started rank 1 has ended" not in said.read_text():
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.2)
    assert f"cannot meet at MASTER_PORT={port}, which another program on this machine has: set" in said.read_text()
    assert "Traceback" not in said.read_text()


@pytest.mark.slow
def test_batch_norm_on_two_devices_trains_is_judged_and_exports_as_on_one(tmp_path):
    words = ("backbone=shvit_nano_lite", "image_size=128", "max_steps=3", "knn.every_n_steps=9", "data.num_train=40")
    left = ("image_size", "data.num_train")
    one = runs.run_here(tmp_path / "one", *words, without=left)
    process = runs.start(tmp_path / "two", *words, "trainer.devices=2", without=left)
    assert process.wait(900) == 0, (tmp_path / "two.log").read_text()
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    for key in ("loss_first", "loss_last", "rankme", "feature_std"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
    states = [runs.final_state(tmp_path / name) for name in ("one", "two")]
    exports = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two")]
    for a, b in (states, exports):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
