"""SIGKILL at named points and at random moments; the same command then ends with the bits of a run left alone.

Training in one and two processes, the index that it builds, `selfsight index`, a bank of features, and the script that
a user starts. `kill_driver` has the processes, `selfsight.faults` the points.
"""

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import runs
from kill_driver import ONE_THREAD, ROOT, Job, assert_same, command, count, outcome, words_for
from selfsight import cli
from selfsight.faults import POINTS
from selfsight.objectives.dino import DINO
from selfsight.training import checkpoint
from selfsight.training.loop import AfterStep

STEPS = 16
TRAINING = [  # in the order in which a run meets them; each takes it a step further
    "index.half", "index.written", "step.forward@1", "step.update@2", "step.end@4", "checkpoint.file@5",
    "checkpoint.written@6", "checkpoint.manifest@7", "checkpoint.latest@9", "checkpoint.trash", "checkpoint.renamed@16",
    "export.written", "summary",
]  # fmt: skip
BANK = ["bank.rows@40", "bank.noted@60", "bank.finished", "bank.renamed"]


class Case:
    """A command, what it comes to when it is left alone, and how much of a processor it uses."""

    def __init__(self, root, what, words, result, ranks=1):
        self.root, self.what, self.words, self.result, self.ranks = root, what, words, result, ranks
        job = self.job("whole")
        job.spend(float("inf"))
        assert job.wait() == [0] * ranks, job.text()
        self.expected, self.used = result(root / "whole"), job.used

    def job(self, name, faults="", target=command, more=()):
        (self.root / name).mkdir(exist_ok=True)
        words, log = [*self.words(self.root / name), *more], self.root / f"{name}.log"
        return Job(words, log, ranks=self.ranks, faults=faults, target=target)

    def kill_at(self, name, point, rank=None):
        """Killed by itself at a named point; the other process ends on its own."""
        where, _, number = point.partition("@")
        faults = f"{where}:kill" + (f"@{number}" if number else "") + (f"%{rank}" if rank is not None else "")
        job = self.job(name, faults)
        self.check(job, job.wait(), rank, point)

    def kill_after(self, name, share, rank=None):
        """Killed from outside after this share of its work; False if it was quicker."""
        job = self.job(name)
        if job.spend(share * self.used, rank or 0):
            job.signal(signal.SIGKILL, rank)
        codes = job.wait()
        if codes == [0] * self.ranks:
            return False
        self.check(job, codes, rank, f"{share:.0%}")
        return True

    def check(self, job, codes, rank, when):
        if rank is None:
            assert set(codes) == {-signal.SIGKILL}, (when, codes, job.text())
            return
        assert codes[rank] == -signal.SIGKILL, (when, codes, job.text())
        others = {code for other, code in enumerate(codes) if other != rank}
        # 7: it noticed. 0: it had nothing left to do. 1: its partner vanished while they met. 5: it never came.
        assert others <= {7, 0, 1, 5}, (when, codes, job.text())

    def finish(self, name):
        """The same command once more, to its end; all of it is as if nothing had happened."""
        job = self.job(name)
        assert job.wait() == [0] * self.ranks, job.text()
        assert_same(self.result(self.root / name), self.expected, job.text())
        shutil.rmtree(self.root / name)
        count("processes compared", self.ranks)

    def random_kills(self, kills, seed, ranks=(None,), each=4):
        """So many kills at random moments, `each` of them on one victim at most."""
        draw, done, tries = random.Random(seed), 0, 0
        while done < kills:
            name, here = f"victim-{seed}-{tries}", 0
            while here < min(each, kills - done):
                tries += 1
                assert tries < 5 * kills, "the victims are quicker than their kills"
                if not self.kill_after(name, draw.uniform(0.05, 0.95), draw.choice(ranks)):
                    break
                here += 1
            self.finish(name)
            done += here
        self.count("at random moments", done)

    def named_kills(self, points, ranks=(None,)):
        """One victim that is killed at all of these points, one after the other."""
        for number, point in enumerate(points):
            self.kill_at("named", point, ranks[number % len(ranks)])
        self.finish("named")
        self.count("at named points", len(points))

    def count(self, how, kills):
        count(f"kills of {self.what}", kills)
        count(f"kills {how}", kills)


def training(root, ranks=1, steps=STEPS):
    """A run on a shard whose index it makes, with a checkpoint at each step."""
    shard = runs.shard(root / "a.tar", 40)
    what = "training" if ranks == 1 else "training in two processes"
    return Case(root, what, lambda folder: words_for(folder, shard, steps, ranks), outcome, ranks)


