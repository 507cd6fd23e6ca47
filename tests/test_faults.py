"""SIGKILL at named points and at random moments; the same command then ends with the bits of a run left alone.

Training in one and two processes, the index that it builds, `selfsight index`, a bank of features, and `train.py` as
a user starts it. `kill_driver` has the processes, `selfsight.faults` the points.
"""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

import runs
from kill_driver import ONE_THREAD, ROOT, Job, assert_same, count, outcome, words_for
from selfsight.faults import POINTS

STEPS = 16
TRAINING = [  # in the order in which a run meets them; each takes it a step further
    "index.half", "index.written", "step.forward@1", "step.update@2", "step.end@4", "checkpoint.file@5",
    "checkpoint.written@6", "checkpoint.manifest@7", "checkpoint.renamed@8", "checkpoint.latest@9", "checkpoint.trash",
    "export.written", "summary",
]  # fmt: skip
BANK = ["bank.rows@40", "bank.noted@60", "bank.finished", "bank.renamed"]


class Case:
    """A command, what it comes to when it is left alone, and how long it takes."""

    def __init__(self, root, words, result, ranks=1):
        self.root, self.words, self.result, self.ranks = root, words, result, ranks
        job = self.job("whole")
        assert job.wait() == [0] * ranks, job.text()
        self.expected, self.seconds = result(root / "whole"), job.seconds

    def job(self, name, faults=""):
        (self.root / name).mkdir(exist_ok=True)
        return Job(self.words(self.root / name), self.root / f"{name}.log", ranks=self.ranks, faults=faults)

    def kill_at(self, name, point, rank=None):
        """Killed by itself at a named point; the other process ends on its own, with a sentence."""
        where, _, number = point.partition("@")
        faults = f"{where}:kill" + (f"@{number}" if number else "") + (f"%{rank}" if rank is not None else "")
        job = self.job(name, faults)
        self.check(job, job.wait(), rank, point)

    def kill_after(self, name, seconds, rank=None):
        """Killed from outside after so many seconds; False if it was quicker."""
        job = self.job(name)
        job.processes[rank or 0].join(seconds)
        job.signal(signal.SIGKILL, rank)
        codes = job.wait()
        if codes == [0] * self.ranks:
            return False
        self.check(job, codes, rank, f"{seconds:.2f} s")
        return True

    def check(self, job, codes, rank, when):
        if rank is None:
            assert set(codes) == {-signal.SIGKILL}, (when, codes, job.text())
            return
        assert codes[rank] == -signal.SIGKILL, (when, codes, job.text())
        others = [code for other, code in enumerate(codes) if other != rank]
        # 7: it noticed. 0: it had nothing left to do. 1: its partner vanished before they had met.
        assert set(others) <= {7, 0, 1}, (when, codes, job.text())

    def finish(self, name):
        """The same command once more, to its end; all of it is as if nothing had happened."""
        job = self.job(name)
        assert job.wait() == [0] * self.ranks, job.text()
        assert_same(self.result(self.root / name), self.expected, job.text())
        shutil.rmtree(self.root / name)
        count("processes compared", self.ranks)

    def random_kills(self, kills, seed, ranks=(None,), each=4):
        """So many kills at random moments, `each` of them on one victim."""
        draw, done = random.Random(seed), 0
        while done < kills:
            name, here = f"victim-{seed}-{done}", 0
            while here < min(each, kills - done):
                if not self.kill_after(name, draw.uniform(0.1, 0.95) * self.seconds, draw.choice(ranks)):
                    break
                here += 1
            self.finish(name)
            done += here
            count("kills at random moments", here)

    def named_kills(self, points, ranks=(None,)):
        """One victim that is killed at all of these points, one after the other."""
        for number, point in enumerate(points):
            self.kill_at("named", point, ranks[number % len(ranks)])
        self.finish("named")
        count("kills at named points", len(points))


def training(root, ranks=1, steps=STEPS):
    shard = runs.shard(root / "a.tar", 40)
    return Case(root, lambda folder: words_for(folder, shard, steps, ranks), outcome, ranks)


