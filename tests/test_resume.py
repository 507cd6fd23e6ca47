"""A run that is killed or told to stop, and continued, ends with the same bits as one that was left alone."""

import json
import shutil
import signal
from pathlib import Path

import pytest

import runs
from selfsight.config import ConfigError
from selfsight.training import checkpoint, loop, meet
from selfsight.training.log import read_metrics

STEPS = 45  # 40 samples in batches of 8: the stop falls into the middle of an epoch
SLOW = ("knn.every_n_steps=1000",)  # at the ends only


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The reference, a run killed by SIGKILL and one stopped by SIGTERM; accumulation in all of them."""
    root = tmp_path_factory.mktemp("runs")
    common = (f"max_steps={STEPS}", "trainer.max_batch_per_device=4", "checkpoint.every_n_steps=3", *SLOW)
    runs.run_here(root / "whole", *common)
    victims = {}
    for name, workers in (("killed", 2), ("stopped", 1)):
        victims[name] = runs.start(root / name, *common, f"num_workers={workers}")
    for name, process in victims.items():
        runs.wait_for_step(root / name, process, 5)
        process.send_signal(signal.SIGKILL if name == "killed" else signal.SIGTERM)
    codes = {name: process.wait(60) for name, process in victims.items()}
    reached = {name: checkpoint.newest(root / name / "checkpoints").name for name in victims}
    for name in victims:
        runs.run_here(root / name, *common, "num_workers=0" if name == "killed" else "num_workers=1")
    return root, codes, reached


def test_sigkill_and_continue_is_bit_identical(everything):
    root, codes, reached = everything
    assert codes["killed"] == -signal.SIGKILL
    assert reached["killed"] < f"step-{STEPS:09d}"
    runs.assert_identical(runs.final_state(root / "whole"), runs.final_state(root / "killed"))


def test_sigterm_saves_at_the_step_boundary_and_continues_bit_identically(everything):
    root, codes, reached = everything
    assert codes["stopped"] == 128 + signal.SIGTERM
    assert reached["stopped"] < f"step-{STEPS:09d}"
    log = (root / "stopped.log").read_text()
    assert "stopped by a signal at step" in log
    assert "Traceback" not in log
    runs.assert_identical(runs.final_state(root / "whole"), runs.final_state(root / "stopped"))


def test_metrics_have_every_step_once_after_a_kill(everything):
    root, _, _ = everything
    for name in ("whole", "killed", "stopped"):
        steps = [int(r.split(",")[0]) for r in (root / name / "metrics.csv").read_text().splitlines()[1:]]
        assert steps == list(range(STEPS + 1)), name


def test_the_run_folder_is_complete(everything):
    root, _, _ = everything
    names = {p.name for p in (root / "killed").iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "checkpoints", "export", "report.html"} <= names
    summary = json.loads((root / "killed" / "summary.json").read_text())
    for key in (
        "loss_first", "loss_last", "knn_untrained", "knn_raw_pixels", "knn", "rankme", "images_per_second",
        "images_seen", "steps", "run_dir",
    ):  # fmt: skip
        assert summary[key] is not None, key
    assert summary["images_seen"] == STEPS * 8


def test_the_same_command_on_a_finished_run_says_so(everything, capsys):
    root, _, _ = everything
    before = Path(root / "whole" / "summary.json").stat().st_mtime_ns
    summary = runs.run_here(
        root / "whole", f"max_steps={STEPS}", "trainer.max_batch_per_device=4", "checkpoint.every_n_steps=3", *SLOW
    )
    assert "finished" in capsys.readouterr().out
    assert summary["steps"] == STEPS
    assert (root / "whole" / "summary.json").stat().st_mtime_ns == before


def test_a_run_that_was_ended_before_its_export_does_the_rest(everything):
    root, _, _ = everything
    for name in ("report.html", "summary.json"):
        (root / "stopped" / name).unlink()
    shutil.rmtree(root / "stopped" / "export")
    words = (f"max_steps={STEPS}", "trainer.max_batch_per_device=4", "checkpoint.every_n_steps=3", *SLOW)
    assert runs.run_here(root / "stopped", *words)["steps"] == STEPS
    assert (root / "stopped" / "export" / "model.safetensors").exists()


def test_other_settings_on_the_same_folder_stop_with_a_diff(everything):
    root, _, _ = everything
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1.*another run_dir"):
        runs.run_here(root / "whole", f"max_steps={STEPS}", "seed=1", *SLOW)


def test_a_deliberate_change_is_recorded(tmp_path):
    runs.run_here(tmp_path / "r", "max_steps=2", *SLOW)
    runs.run_here(tmp_path / "r", "max_steps=3", "allow_change=true", *SLOW)
    assert "max_steps: 2 -> 3" in (tmp_path / "r" / "changes.jsonl").read_text()
    assert checkpoint.newest(tmp_path / "r" / "checkpoints").name == "step-000000003"


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_damaged_checkpoint_costs_no_good_one_and_without_any_the_run_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "r" / "checkpoints"
    words = ("max_steps=6", "checkpoint.every_n_steps=4", "knn.every_n_steps=0")
    runs.run_here(tmp_path / "r", *words)
    spoil(folder / "step-000000006")
    monkeypatch.setenv("SELFSIGHT_FAULTS", "step.forward:term@4")
    with pytest.raises(loop.RunStopped, match="stopped by a signal at step 5"):
        runs.run_here(tmp_path / "r", *words, "checkpoint.keep_last=1")
    assert "set aside as damaged-step-000000006" in capsys.readouterr().out
    assert checkpoint.newest(folder).name == "step-000000005"
    spoil(folder / "step-000000005")
    with pytest.raises(checkpoint.CheckpointError, match="train from the start in another run_dir"):
        runs.run_here(tmp_path / "r", *words)


@pytest.mark.parametrize("again", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_rows_are_means_over_all_their_steps_whoever_interrupted_them(tmp_path, monkeypatch, again):
    words = ("max_steps=8", "log_every_n_steps=4", "knn.every_n_steps=0",
             "checkpoint.every_n_steps=2", "trainer.max_batch_per_device={}")  # fmt: skip
    without = ("log_every_n_steps",)

    def columns(name):
        left = ("images_per_second", "data_wait", "mfu")
        rows = read_metrics(tmp_path / name / "metrics.csv")
        return [{k: float(v) for k, v in row.items() if k not in left and v} for row in rows]

    runs.run_here(tmp_path / "whole", *words[:-1], words[-1].format(4), without=without)
    with monkeypatch.context() as patched, pytest.raises(loop.RunStopped, match="stopped by a signal at step 7"):
        patched.setenv("SELFSIGHT_FAULTS", "step.forward:term@6")
        runs.run_here(tmp_path / "r", *words[:-1], words[-1].format(4), without=without)
    changed = ("allow_change=true", "data.max_bad_fraction=0.5")
    runs.run_here(tmp_path / "r", *words[:-1], words[-1].format(again), *changed, without=without)
    assert [row["step"] for row in columns("whole")] == [4, 8]
    for found, expected in zip(columns("r"), columns("whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5 if again == 8 else 0, abs=0)


def test_a_run_that_is_killed_after_its_last_checkpoint_keeps_what_another_keeps(tmp_path, monkeypatch):
    words = ("max_steps=4", "checkpoint.every_n_steps=1", "knn.every_n_steps=4")

    def end(at, step=None):
        if (at, step) == ("checkpoint.renamed", 4):
            raise EOFError("as if killed here")

    with monkeypatch.context() as patched, pytest.raises(EOFError):
        patched.setattr(checkpoint, "fault", end)
        runs.run_here(tmp_path / "r", *words)
    folder = tmp_path / "r" / "checkpoints"
    assert not (folder / "best").exists()
    (folder / ".tmp-best-1").write_text("step-0000")
    runs.run_here(tmp_path / "r", *words)
    assert {p.name for p in folder.iterdir()} == {"step-000000003", "step-000000004", "latest", "best"}
    assert {(folder / name).read_text() for name in ("latest", "best")} == {"step-000000004\n"}


def spoil(path):
    (path / "model.safetensors").write_bytes(b"")


def test_what_processes_must_have_in_common_is_compared_when_they_meet(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(meet, "same_start", lambda facts, data, device: met.append((facts, data)))
    for total in (1, 2):
        words = (f"max_steps={total}", "num_workers=0", "allow_change=true", "knn.every_n_steps=0")
        runs.run_here(tmp_path / "r", *words)
    (first, data), (second, _) = met
    assert {k for k in first if first[k] != second[k]} == {"step", "max_steps", "the number of steps"}
    assert (second["step"], second["seed"], second["objective.name"]) == (1, 0, "mae")
    assert not {"run_dir", "data.train", "num_workers", "trainer.devices", "logger.name"} & set(first)
    assert len(first["data"]) == 64 and data.startswith("scenes") and data.endswith("(40 samples)")


def test_the_sentence_about_processes_that_differ_names_them_and_the_key():
    same = {"step": 0, "data": "a", "seed": 0, "batch_size": 8}

    def told(*changes):
        return meet.difference([same | change for change in changes], ["a.tar", "b.tar", "c.tar"])

    assert "process 0 would continue from step 0 and process 1 from step 4" in told({}, {"seed": 5, "step": 4}, {})
    assert "process 0 would train on a.tar, process 2 on c.tar, and these" in told({}, {}, {"data": "b", "seed": 1})
    assert told({}, {"seed": 5}, {"seed": 6}).startswith("seed is 0 in process 0 and 5 in processes 1, 2: start all")
    assert told({}, {"optim.x": 1}).startswith("optim.x is null in process 0 and 1 in process 1")
