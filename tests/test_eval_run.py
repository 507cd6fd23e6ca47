"""Evaluations of real trainings: in the training and beside it, without a change to what is trained."""

import json
import random
import signal

import numpy as np
import pytest
import torch

import runs
from selfsight import show
from selfsight.results import eval_results
from selfsight.training import evals, jobs
from selfsight.training.log import read_metrics

COMMON = ("max_steps=4", "knn.every_n_steps=0", "checkpoint.keep_last=1")
ENTRIES = (
    "eval.knn.every_n_steps=2", "eval.knn.how=inline",
    "eval.heads.probe=attentive", "eval.heads.how=inline", "eval.heads.probe.epochs=1", "eval.heads.probe.seeds=1",
    "eval.bad.probe=knn", "eval.bad.how=inline", "eval.bad.probe.k=1000",
    "eval.beside.probe=knn", "eval.beside.at=2", "eval.beside.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _at_once():
    """Beside other tests a process that steps back waits for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "NICE", 0)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run without evaluations, and the same with some in it and one beside it."""
    root = tmp_path_factory.mktemp("evaluated")
    runs.run_here(root / "plain", *COMMON)
    return root, runs.run_here(root / "evaluated", *COMMON, *ENTRIES)


@pytest.mark.slow
def test_evaluations_change_no_bit_of_the_training(pair):
    root, _ = pair
    runs.assert_identical(runs.final_state(root / "plain"), runs.final_state(root / "evaluated"))
    losses = [[r["loss"] for r in read_metrics(root / name / "metrics.csv")] for name in ("plain", "evaluated")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.slow
def test_a_process_finds_in_the_checkpoint_what_the_training_finds_in_memory(pair):
    root, _ = pair
    here, beside = (eval_results(root / "evaluated", name) for name in ("knn", "beside"))
    assert list(here) == [2, 4] and list(beside) == [2]
    for key in ("top1", "top5", "standard_error", "protocol", "data", "image_size", "step", "which", "backbone"):
        assert here[2].facts[key] == beside[2].facts[key], key


@pytest.mark.slow
def test_the_run_folder_holds_numbers_and_no_features(pair):
    root, summary = pair
    folder = root / "evaluated"
    assert json.loads((folder / "summary.json").read_text())["evals"] == summary["evals"]
    found = summary["evals"]
    assert (found["knn"]["last_step"], found["beside"]["last_step"]) == (4, 2)
    assert not (folder / "evals" / ".banks").exists()
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == [
        "step-000000004"
    ]  # 2 was kept till it was read
    assert "<h2>Evaluations</h2>" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_failure_in_the_training_does_not_end_it(pair):
    root, summary = pair
    (failed,) = summary["evals"]["bad"]["failed"]
    assert failed["step"] == 4 and failed["why"].startswith("k=1000 neighbours of a bank of 40")
    assert "Traceback" in (root / "evaluated" / "evals" / "bad-0000004.log").read_text()


@pytest.mark.slow
def test_a_finished_run_says_so_unless_an_evaluation_is_new(pair, monkeypatch, capsys):
    root, _ = pair
    words = [word for word in ENTRIES if not word.startswith("eval.bad")]
    runs.run_here(root / "evaluated", *COMMON, *ENTRIES)
    assert "This run is finished" in capsys.readouterr().out
    added = runs.run_here(root / "evaluated", *COMMON, *words, "eval.late.probe=knn", "eval.late.how=inline")
    assert added["evals"]["late"]["last"] == added["evals"]["knn"]["last"]


@pytest.mark.slow
def test_show_has_the_numbers_in_a_table_and_a_panel(pair, tmp_path, capsys):
    from omegaconf import OmegaConf

    root, _ = pair
    (found,) = show.show(OmegaConf.create({"runs": [str(root / "evaluated")], "out": str(tmp_path / "c.svg")}))
    assert {"eval.knn", "eval.heads", "eval.beside"} <= found["probes"].keys()
    assert "eval.knn" in capsys.readouterr().out
    assert "knn, top-1 % over images seen" in (tmp_path / "c.svg").read_text()


def test_global_generators_go_on_as_if_nothing_had_been_drawn():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with evals._same_randomness(torch.device("cpu")):
        draw()
        torch.manual_seed(7)
    assert draw() == expected


@pytest.mark.slow
def test_a_run_that_is_killed_has_all_its_evaluations_in_the_end(tmp_path):
    words = ("max_steps=24", "knn.every_n_steps=0", "eval.linear.every_n_steps=12", "eval.linear.probe.epochs=2",
             "eval.knn.every_n_steps=8", "eval.knn.how=inline")  # fmt: skip
    runs.run_here(tmp_path / "whole", *words)
    process = runs.start(tmp_path / "killed", *words)
    runs.wait_for_step(tmp_path / "killed", process, 14)
    process.send_signal(signal.SIGKILL)
    process.wait()
    runs.run_here(tmp_path / "killed", *words)
    runs.assert_identical(runs.final_state(tmp_path / "whole"), runs.final_state(tmp_path / "killed"))
    for name, steps in (("linear", [12, 24]), ("knn", [8, 16, 24])):
        found = [eval_results(tmp_path / run, name) for run in ("whole", "killed")]
        assert [list(r) for r in found] == [steps, steps]
        first, second = ([r.value for r in one.values()] for one in found)
        assert first == second
