"""On a real Slurm cluster of two nodes (see slurm_cluster): a training is preempted, reaches its time limit, is put
back into the queue both times, and ends with the bits of one that was left alone; scancel; a process that stops; an
array of probes; the batch files by hand.

Run with -m slurm; about five minutes on two free cores.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

import runs
from kill_driver import count
from selfsight.training import checkpoint
from slurm_cluster import Cluster, missing

pytestmark = pytest.mark.slurm
STEPS, EPOCH, BATCH = 60, 25, 8
TRAIN = (
    "objective=mae", "backbone=vit_nano", "image_size=32", f"batch_size={BATCH}", f"data.num_train={EPOCH * BATCH}",
    "data.num_val=40", f"max_steps={STEPS}", "trainer.accelerator=cpu", "num_workers=1", "log_every_n_steps=1",
    "knn.every_n_steps=0", "checkpoint.every_n_minutes=0", "logger=wandb", "logger.mode=offline",
)  # fmt: skip
# Both nodes are this machine, and their names are known to Slurm alone.
NET = "launcher.setup=['export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo']"
JOB = ("launcher=slurm", "launcher.cpus_per_task=1", "launcher.minutes=60", NET)
SECONDS = 400  # for anything; much longer than it takes on cores that others use, too


@pytest.fixture(scope="module")
def cluster():
    if sys.platform != "linux":
        pytest.skip("the cluster is for Linux")
    if absent := missing():
        pytest.skip(f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="selfsight-slurm-"))
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def command(cluster, *words, script="train.py"):
    """Run a command with the cluster's environment; it is not within a job."""
    env = {k: v for k, v in cluster.env.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    if "PYTHONDONTWRITEBYTECODE" in os.environ:  # or every one of a dozen processes compiles its imports again
        env["PYTHONPYCACHEPREFIX"] = str(cluster.folder / "pycache")
    argv = [sys.executable, script, *words]
    return subprocess.run(argv, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)


def submit(cluster, *words, script="train.py") -> str:
    """Submit by launcher=slurm; returns the number of the job."""
    done = command(cluster, *words, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("submitted job "), done.stdout
    return done.stdout.split()[2].rstrip(":")


def until(true, what: str, said) -> None:
    """Wait; the logs are part of a failure."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, f"{what} has not come in {SECONDS} s:\n{said()}"
        time.sleep(0.1)


class Training:
    """A training on two nodes that was submitted, and what may be done to it."""

    def __init__(self, cluster, run_dir: Path, *words: str):
        self.cluster, self.dir = cluster, run_dir
        self.number = submit(cluster, *TRAIN, *JOB, "launcher.nodes=2", f"run_dir={run_dir}", *words)

    def log(self) -> str:
        with suppress(OSError):
            return (self.dir / "slurm" / f"{self.number}.log").read_text()
        return ""

    def state(self, *states: str) -> None:
        """Wait for one of these states."""
        until(lambda: self.job()["JobState"] in states, f"{states}", lambda: f"{self.job()}\n{self.log()[-3000:]}")

    def job(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def requeued(self, times: int) -> None:
        """Wait until it has been put back so many times."""

        def there() -> bool:
            job = self.job()
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), f"{job}\n{self.log()[-3000:]}"
            return job["Restarts"] == str(times)

        until(there, f"requeue {times}", self.log)

    def reach(self, step: int) -> None:
        """Wait for a step, and hold all processes there until a signal or `go_on`."""

        def there() -> bool:
            rows = runs._lines(self.dir / "metrics.csv")
            assert self.job()["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), self.log()[-3000:]
            return bool(rows) and rows[-1].split(",")[0].isdigit() and int(rows[-1].split(",")[0]) >= step

        until(there, f"step {step}", self.log)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def processes(self) -> list[int]:
        """Those that train, and their loaders' workers."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"selfsight" in words and f"run_dir={self.dir}".encode() in words and b"srun" not in words[0]:
                    found.append(int(entry.name))
        return found

    def has_pending(self, number: int) -> bool:
        """Whether a process that is held has been sent this signal."""
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16) >> (number - 1) & 1:
                        return True
        return False

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        found = checkpoint.newest(self.dir / "checkpoints")
        return int(found.name.split("-")[1]) if found else 0


@pytest.fixture(scope="module")
def whole(cluster):
    """A training that is left alone."""
    training = Training(cluster, cluster.folder / "runs" / "whole")
    training.state("COMPLETED", "FAILED")
    return training


@pytest.fixture(scope="module")
def interrupted(cluster, whole):
    """The same, preempted in its first epoch and at its time limit in the second; steps at which it was saved."""
    training = Training(cluster, cluster.folder / "runs" / "two words", "launcher.signal_seconds=60")
    training.stops = []
    training.reach(6)
    other = ("--nodes=2", "--exclusive", "--time=5", "--output=/dev/null", "--wrap=sleep 1")
    cluster.run("sbatch", "--parsable", "--partition=high", *other)
    training.requeued(1)
    training.stops.append(training.saved())
    training.reach(EPOCH + 6)
    # Slurm warns this job when less than 60 s (and up to a minute more) of the limit are left, which is now.
    cluster.run("scontrol", "update", f"JobId={training.number}", "TimeLimit=2")
    # It may let them go on by itself, with SIGCONT.
    warned = lambda: training.has_pending(signal.SIGUSR1) or "SIGUSR1: saving" in training.log()  # noqa: E731
    until(warned, "SIGUSR1", training.log)
    training.signal(signal.SIGCONT)
    training.requeued(2)
    training.stops.append(training.saved())
    cluster.run("scontrol", "update", f"JobId={training.number}", "TimeLimit=60")
    training.state("COMPLETED", "FAILED")
    return training


def test_a_training_runs_on_two_nodes(whole):
    assert whole.job()["JobState"] == "COMPLETED", whole.log()[-3000:]
    summary = json.loads((whole.dir / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["steps"] == STEPS
    assert "over 2 processes" in whole.log()
    assert whole.job()["NodeList"] == "n[1-2]" and whole.job()["Restarts"] == "0"


def test_it_is_preempted_and_timed_out_in_the_middle_of_epochs(interrupted):
    first, second = interrupted.stops
    assert 0 < first < EPOCH < second < 2 * EPOCH, interrupted.log()[-3000:]
    log = interrupted.log()
    assert "SIGTERM: saving at the next step boundary" in log and "SIGUSR1: saving at the next step boundary" in log
    assert log.count("goes back into the queue") == 2
    for step in interrupted.stops:
        assert f"stopped by a signal at step {step}" in log
        assert f"resuming    at step {step} from" in log
    assert "Traceback" not in log


def test_it_ends_with_the_bits_of_one_that_was_left_alone(whole, interrupted):
    assert interrupted.job()["JobState"] == "COMPLETED" and interrupted.job()["Restarts"] == "2"
    assert interrupted.saved() == STEPS
    runs.assert_identical(runs.final_state(whole.dir), runs.final_state(interrupted.dir))
    steps = [int(row.split(",")[0]) for row in runs._lines(interrupted.dir / "metrics.csv")]
    assert steps == list(range(1, STEPS + 1))
    count("requeues by Slurm", 2)
    count("processes compared", 2)


def test_it_stays_one_folder_and_one_run_of_wandb(interrupted):
    assert [p.name for p in interrupted.dir.parent.iterdir() if "two" in p.name] == [interrupted.dir.name]
    id = (interrupted.dir / "wandb_id").read_text()
    sessions = list((interrupted.dir / "wandb").glob("offline-run-*"))
    assert len(sessions) >= 3 and all(path.name.endswith(f"-{id}") for path in sessions)


def test_scancel_saves_and_ends_it(cluster, whole):
    training = Training(cluster, cluster.folder / "runs" / "cancelled", "launcher.nodes=1")
    training.reach(5)
    done = command(cluster, *TRAIN, *JOB, f"run_dir={training.dir}")
    assert done.returncode == 2 and f"job {training.number} in Slurm's queue is for {training.dir}" in done.stderr
    cluster.run("scancel", training.number)
    until(lambda: not cluster.run("squeue", "-h", f"--jobs={training.number}", check=False), "its end", training.log)
    job = training.job()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert 5 <= training.saved() < STEPS, training.log()[-3000:]
    assert "not requeued by itself" in training.log(), training.log()[-3000:]


def test_a_process_that_stops_does_not_hold_the_job_until_its_time_is_over(cluster):
    training = Training(cluster, cluster.folder / "runs" / "hangs", "trainer.hang_minutes=0.3")
    training.reach(3)
    for pid in training.processes():
        if b"SLURM_PROCID=1" not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGCONT)
    training.state("FAILED", "COMPLETED", "PENDING")
    job, log = training.job(), training.log()
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "137:0"), log[-3000:]
    assert "hang: rank 1 has not been heard of" in log and "goes back into the queue" not in log
    assert not training.processes()


def test_an_array_of_probes(cluster, whole):
    words = ("-m", f"checkpoint={whole.dir}", "probe=knn,linear", "device=cpu", "probe.bank=40", *JOB)
    number = submit(cluster, *words, script="probe.py")
    logs = whole.dir / "probes" / "slurm"
    said = lambda: "\n".join(p.read_text() for p in logs.glob("*.log"))  # noqa: E731
    until(lambda: not cluster.run("squeue", "-h", f"--jobs={number}", check=False), "the end of the array", said)
    found = {name: json.loads((whole.dir / "probes" / f"{name}.json").read_text()) for name in ("knn", "linear")}
    assert all(0 <= result["top1"] <= 100 for result in found.values())
    assert {p.name for p in logs.glob("*.log")} == {f"{number}_0.log", f"{number}_1.log"}


def test_an_unknown_partition_is_slurms_own_sentence(cluster):
    done = command(cluster, *TRAIN, *JOB, "launcher.partition=nowhere", f"run_dir={cluster.folder / 'runs' / 'no'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Slurm does not take the job (launcher.partition=nowhere): " in done.stderr
    assert "nvalid partition" in done.stderr


# --- the batch files by hand, with something in place of Python that ends as it is told ----------------------------

STAND_IN = """#!/bin/bash
echo "<$*> by $SLURM_PROCID with ${SLURM_GPUS_ON_NODE:-no} GPUs at $MASTER_ADDR, start ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" -lt "${STOPS:-0}" ] && [ "${SLURM_ARRAY_TASK_ID:-1}" = 1 ]; then
  trap 'exit 143' TERM
  [ -z "${WAITS:-}" ] || { echo waiting; for _ in {1..600}; do sleep 0.1; done; }
  exit 138
fi
"""


class ByHand:
    """A job that was submitted by hand from the checkout; log: of all its starts."""

    def __init__(self, cluster, file: str, *words: str, options: tuple[str, ...] = (), **env: str):
        self.cluster, stand_in = cluster, cluster.folder / "stand-in"
        if not stand_in.exists():
            stand_in.write_text(STAND_IN)
            stand_in.chmod(0o755)
        own = ("--parsable", "--cpus-per-task=1", f"--output={cluster.folder}/hand-%j.log")
        argv = ("sbatch", *own, *options, f"slurm/{file}", *words)
        self.number = cluster.run(*argv, cwd=runs.ROOT, SELFSIGHT_PYTHON=str(stand_in), **env)

    def ends(self, task: str = "") -> tuple[str, str]:
        """Wait for the end of the job, or of one task; (state, restarts)."""
        number = self.number + task
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.cluster.job(number)["JobState"] in over, f"the end of {number}", self.log)
        job = self.cluster.job(number)
        return job["JobState"], job["Restarts"]

    def log(self, task: str = "") -> str:
        """Each task of an array has a number of its own, too."""
        number = self.cluster.job(self.number + task)["JobId"] if task else self.number
        with suppress(OSError):
            return (self.cluster.folder / f"hand-{number}.log").read_text()
        return ""


def test_by_hand_every_gpu_of_every_node_has_a_process(cluster):
    sizes = ("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2")
    job = ByHand(cluster, "train.sbatch", "a=b c", options=sizes)
    assert job.ends() == ("COMPLETED", "0"), job.log()
    words = "-P -m selfsight train trainer.accelerator=gpu a=b c trainer.devices=2 trainer.num_nodes=2"
    assert sorted(job.log().splitlines()) == [f"<{words}> by {i} with 2 GPUs at n1, start 0" for i in range(4)]


def test_by_hand_every_node_without_gpus_has_a_process(cluster):
    job = ByHand(cluster, "train_cpu.sbatch", "a=b c", options=("--nodes=2",))
    assert job.ends() == ("COMPLETED", "0"), job.log()
    words = "-P -m selfsight train trainer.accelerator=cpu a=b c trainer.devices=1 trainer.num_nodes=2"
    assert sorted(job.log().splitlines()) == [f"<{words}> by {i} with no GPUs at n1, start 0" for i in range(2)]


def test_one_task_of_an_array_goes_back_into_the_queue(cluster):
    lines = cluster.folder / "probes.txt"
    lines.write_text("checkpoint=a probe=knn\ncheckpoint=a probe=linear\n")
    job = ByHand(cluster, "probe.sbatch", f"@{lines}", options=("--array=0-1", "--gpus-per-node=0"), STOPS="1")
    assert (job.ends("_0"), job.ends("_1")) == (("COMPLETED", "0"), ("COMPLETED", "1")), job.log("_1")
    assert "probe checkpoint=a probe=knn> by 0" in job.log("_0")
    assert job.log("_1").count("probe checkpoint=a probe=linear> by 0") == 2
    assert f"job {job.number}_1 goes back into the queue" in job.log("_1")


@pytest.mark.parametrize("most", [0, 1])
def test_a_job_is_put_back_so_many_times_and_then_left(cluster, most):
    job = ByHand(cluster, "train_cpu.sbatch", "a=b", STOPS="9", SELFSIGHT_MAX_REQUEUES=str(most))
    assert job.ends() == ("FAILED", str(most)), job.log()
    assert cluster.job(job.number)["ExitCode"] == "138:0"
    assert f"job {job.number} has been requeued {most} times: left here" in job.log()


def test_a_job_that_slurm_puts_back_is_not_put_back_twice(cluster):
    job = ByHand(cluster, "train_cpu.sbatch", "a=b", STOPS="1", WAITS="1")
    until(lambda: "waiting" in job.log(), "its start", job.log)
    cluster.run("scontrol", "requeue", job.number)
    assert job.ends() == ("COMPLETED", "1"), job.log()
    assert "not requeued by itself" in job.log() and "goes back" not in job.log()
