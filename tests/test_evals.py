"""Evaluations during training: when, in what order, what happens to failures, kills and checkpoints. The probe command
is a stand-in here; `test_eval_run.py` has the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from selfsight import config
from selfsight.config import ConfigError
from selfsight.results import eval_folder, eval_log, eval_results
from selfsight.training import checkpoint, evals, jobs
from selfsight.training.eval_plan import EvalPlan
from selfsight.training.evals import Evals
from selfsight.training.log import read_metrics

# Waits for <out>/go, then writes what a probe writes; without the word "fine" in go it fails with a sentence.
STAND_IN = """
import json, os, pathlib, sys, time
words = dict(w.split("=", 1) for w in sys.argv[1:])
out = pathlib.Path(words["out"])
(out / "begun").write_text(json.dumps([os.getpid(), os.nice(0), os.environ.get("CUDA_VISIBLE_DEVICES"), words]))
while not (out / "go").exists():
    time.sleep(0.01)
if "fine" not in (out / "go").read_text():
    sys.exit("error: the disk is made of cheese")
result = {"probe": "linear", "top1": 10.0 + int(words["step"]), "standard_error": 1.5, "settings": {}}
(out / ".linear.json").write_text(json.dumps(result))
(out / ".linear.json").replace(out / "linear.json")
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Evaluations of a run of 60 steps whose checkpoints are empty; `make(words, start)` is a session of it."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(evals, "PROBE", (sys.executable, "-S", str(tmp_path / "stand_in.py")))
    run, sessions = tmp_path / "run", []

    def session(*words, start=0):
        data = ("image_size=32", "data.num_train=16", "data.num_val=8")
        cfg = config.load("train", [f"run_dir={run}", "max_steps=60", "batch_size=8", *data, *words])
        run.mkdir(exist_ok=True)
        found = Evals(EvalPlan(cfg, 60))
        found.lines = []
        found.say = found.lines.append
        found.take_up(start)
        sessions.append(found)
        return found

    session.run = run
    yield session
    for found in sessions:
        found.close()


def save(run, step, evals=None):
    folder = run / "checkpoints"
    return checkpoint.save(folder, step, {}, {}, keep_last=1, protect=evals.needed() if evals else ())


def step(found, number):
    """A training step at which the checkpoint is written."""
    save(found.run, number, found)
    found.after_step(number)


def release(run, name, number, word="fine"):
    folder = eval_folder(run, name, number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "go").write_text(word)


def until(found, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, found.lines
        found.poll()
        time.sleep(0.01)


def kept(run):
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


# --- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "due"),
    [
        (("every_n_steps=25",), [25, 50, 60]),
        (("at=[7,30]",), [7, 30]),
        (("every_n_steps=40", "at=7"), [7, 40, 60]),
        (("how=process",), [60]),
    ],
)
def test_the_steps_of_an_entry(tmp_path, words, due):
    cfg = config.load("train", [f"run_dir={tmp_path}", *(f"eval.knn.{word}" for word in words)])
    plan = EvalPlan(cfg, 60)
    assert [s for s in range(61) if plan.due("knn", s)] == plan.steps("knn", 60) == due
    assert plan.steps("knn", 30) == [s for s in due if s <= 30]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("eval.knn.at=[50,70]",), r"eval.knn: at=\[70\]: the run has 60 steps"),
        (("eval.knn.which=teacher",), "eval.knn: which=teacher: mae has student"),
        (("eval.knn.data=folder", "eval.knn.data.root=/nowhere/at/all"), "eval.knn: .*/nowhere/at/all"),
        (("eval.knn.how=slurm",), "eval.knn: how=slurm needs sbatch"),
        (("eval.linear.at=5", "data.labels=none", "data=folder", "data.root={images}"), "probe=linear needs labels"),
    ],
)
def test_what_cannot_work_is_said_before_training(tmp_path, monkeypatch, words, says):
    from PIL import Image

    for i in range(40):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [word.format(images=tmp_path / "images") for word in words]
    cfg = config.load("train", [f"run_dir={tmp_path / 'run'}", "max_steps=60", *words])
    with pytest.raises(ConfigError, match=says):
        EvalPlan(cfg, 60).check(["student"])


# --- processes -----------------------------------------------------------------------------------------------------


