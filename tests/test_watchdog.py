"""A run in which nothing moves ends and says which process hangs in what; long evaluations are not hangs."""

import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import runs
from kill_driver import Job, command, count, words_for
from selfsight.training import checkpoint, jobs, loop, watchdog
from selfsight.training.lightning import starter
from selfsight.training.run import Run
from selfsight.training.watchdog import CODE, DATA, MEET, ORPHAN, START, STEP, Watchdog

LIMIT = 0.6  # seconds
SECONDS = 15.0  # the limit of two processes, whose first step takes 9 beside other tests


@pytest.fixture
def watch(tmp_path):
    """Makes watchdogs that note their end instead of ending the process."""
    made, codes = [], []

    def make(rank=0, **kwargs):
        made.append(Watchdog(tmp_path, rank, LIMIT / 60, end=codes.append, **kwargs))
        return made[-1]

    yield make, codes
    for dog in made:
        dog.stop()


def note(folder, rank, phase, step, seconds=0.0, age=0.0):
    (folder / ".pulse").mkdir(exist_ok=True)
    seen = {"phase": phase, "step": step, "seconds": seconds, "time": time.time() - age, "host": "n7", "pid": 41}
    text = json.dumps(seen)
    (folder / "note").write_text(text)
    (folder / "note").replace(folder / ".pulse" / f"rank-{rank}.json")


def ended(codes, seconds=8.0):
    until = time.monotonic() + seconds
    while not codes and time.monotonic() < until:
        time.sleep(0.05)
    return codes


def test_a_wait_for_data_that_does_not_end_is_named(watch, tmp_path, capfd):
    make, codes = watch
    dog = make()
    dog.enter(DATA, 7)
    dog.start(4)
    assert ended(codes) == [CODE]
    said = capfd.readouterr().err
    assert "hang: rank 0 has been waiting for data for step 8 since" in said and "trainer.hang_minutes" in said
    assert "test_watchdog.py" in (tmp_path / "hang-rank-0.txt").read_text()  # where this thread stands


def test_a_process_whose_starter_has_ended_says_where_it_stands_and_ends(watch, tmp_path, capfd, monkeypatch):
    make, codes = watch
    monkeypatch.setattr(watchdog, "GRACE", 0.3)
    monkeypatch.setattr(watchdog, "starter", os.getppid)
    dog = make(rank=1)
    dog.enter("evaluating", 7)
    dog.start(2)
    assert ended(codes, 0.5) == []
    monkeypatch.setattr(watchdog.os, "getppid", lambda: 1)
    assert ended(codes) == [ORPHAN]
    assert "stopped: the process that started rank 1 has ended" in capfd.readouterr().err
    assert "test_watchdog.py" in (tmp_path / "hang-rank-1.txt").read_text()