def indexing(root):
    shards = [runs.shard(root / f"{name}.tar", 200) for name in "abc"]

    def words(folder):
        return ["index", f"data.train=[{','.join(shards)}]", f"data.index_dir={folder}/index"]

    return Case(
        root,
        "building an index",
        words,
        lambda folder: {p.name: p.read_bytes() for p in (folder / "index").glob("[!.]*")},
    )


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

    return Case(root, "building a bank of features", words, result)


# --- in the default set -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return training(tmp_path_factory.mktemp("one"), steps=6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return training(tmp_path_factory.mktemp("two"), ranks=2, steps=5)


def test_kills_change_nothing(one):
    one.kill_at("killed", "step.update@1")
    one.kill_at("killed", "checkpoint.manifest@2")
    assert one.kill_after("killed", 0.6) or one.kill_after("killed", 0.1)
    one.finish("killed")
    one.count("at named points", 2)
    one.count("at random moments", 1)


def test_a_process_that_is_gone_ends_the_other_with_a_sentence(tmp_path):
    job = Job(words_for(tmp_path, runs.shard(tmp_path / "a.tar", 40), 500, 2), tmp_path / "log", ranks=2,
              faults="step.end:kill@3%1")  # fmt: skip
    assert job.wait(120) == [7, -signal.SIGKILL], job.text()
    said = [line for line in job.text().splitlines() if line.startswith("stopped: ")]
    assert len(said) == 1 and "process 0 can no longer reach another process" in said[0], job.text()
    assert "Traceback" not in job.text()
    count("processes that outlived their partner")


def test_every_point_is_killed_at():
    assert sorted(point.partition("@")[0] for point in (*TRAINING, *BANK)) == sorted(POINTS)


# --- other faults of one or two processes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_for_the_one_before(one):
    draw = random.Random(7)
    for step, file in enumerate(("model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"), 2):
        one.kill_at("damaged", f"step.forward@{step}")  # the checkpoints of this step and the one before are there
        path = one.root / f"damaged/run/checkpoints/step-{step:09d}" / file
        data = bytearray(path.read_bytes())
        if draw.random() < 0.5 or file == "MANIFEST.json":
            path.write_bytes(data[: draw.randrange(len(data))])
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
    one.finish("damaged")
    said = (one.root / "damaged.log").read_text()
    assert said.count("falling back to the one before it") == 4, said
    count("checkpoints damaged", 4)


def with_little_disk(words, log, env):
    """The command under a limit of the size of a file, as a quota would be: writing fails half-way."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    command(words, log, env)


@pytest.mark.slow
def test_a_disk_that_is_full_stops_a_run_which_continues_when_there_is_room(one):
    one.kill_at("full", "step.forward@2")
    job = one.job("full", target=with_little_disk)
    assert job.wait() == [1], job.text()
    said = job.text()
    assert said.count("FAILED") == 2 and "earlier ones stand; make room in" in said and "Traceback" not in said, said
    assert sorted(p.name[-1] for p in (one.root / "full/run/checkpoints").glob("[!l]*")) == ["1", "2"]
    one.finish("full")
    job = one.job("short", faults="checkpoint.file:full@3")  # for one checkpoint only: the run goes on
    assert job.wait() == [0], job.text()
    one.finish("short")
    count("writes that failed", 4)


SPOILT = {  # what, at step 2
    "loss": lambda value: value * torch.nan,
    "sum": lambda value: value + torch.inf,  # its gradients are finite
    "gradient": runs.Burst.apply,
}


def spoil(how, who=True):
    """DINO's loss, spoiled at step 2."""
    loss = DINO.loss

    def spoiled(self, batch, step):
        value, logs = loss(self, batch, step)
        return (SPOILT[how](value) if who and step == 2 else value), logs

    return spoiled


def spoiled_on_rank_1(how, words, log, env):
    """The command with trouble in the second process at step 2; each process tells its weights."""
    stop = AfterStep._stop_nonfinite

    def told(self, trainer, module):
        state = b"".join(v.numpy().tobytes() for v in checkpoint.unique_state(module.objective).values())
        (self.plan.run_dir / f"weights-{self.rank}").write_bytes(state)
        stop(self, trainer, module)

    DINO.loss, AfterStep._stop_nonfinite = spoil(how, env["RANK"] == "1"), told
    command(words, log, env)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "every"), [("loss", 1), *((how, 100) for how in SPOILT)])  # steps between checkpoints