def test_processes_of_an_entry_wait_for_each_other_and_all_are_measured(make):
    found = make("eval.linear.every_n_steps=20", "eval.linear.probe.epochs=7", "eval.linear.threads=1")
    for number in (20, 40, 60):
        step(found, number)
    assert list(found.running) == [("linear", 20)] and found.waiting == [("linear", 40), ("linear", 60)]
    begun = eval_folder(make.run, "linear", 20) / "begun"
    until(found, begun.exists)
    _, nice, gpus, words = json.loads(begun.read_text() or "[0, 10, '', {}]")
    assert nice >= min(19, os.nice(0) + jobs.NICE) and gpus == ""  # steps back, and sees no GPU
    assert (words["step"], words["probe"], words["probe.epochs"], words["device"]) == ("20", "linear", "7", "cpu")
    release(make.run, "linear", 20)
    until(found, lambda: ("linear", 40) in found.running)
    assert found.waiting == [("linear", 60)]
    release(make.run, "linear", 40)
    release(make.run, "linear", 60)
    found.wait()
    rows = read_metrics(make.run / "evals" / "linear.csv")
    assert [(r["step"], r["images"], r["top1"]) for r in rows] == [
        ("20", "160", "30.0"), ("40", "320", "50.0"), ("60", "480", "70.0"),
    ]  # fmt: skip
    assert found.lines.count("eval linear: step 20: top-1 30.00 % (± 1.50)") == 1
    facts = found.summary()["linear"]
    assert (facts["last"], facts["last_step"], facts["best_step"], facts["standard_error"]) == (70.0, 60, 60, 1.5)


def test_a_checkpoint_stays_until_it_has_been_looked_at(make):
    found = make("eval.linear.every_n_steps=20")
    for number in (20, 40):
        step(found, number)
    save(make.run, 50, found)
    assert kept(make.run) == [20, 40, 50]
    for number in (20, 40):
        release(make.run, "linear", number)
    until(found, lambda: not found.needed())
    save(make.run, 55, found)
    assert kept(make.run) == [55]


def test_a_failure_is_a_line_a_note_and_nothing_more(make):
    found = make("eval.linear.at=[20,60]")
    step(found, 20)
    release(make.run, "linear", 20, "no")
    until(found, lambda: found.failed)
    log = eval_log(make.run, "linear", 20)
    assert found.lines == [f"eval linear: step 20 FAILED: the disk is made of cheese ({log})"]
    assert log.read_text().startswith("$ ")  # the command, to try it by hand
    note = {"step": 20, "why": "the disk is made of cheese", "log": str(log)}
    assert found.summary()["linear"] == {"probe": "linear", "failed": [note]}
    again = make("eval.linear.at=[20,60]", start=20)
    assert again.summary()["linear"]["failed"] == [note] and not again.waiting
    assert not again.plan.left(20)


def test_a_checkpoint_that_was_not_written_is_a_failure(make):
    found = make("eval.linear.at=20")
    found.after_step(20)
    assert "its checkpoint could not be written" in found.lines[0]


# --- kills ---------------------------------------------------------------------------------------------------------


def test_a_killed_session_loses_nothing_and_repeats_nothing(make):
    words = ("eval.linear.every_n_steps=10", "eval.linear.max_running=2")
    killed = make(*words)
    for number in (10, 20, 30, 40):
        step(killed, number)
    release(make.run, "linear", 10)
    until(killed, lambda: 10 in killed.results["linear"] and len(killed.running) == 2)
    at_work = {key: job.process.pid for key, job in killed.running.items()}
    assert set(at_work) == {("linear", 20), ("linear", 30)}
    begun = eval_folder(make.run, "linear", 20) / "begun"
    until(killed, begun.exists)
    os.kill(at_work["linear", 30], signal.SIGKILL)  # with the training; 20 survives it
    next(job for key, job in killed.running.items() if key[1] == 30).process.wait()

    found = make(*words, start=40)
    assert set(found.results["linear"]) == {10}
    assert set(found.running) == {("linear", 20)} and found.running["linear", 20].process is None
    assert found.waiting == [("linear", 30), ("linear", 40)]
    assert found.needed() == {20, 30, 40} and found.plan.left(40)
    for number in (20, 30, 40):
        release(make.run, "linear", number)
    for job in killed.running.values():  # or the dead would keep no lock, but stay as zombies of this process
        job.process.wait()
    found.wait()
    assert sorted(found.results["linear"]) == [10, 20, 30, 40]
    assert json.loads(begun.read_text())[0] == at_work["linear", 20]  # the one of the first session, not a second
    assert not found.plan.left(40)


