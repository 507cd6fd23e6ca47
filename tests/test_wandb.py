"""logger=wandb: every row from step 0 on, closed however a run ends, offline where online does not work."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import wandb
from omegaconf import OmegaConf

import runs
from selfsight.config import ConfigError
from selfsight.training.judge import Judge
from selfsight.training.loop import RunStopped
from selfsight.training.wandb_sink import WandB, logged_in

CFG = OmegaConf.create({"logger": {"project": "p", "entity": None, "tags": [], "mode": "online"}})


@pytest.fixture
def said(monkeypatch):
    """What a run says to the sink: (step, keys) per row, and the exit status."""
    heard = SimpleNamespace(rows=[], pictures=[], code=None)
    log, pictures, finish = WandB.log, WandB.pictures, WandB.finish
    monkeypatch.setattr(WandB, "log", lambda s, row, step: (heard.rows.append((step, set(row))), log(s, row, step)))
    monkeypatch.setattr(WandB, "pictures", lambda s, p, step: (heard.pictures.append(step), pictures(s, p, step)))
    monkeypatch.setattr(WandB, "finish", lambda s, code: (setattr(heard, "code", code), finish(s, code)))
    return heard


def test_a_run_is_logged_offline_from_step_0_on(tmp_path, said):
    words = ("logger=wandb", "logger.mode=offline", "max_steps=2", "knn.every_n_steps=2")
    runs.run_here(tmp_path / "r", *words, without=("pictures.every_n_steps",))
    assert [step for step, _ in said.rows] == [0, 1, 2]
    assert {"knn", "knn_raw_pixels"} <= said.rows[0][1] and {"knn", "loss"} <= said.rows[2][1]
    assert said.pictures == [0, 2] and said.code == 0
    assert wandb.run is None
    assert len(list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_a_stopped_run_is_closed_with_its_exit_status(tmp_path, said, monkeypatch):
    class Quiet:
        init = staticmethod(lambda **_: SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None))
        Settings = staticmethod(lambda **_: None)

    evaluate = Judge.evaluate

    def signalled(self, step, *what):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, step, *what)

    monkeypatch.setitem(sys.modules, "wandb", Quiet)
    monkeypatch.setattr(Judge, "evaluate", signalled)
    with pytest.raises(RunStopped):
        runs.run_here(tmp_path / "r", "logger=wandb", "max_steps=30", "knn.every_n_steps=1")
    assert said.code == 128 + signal.SIGTERM
    *_, (step, first), (again, whole) = said.rows  # the row of a stop comes before it is judged, and once more with it
    assert step == again and "loss" in first and "knn" not in first and whole >= first | {"knn", "rankme"}


class Unreachable:
    """A wandb package whose modes in `broken` do not work."""

    Settings = staticmethod(lambda **_: None)

    def __init__(self, *broken):
        self.broken, self.modes, self.down = broken, [], 0

    def init(self, mode, **_):
        self.modes.append(mode)
        if mode in self.broken:
            raise RuntimeError("no\nroute")
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None)

    def teardown(self):
        self.down += 1


def test_what_cannot_go_online_is_logged_offline_in_one_sentence(tmp_path, monkeypatch, capsys):
    package = Unreachable("online")
    monkeypatch.setitem(sys.modules, "wandb", package)
    assert WandB(CFG, tmp_path).run is not None
    assert (package.modes, package.down) == (["online", "offline"], 1)
    assert capsys.readouterr().out.startswith("W&B cannot be reached (no route): logging offline")


def test_a_logger_that_does_not_start_at_all_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", Unreachable("online", "offline"))
    sink = WandB(CFG, tmp_path)
    sink.log({"loss": 1.0}, 1)
    sink.finish(0)
    assert "W&B cannot be started (no route): metrics.csv has everything" in capsys.readouterr().out


def service() -> list[int]:
    """Processes of W&B that this one has started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "wandb-core" in line]


@pytest.mark.parametrize("logs_again", [True, False])
def test_rows_outlive_the_service_that_a_signal_to_the_whole_job_ends(tmp_path, logs_again):
    cfg = OmegaConf.merge(CFG, {"logger": {"mode": "offline"}})
    wandb.teardown()
    sink = WandB(cfg, tmp_path)
    for step in range(100):
        sink.log({"a long name of a number " + "x" * 100: step}, step)
    for pid in service():
        os.kill(pid, signal.SIGTERM)
    time.sleep(1)
    if logs_again:
        sink.log({"loss": 1.0}, 100)
    sink.finish(143)
    wandb.teardown()  # waits for the disk
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1 and len(files) == 2
    assert files[-1].stat().st_size > 100 * 100 and not sink.failed


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logger=wandb needs the wandb package .*logger=csv"):
        WandB(CFG, tmp_path)


def test_a_login_is_looked_up_for_the_server_that_is_used(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine wandb.lab.example login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.lab.example")
    assert logged_in()