def indexing(root):
    shards = [runs.shard(root / f"{name}.tar", 200) for name in "abc"]

    def words(folder):
        return ["index", f"data.train=[{','.join(shards)}]", f"data.index_dir={folder}/index"]

    return Case(root, words, lambda folder: {p.name: p.read_bytes() for p in (folder / "index").glob("[!.]*")})


def banking(root):
    shard, trained = runs.shard(root / "a.tar", 160), root / "trained"
    trained.mkdir()
    job = Job(words_for(trained, shard, 2), root / "trained.log")
    assert job.wait() == [0], job.text()

    def words(folder):
        return ["probe", f"checkpoint={trained}/run", "probe=knn", f"out={folder}/out", f"bank.folder={folder}/banks",
                "batch_size=10", "num_workers=0", "device=cpu"]  # fmt: skip

    def result(folder):
        arrays = {"/".join(p.parts[-3:]): p.read_bytes() for p in folder.glob("banks/*/*/*.npy")}
        left = [p.name for p in folder.glob("banks/*/.part*")]
        return arrays | {"left": left, "top1": [w for w in (folder / "out/knn.json").read_text().split(",")
                                                if '"top' in w]}  # fmt: skip

    return Case(root, words, result)


# --- in the default set -----------------------------------------------------------------------------------------------


def test_kills_change_nothing(tmp_path):
    case = training(tmp_path, steps=6)
    case.named_kills(["index.half", "step.update@2", "checkpoint.manifest@3", "checkpoint.trash", "export.written"])
    case.random_kills(2, seed=1, each=2)


def test_a_process_that_is_gone_ends_the_other_with_a_sentence(tmp_path):
    job = Job(words_for(tmp_path, runs.shard(tmp_path / "a.tar", 40), 500, 2), tmp_path / "log", ranks=2,
              faults="step.end:kill@3%1")  # fmt: skip
    assert job.wait(120) == [7, -signal.SIGKILL], job.text()
    said = [line for line in job.text().splitlines() if line.startswith("stopped: ")]
    assert len(said) == 1 and "process 0 can no longer reach another process" in said[0], job.text()
    assert "Traceback" not in job.text()


def test_every_point_is_killed_at():
    assert sorted(point.partition("@")[0] for point in (*TRAINING, *BANK)) == sorted(POINTS)


# --- fifty kills ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_in_one_process(tmp_path):
    case = training(tmp_path)
    case.named_kills(TRAINING)
    case.random_kills(10, seed=2)


@pytest.mark.slow
def test_kills_of_one_of_two_processes_or_both(tmp_path):
    case = training(tmp_path, ranks=2)
    case.named_kills(["step.forward@1", "step.update@3", "step.end@5", "step.end@6"], ranks=(0, 1))
    case.named_kills(["checkpoint.written@3", "checkpoint.renamed@5"], ranks=(0,))
    case.random_kills(6, seed=3, ranks=(None, 0, 1), each=3)


@pytest.mark.slow
def test_kills_while_an_index_is_built(tmp_path):
    case = indexing(tmp_path)
    case.named_kills(["index.half", "index.written"])
    case.random_kills(3, seed=4, each=3)


@pytest.mark.slow
def test_kills_while_a_bank_is_built(tmp_path):
    case = banking(tmp_path)
    case.named_kills(BANK)
    case.random_kills(4, seed=5)


@pytest.mark.slow
def test_kills_of_the_script_that_a_user_starts(tmp_path):
    case, draw = training(tmp_path), random.Random(6)
    words = case.words(tmp_path / "script")[1:]
    for _ in range(3):
        with (tmp_path / "script.log").open("a") as log:
            process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=log, stderr=log,
                                       env=os.environ | ONE_THREAD, start_new_session=True)  # fmt: skip
        reached = len(runs._lines(tmp_path / "script" / "run" / "metrics.csv"))
        runs.wait_for_step(tmp_path / "script" / "run", process, min(STEPS - 2, reached + draw.randint(1, 4)))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    case.finish("script")
    count("kills at random moments", 3)