def test_a_stop_ends_the_processes_and_the_same_command_starts_them_again(make):
    found = make("eval.linear.at=20")
    step(found, 20)
    process = found.running["linear", 20].process
    found.close()
    assert process.poll() == -signal.SIGTERM
    again = make("eval.linear.at=20", start=20)
    assert again.waiting == [("linear", 20)]
    release(make.run, "linear", 20)
    again.wait()
    assert 20 in again.results["linear"]


def test_a_process_that_got_the_signal_of_the_training_has_not_failed(make):
    found = make("eval.linear.at=20")
    step(found, 20)
    until(found, (eval_folder(make.run, "linear", 20) / "begun").exists)
    os.kill(found.running["linear", 20].process.pid, signal.SIGUSR1)
    until(found, lambda: not found.running)
    assert "stopped by a signal; the same command starts it again" in found.lines[-1] and not found.failed
    assert make("eval.linear.at=20", start=20).waiting == [("linear", 20)]


def test_results_after_the_checkpoint_are_measured_again(make):
    for number in (20, 40):
        folder = eval_folder(make.run, "linear", number)
        folder.mkdir(parents=True)
        (folder / "linear.json").write_text(json.dumps({"top1": 1.0}))
    found = make("eval.linear.every_n_steps=20", start=30)
    assert list(found.results["linear"]) == [20] and not eval_folder(make.run, "linear", 40).exists()


def test_the_best_number_of_several_is_said_to_be_flattered(make):
    for number, top1 in ((20, 40.0), (40, 55.5), (60, 55.5), (80, 30.0)):
        folder = eval_folder(make.run, "linear", number)
        folder.mkdir(parents=True)
        (folder / "linear.json").write_text(json.dumps({"top1": top1, "standard_error": 2.0}))
        found = make("max_steps=80", "eval.linear.every_n_steps=20", start=80)
        facts = found.summary()["linear"]
        if number == 20:
            assert (facts["best"], facts["best_step"], facts["best_is"]) == (40.0, 20, "the only one")
    assert (facts["last"], facts["last_step"]) == (30.0, 80)
    assert (facts["best"], facts["best_step"]) == (55.5, 40)  # the first of equal ones
    assert facts["best_is"] == "the highest of 4 on the reported split, so it is flattered"


def test_an_entry_that_comes_late_says_what_it_missed(make):
    save(make.run, 40)
    found = make("eval.linear.every_n_steps=20", start=40)
    assert found.waiting == [("linear", 40)]
    assert found.lines == ["eval linear: step 20 cannot be measured any more (no checkpoint); left out"]


def test_numbers_measured_in_another_way_need_another_name(make):
    found = make("eval.linear.at=20")
    settings = config.load("probe", ["checkpoint=-", "probe=linear", "probe.epochs=3"])
    folder = eval_folder(make.run, "linear", 20)
    folder.mkdir(parents=True)
    tree = {"top1": 1.0, "settings": {"probe": dict(settings.probe), "seed": 0}}
    (folder / "linear.json").write_text(json.dumps(tree, default=list))
    with pytest.raises(ConfigError, match=r"eval.linear: the number of step 20 .*probe.epochs: 3 -> 50.*another name"):
        found.plan.check(["student"])


# --- Slurm ---------------------------------------------------------------------------------------------------------