def test_a_process_that_nobody_listens_to_ends_all_the_same(watch, monkeypatch):
    make, codes = watch

    def broken(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    dog = make()
    dog.enter(DATA, 7)
    dog.start(1)
    assert ended(codes) == [CODE]


STARTED = {  # environment of a process, and whether it ends with its parent, or with a process that is gone
    "the first": ({}, False, False),
    "by the first": ({"LOCAL_RANK": "1"}, True, True),
    "the first, which has started others": ({"LOCAL_RANK": "0"}, False, False),
    "by torchrun": ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False, False),
    "by srun": ({"LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, False, False),
}


@pytest.mark.parametrize("how", STARTED)
def test_only_a_process_that_the_first_of_its_machine_has_started_ends_with_it(how, monkeypatch):
    env, parent, gone = STARTED[how]
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_JOB_NAME", jobs.STARTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert starter() is None  # by hand
    child = subprocess.Popen(["true"])
    while _state(child.pid) != "Z":  # has ended, and nobody has waited for it
        time.sleep(0.01)
    monkeypatch.setenv(jobs.STARTER, str(os.getppid()))
    assert starter() == (os.getppid() if parent else None)
    monkeypatch.setenv(jobs.STARTER, str(child.pid))
    assert starter() == (child.pid if gone else None)
    child.wait()
    monkeypatch.setenv(jobs.STARTER, str(child.pid))
    assert starter() == (child.pid if gone else None)
    monkeypatch.setenv(jobs.STARTER, str(os.getpid()))
    assert starter() is None  # of another run, which goes on
    assert jobs.STARTER not in jobs.slurm_env()


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_the_process_that_is_behind_is_the_one_that_hangs(watch, tmp_path, capfd):
    make, codes = watch
    dog = make()
    note(tmp_path, 3, DATA, 6, seconds=70)
    note(tmp_path, 2, STEP, 6, seconds=69)
    dog.enter(STEP, 7)  # waits for the others
    dog.start(4)
    assert ended(codes) == [CODE]
    said = capfd.readouterr().err
    assert "hang: rank 3 has been waiting for data for step 7 since 70 s" in said
    assert "rank 2 has" not in said and "rank 0 has" not in said


def test_a_process_that_is_gone_is_named_and_notes_of_an_earlier_session_are_not(watch, tmp_path, capfd):
    make, codes = watch
    dog = make()
    dog.began -= 100
    note(tmp_path, 1, STEP, 7, age=50)
    note(tmp_path, 2, "saving", 3, age=5000)
    dog.enter(STEP, 7)
    dog.start(4)
    assert ended(codes) == [CODE]
    said = capfd.readouterr().err
    assert re.search(r"hang: rank 1 has not been heard of for 5\d s \(process 41 on n7, computing for step 8\)", said)
    assert "rank 2" not in said and "rank 0 has" not in said


@pytest.mark.parametrize("whose", ["own", "another's"])
def test_what_may_take_long_is_no_hang(watch, tmp_path, whose):
    make, codes = watch
    dog = make()
    dog.enter(STEP, 7)
    dog.start(4)
    if whose == "own":
        with dog.busy("evaluating"):
            assert not ended(codes, 4 * LIMIT)
    else:
        note(tmp_path, 1, "saving", 7)
        assert not ended(codes, 4 * LIMIT)
        note(tmp_path, 1, "saving", 7, age=100)  # that process is gone
    assert ended(codes) == [CODE]


def test_who_waits_for_one_that_has_just_moved_does_not_end_it(watch, tmp_path):
    make, codes = watch
    dog = make()
    dog.enter(STEP, 7)  # since long ago: the other one evaluated meanwhile
    dog.start(4)
    until = time.monotonic() + 4 * LIMIT
    while time.monotonic() < until:
        note(tmp_path, 1, STEP, 7, seconds=0.1)
        time.sleep(0.05)
    assert not codes
    assert ended(codes) == [CODE]


def test_a_process_that_an_earlier_session_had_is_not_waited_for(watch, tmp_path, capfd):
    make, codes = watch
    dog = make()
    dog.began -= 10
    note(tmp_path, 2, STEP, 7, seconds=9, age=9)
    dog.enter(DATA, 7)
    dog.start(2)
    assert ended(codes) == [CODE]
    said = capfd.readouterr().err
    assert "hang: rank 0 has been waiting for data for step 8" in said and "rank 2" not in said


@pytest.mark.parametrize("silent", [True, False])
def test_srun_is_told_to_end_what_does_not_answer(watch, tmp_path, monkeypatch, silent):
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "STEP_ID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    make, codes = watch
    dog = make()
    note(tmp_path, 1, STEP, 7, seconds=9, age=9 if silent else 0)
    dog.enter(STEP, 7)
    dog.began -= 10
    dog.start(2)
    assert ended(codes) == [CODE]
    told = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""
    assert told == ("--signal=KILL 7.0\n" if silent else "")


def test_progress_is_no_hang_and_the_notes_go(watch, tmp_path):
    make, codes = watch
    dog = make()
    dog.start(4)
    for step in range(12):
        dog.enter(STEP, step)
        time.sleep(LIMIT / 4)
    dog.stop()
    assert not codes and not (tmp_path / ".pulse").exists()


def test_no_limit_no_thread(tmp_path):
    dog = Watchdog(tmp_path, 0, 0.0)
    dog.start(4)
    assert dog.thread is None and not (tmp_path / ".pulse").exists()


@pytest.mark.parametrize("what", ["the start", "a step", "saving"])
def test_a_run_may_evaluate_and_save_for_longer_than_the_limit(tmp_path, monkeypatch, what):
    codes = []
    monkeypatch.setattr(loop, "Watchdog", functools.partial(Watchdog, end=codes.append))
    call = {"the start": (Run, "_untrained"), "a step": (Run, "_evaluate"), "saving": (checkpoint, "save")}[what]
    own = getattr(*call)

    def slow(*args, **kwargs):
        time.sleep(3 * LIMIT)
        return own(*args, **kwargs)

    monkeypatch.setattr(*call, slow)
    runs.run_here(tmp_path / "r", "max_steps=2", f"trainer.hang_minutes={LIMIT / 60}", "checkpoint.every_n_steps=1")
    assert not codes


@pytest.mark.slow
def test_the_others_wait_for_the_first_process_longer_than_the_limit(tmp_path):
    (tmp_path / "victim").mkdir()
    words = words_for(tmp_path / "victim", runs.shard(tmp_path / "a.tar", 40), 2, 2)
    words = [*words, f"trainer.hang_minutes={SECONDS / 60}", "knn.every_n_steps=1"]
    job = Job(words, tmp_path / "log", ranks=2, target=slowly)
    assert job.wait() == [0, 0] and "hang" not in job.text(), job.text()


def slowly(words, log, env):
    """The command with two evaluations longer than the limit: before the processes meet, and before the last step."""
    own, calls = Run._evaluate, []

    def evaluate(self, *args):
        calls.append(1)
        time.sleep(1.4 * SECONDS if len(calls) <= 2 else 0)
        return own(self, *args)

    Run._evaluate = evaluate
    command(words, log, env)


@pytest.mark.slow
def test_a_run_whose_loader_hangs_ends_and_continues(tmp_path):
    words = ("max_steps=400", "num_workers=1", "knn.every_n_steps=0", "checkpoint.every_n_steps=5")
    process = runs.start(tmp_path / "r", *words, "trainer.hang_minutes=0.1")
    try:
        runs.wait_for_step(tmp_path / "r", process, 6)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        assert process.wait(60) == CODE
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / "r.log").read_text()
    assert "hang: rank 0 has been waiting for data for step" in log and "Traceback" not in log
    assert "wait" in (tmp_path / "r" / "hang-rank-0.txt").read_text()
    process = runs.start(tmp_path / "r", *words, "trainer.hang_minutes=0.1")
    runs.wait_for_step(tmp_path / "r", process, 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


class Pair:
    """A training in two processes that ends when nothing moves for SECONDS."""

    def __init__(self, tmp_path):
        words = words_for(tmp_path / "victim", runs.shard(tmp_path / "a.tar", 40), 4000, 2)
        (tmp_path / "victim").mkdir()
        self.run = tmp_path / "victim" / "run"
        self.job = Job([*words, f"trainer.hang_minutes={SECONDS / 60}"], tmp_path / "log", ranks=2)

    def stop(self, rank):
        """Once it trains, and has noted that it does (it notes a few times per limit), hold a process."""
        note = self.run / ".pulse" / f"rank-{rank}.json"
        until = time.monotonic() + 300
        while not note.is_file() or json.loads(note.read_text())["phase"] in (START, MEET):
            assert time.monotonic() < until, self.job.text()
            time.sleep(0.05)
        self.job.signal(signal.SIGSTOP, rank)


@pytest.mark.slow
def test_of_two_processes_the_one_that_stands_still_is_named(tmp_path):
    pair = Pair(tmp_path)
    pair.stop(1)
    pair.job.processes[0].join(300)
    assert pair.job.processes[0].exitcode == CODE, pair.job.text()
    pair.job.signal(signal.SIGKILL)
    pair.job.wait()
    said = pair.job.text()
    pid = pair.job.processes[1].pid
    assert "hang: rank 1 has not been heard of for" in said and f"(process {pid} on " in said, said
    last = "computing|waiting for data|evaluating|saving"
    assert re.search(rf", ({last}) for step \d+\)", said), said
    assert "hang: rank 0" not in said
    assert (pair.run / "hang-rank-0.txt").is_file()
    count("hangs of one of two processes")


def test_a_process_that_never_comes_is_not_waited_for_for_ever(tmp_path):
    pair = Pair(tmp_path)
    pair.job.signal(signal.SIGKILL, 1)
    assert pair.job.wait() == [CODE, -signal.SIGKILL]
    assert "hang: rank 0 has been waiting for the other processes for" in pair.job.text()
    assert "one has ended or never started" in pair.job.text() and "Traceback" not in pair.job.text()
    assert not list(pair.run.glob("hang-rank-*"))
    count("hangs of one of two processes")