def test_what_is_not_finite_in_one_process_stops_both_with_equal_weights(two, monkeypatch, how, every):
    target = functools.partial(spoiled_on_rank_1, how)
    job = two.job("spoiled", target=target, more=[f"checkpoint.every_n_steps={every}"])
    assert job.wait() == [4, 4], job.text()
    run = two.root / "spoiled/run"
    weights = [(run / f"weights-{rank}").read_bytes() for rank in (0, 1)]
    assert weights[0] == weights[1] and len(weights[0]) > 10_000
    assert sorted(p.name for p in run.glob("nonfinite-*-rank-?.*")) == [
        f"nonfinite-step-000000002-rank-{rank}.safetensors" for rank in (0, 1)
    ]
    # What is printed repeats it, with the batch of the process to blame where that is known.
    said = re.findall(r"`selfsight (replay batch=\S+)`", job.text())[-1]
    assert f"-rank-{0 if how == 'gradient' else 1}." in said
    monkeypatch.setattr(DINO, "loss", spoil(how))
    assert cli.main(None, said.split()) == 1
    count("losses that were not finite")
    if every > 1:
        return shutil.rmtree(two.root / "spoiled")
    newest, kept = checkpoint.newest(run / "checkpoints"), load_file(run / "nonfinite-step-000000002.safetensors")
    assert newest.name == "step-000000002"
    runs.assert_identical(kept, checkpoint.load(newest)[0])
    for path in [*run.glob("nonfinite-*"), *run.glob("weights-?")]:
        path.unlink()
    two.finish("spoiled")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_and_stops_both(two, rank):
    job = two.job("told", faults=f"step.forward:term@2%{rank}")
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.text()
    assert "stopped by a signal at step" in job.text()
    two.finish("told")
    count("signals to one of two processes")


def two_ctrl_c(words, log, env):
    """The command, with Ctrl-C twice while the checkpoint of step 2 is being written."""

    def pressed(point, step=None):
        if (point, step) == ("checkpoint.written", 2):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    checkpoint.fault = pressed
    command(words, log, env)


def test_a_second_ctrl_c_ends_a_run_at_once_and_the_last_checkpoint_stands(one):
    job = one.job("twice", target=two_ctrl_c)
    assert job.wait() == [128 + signal.SIGINT], job.text()
    assert "SIGINT: saving at the next step boundary" in job.text() and "Traceback" not in job.text()
    assert checkpoint.newest(one.root / "twice/run/checkpoints").name == "step-000000001"
    one.finish("twice")


def other_on_rank_1(other, words, log, env):
    """The command, with another word in the second process."""
    if env["RANK"] == "1":
        words = [word for word in words if word.partition("=")[0] != other.partition("=")[0]] + [other]
    command(words, log, env)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["data.train", "seed"])
def test_processes_that_would_train_differently_do_not_begin(tmp_path, key):
    shards = [runs.shard(tmp_path / f"{name}.tar", n) for name, n in (("a", 40), ("b", 48))]
    other = f"data.train={shards[1]}" if key == "data.train" else "seed=5"
    target = functools.partial(other_on_rank_1, other)
    # Or a process that comes late would be refused alone.
    words = words_for(tmp_path, shards[0], 4, 2, "allow_change=true")
    job = Job(words, tmp_path / "log", ranks=2, target=target)
    assert job.wait(120) == [2, 2], job.text()
    said = {
        "data.train": "a.tar (40 samples), process 1 on shards",
        "seed": "seed is 0 in process 0 and 5 in process 1: start all",
    }
    assert job.text().count(said[key]) == 2 and "Traceback" not in job.text(), job.text()


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
    case, draw = training(tmp_path, steps=40), random.Random(6)
    words = case.words(tmp_path / "script")[1:]
    for _ in range(3):
        with (tmp_path / "script.log").open("a") as log:
            process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=log, stderr=log,
                                       env=os.environ | ONE_THREAD, start_new_session=True)  # fmt: skip
        rows = runs._lines(tmp_path / "script" / "run" / "metrics.csv")
        reached = int(rows[-1].split(",")[0]) if rows else 0
        assert reached < 30, "the run is quicker than its kills"
        runs.wait_for_step(tmp_path / "script" / "run", process, reached + draw.randint(1, 6))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    case.finish("script")
    case.what = "the script that a user starts"
    case.count("at random moments", 3)