SBATCH = """#!/bin/sh
echo "$@" >> "$STAND_IN/sbatch.calls"
env | grep -c '^SLURM_NTASKS' >> "$STAND_IN/slurm.env"
test -e "$STAND_IN/refuse" && { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "41;cluster"
"""
SQUEUE = """#!/bin/sh
cat "$STAND_IN/queue"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """sbatch and squeue that note what they are asked for."""
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "queue").write_text("PENDING\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("SLURM_NTASKS", "8")
    return tmp_path


SLURM = ("eval.linear.at=20", "eval.linear.how=slurm", "eval.linear.sbatch=[--partition=a b, --time=9]")


def test_a_job_is_submitted_collected_and_not_waited_for(make, slurm):
    found = make(*SLURM)
    step(found, 20)
    until(found, lambda: found.submitted)
    call = (slurm / "sbatch.calls").read_text()
    assert "--parsable" in call and "--partition=a b --time=9" in call and "slurm/probe.sbatch checkpoint=" in call
    assert "step=20" in call and "device=" not in call and "--gpus" not in call  # the batch file decides
    assert (slurm / "slurm.env").read_text() == "0\n"  # nothing of the job of the training
    found.wait()
    assert found.lines[-1] == "in Slurm's queue: 41 (linear of step 20); the same command collects them"
    assert found.summary()["linear"] == {"probe": "linear", "in_queue": [20]} and found.needed() == {20}
    again = make(*SLURM, start=20)
    assert again.submitted == {("linear", 20): "41"} and not again.plan.left(20)
    (eval_folder(make.run, "linear", 20) / "linear.json").write_text(json.dumps({"top1": 33.0}))
    again.collect()
    assert again.lines == ["eval linear: step 20: top-1 33.00 %"] and again.needed() == set()
    assert (slurm / "sbatch.calls").read_text() == call


def test_a_job_on_the_cores_asks_for_no_gpu(make, slurm):
    found = make(*SLURM, "eval.linear.device=cpu", "eval.linear.sbatch=[--gpus-per-node=2]")
    step(found, 20)
    until(found, lambda: found.submitted)
    call = (slurm / "sbatch.calls").read_text()
    assert "device=cpu" in call and "--gpus-per-node=0 --gpus-per-node=2 " in call  # of two the later counts


@pytest.mark.parametrize("state", ["FAILED\n", ""])
def test_a_job_that_is_over_without_a_number_has_failed(make, slurm, state):
    found = make(*SLURM)
    step(found, 20)
    until(found, lambda: found.submitted)
    (slurm / "queue").write_text(state)
    found.wait()
    assert "job 41 is over and left no number" in found.lines[-1]


def test_a_job_that_is_refused_has_failed(make, slurm):
    (slurm / "refuse").touch()
    found = make(*SLURM)
    step(found, 20)
    until(found, lambda: found.failed)
    assert "FAILED: sbatch: error: invalid partition" in found.lines[0]


def test_the_batch_file_takes_words_or_a_line_of_a_file(tmp_path):
    seen = tmp_path / "python"
    seen.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nshift; exec "$@"\n')
    for path in (seen, srun):
        path.chmod(0o755)
    lines = tmp_path / "probes.txt"
    lines.write_text("checkpoint=a step=1 probe=knn\ncheckpoint=b step=* probe=$HOME\n")

    def run(*words, **env):
        env = os.environ | {"SELFSIGHT_PYTHON": str(seen), "PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
        return subprocess.run(
            ["bash", str(jobs.batch_script("probe")), *words], env=env, capture_output=True, text=True
        )

    assert run("checkpoint=a b", "probe=knn").stdout == "<-P><-m><selfsight><probe><checkpoint=a b><probe=knn>"
    second = run(f"@{lines}", SLURM_ARRAY_TASK_ID="1").stdout
    assert second == "<-P><-m><selfsight><probe><checkpoint=b><step=*><probe=$HOME>"
    past = run(f"@{lines}", SLURM_ARRAY_TASK_ID="2")
    assert past.returncode == 2 and "has no line 3" in past.stderr
    assert "needs sbatch --array" in run(f"@{lines}").stderr


def test_what_an_entry_found_is_logged_with_its_own_step():
    import warnings

    from selfsight.results import Result
    from selfsight.training.wandb_sink import WandB

    heard, sink = [], WandB.__new__(WandB)
    sink.run = SimpleNamespace(
        log=lambda row, step: heard.append((row, step)), define_metric=lambda *a, **k: heard.append((a, k))
    )
    sink.failed, sink.evals = False, set()
    with warnings.catch_warnings():
        for at in (20, 40):
            sink.evaluation("linear", Result("top1", 33.0, 1.5, {}), at, 45)
    assert heard[1] == (("eval/linear/*",), {"step_metric": "eval/linear/step"})
    row = {"eval/linear/step": 40, "eval/linear/top1": 33.0, "eval/linear/standard_error": 1.5}
    assert heard[-1] == (row, 45) and len(heard) == 4


def test_numbers_are_read_from_what_is_complete(tmp_path):
    for number, text in ((20, "{"), (40, json.dumps({"top1": 5})), (60, json.dumps({"other": 1}))):
        folder = eval_folder(tmp_path, "a", number)
        folder.mkdir(parents=True)
        (folder / "x.json").write_text(text)
    (tmp_path / "evals" / "a-b-0000020").mkdir()
    assert {step: r.value for step, r in eval_results(tmp_path, "a").items()} == {40: 5.0}
