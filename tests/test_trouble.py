"""Runs that meet trouble: bad samples, a full disk, a loss that is not finite. Counted, saved, said in a sentence."""

import errno
import functools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import runs
from selfsight import cli
from selfsight.config import ConfigError
from selfsight.data.manifest import Shards
from selfsight.data.rng import key_of
from selfsight.objectives.mae import MAE
from selfsight.training import checkpoint
from selfsight.training.log import Metrics, read_metrics
from selfsight.training.loop import AfterStep, RunStopped, listed
from selfsight.training.trouble import Trouble, brief, loader_is_gone

PINNED = "Pin memory thread exited unexpectedly"


def test_bad_samples_of_a_stream_are_counted_and_listed(tmp_path):
    pattern = runs.shard(tmp_path / "a.tar", 18, bad=(3, 9))
    words = ("data=shards", "data.mode=stream", f"data.train={pattern}", "max_steps=2", "knn.every_n_steps=0")
    summary = runs.run_here(tmp_path / "r", *words, without=runs.SCENES)
    assert summary["bad_samples"] == 2
    assert sorted(entry["where"][-5:] for entry in runs.skipped(tmp_path / "r")) == ["s0003", "s0009"]


def test_a_bad_sample_is_listed_once_although_a_continued_run_meets_it_again(tmp_path):
    pattern = runs.shard(tmp_path / "a.tar", 8, bad=(3,))
    for steps in (1, 2):  # each step is an epoch
        words = ("data=shards", f"data.train={pattern}", f"max_steps={steps}", "allow_change=true")
        summary = runs.run_here(tmp_path / "r", *words, without=runs.SCENES)
    assert [entry["id"] for entry in runs.skipped(tmp_path / "r")] == [3]
    assert summary["bad_samples"] == 1 and read_metrics(tmp_path / "r" / "metrics.csv")[-1]["bad_samples"] == "1"


@pytest.mark.parametrize("mode", ["exact", "stream"])
def test_an_evaluation_set_that_cannot_be_used_is_said_and_the_run_goes_on(tmp_path, capsys, mode):
    train, val = runs.shard(tmp_path / "a.tar", 16), runs.shard(tmp_path / "b.tar", 8, bad=range(8))
    words = ("data=shards", f"data.mode={mode}", f"data.train={train}", f"data.val={val}")
    summary = runs.run_here(tmp_path / "r", *words, "max_steps=1", "knn.every_n_steps=1", without=runs.SCENES)
    said = {"exact": "no k-NN: 8 have no label or cannot be read", "stream": "no (none of 8 images of"}[mode]
    assert said in capsys.readouterr().out
    assert summary["loss_last"] is not None and summary["knn"] is None
    assert (summary["rankme"] is None) == (mode == "stream")


def test_a_run_beyond_the_length_that_is_asked_for_is_refused(tmp_path):
    words = ("knn.every_n_steps=0", "allow_change=true")
    runs.run_here(tmp_path / "r", "max_steps=2", *words)
    with pytest.raises(ConfigError, match="already at step 2, beyond the 1 that are asked for: give a longer duration"):
        runs.run_here(tmp_path / "r", "max_steps=1", *words)


def test_a_full_disk_ends_a_run_in_one_sentence_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    words = [*runs.TINY, f"run_dir={tmp_path / 'r'}", "knn.every_n_steps=0", "allow_change=true"]
    runs.run_here(tmp_path / "r", "max_steps=1", *words[-2:])

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert runs.with_handlers_put_back(lambda: cli.main("train", [*words, "max_steps=2"])) == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: the checkpoint of step 2 cannot be written") and said.count("\n") == 1
    assert "No space left" in said and "earlier ones stand" in said
    kept = checkpoint.newest(tmp_path / "r" / "checkpoints")
    assert kept.name == "step-000000001" and checkpoint.verify(kept) is None


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, monkeypatch, capsys):
    save, calls = checkpoint.save_file, []

    def full_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*args)

    monkeypatch.setattr(checkpoint, "save_file", full_at_first)
    runs.run_here(tmp_path / "r", "max_steps=3", "knn.every_n_steps=0", "checkpoint.every_n_steps=1")
    assert "checkpoint at step 1 FAILED" in capsys.readouterr().out
    assert sorted(p.name[-1] for p in (tmp_path / "r" / "checkpoints").glob("step-*")) == ["2", "3"]


@pytest.fixture
def full_disk(monkeypatch):
    """Files (by name) that take no more than half of the next write until the number of refusals is used up."""
    refusals, real = {}, Path.open

    def open_(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if refusals.get(path.name) and mode[0] in "aw":
            refusals[path.name] -= 1
            write = file.write

            def half(text):
                write(text[: len(text) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

            return Half(file, half)
        return file

    monkeypatch.setattr(Path, "open", open_)
    return refusals


class Half:
    """A file whose write fails half-way."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize(("file", "times"), [("metrics.tmp", 2), ("metrics.csv", 1)])
def test_a_full_disk_costs_no_row_and_does_not_end_a_run(tmp_path, full_disk, capsys, file, times):
    full_disk[file] = times
    runs.run_here(tmp_path / "r", "max_steps=4", "knn.every_n_steps=0", "checkpoint.every_n_steps=9")
    said = capsys.readouterr().out
    assert said.count("metrics.csv cannot be written (No space left on device): the run goes on") == 1
    assert said.count("metrics.csv is written again, with all lines that waited") == 1
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert [row["step"] for row in rows] == list("1234") and all(len(row["loss"]) > 3 for row in rows)


def test_a_row_that_waits_is_written_before_the_checkpoint(tmp_path, full_disk):
    full_disk["metrics.csv"] = 1
    words = ("max_steps=2", "log_every_n_steps=2", "knn.every_n_steps=0")
    runs.run_here(tmp_path / "r", *words, without=("log_every_n_steps",))
    (row,) = read_metrics(tmp_path / "r" / "metrics.csv")
    assert row["step"] == "2" and row["images_per_second"]


def test_what_torch_says_of_a_peer_is_not_cut_within_a_sentence():
    said = "Read error [127.0.0.1]:25502: Connection reset by peer"
    whole = f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] {said}. This may indicate a crash on rank 0."
    assert brief(RuntimeError(whole)) == said
    assert brief(RuntimeError("NCCL error,\n" + "word " * 50)).endswith("word …")


def test_numbers_that_a_full_disk_does_not_take_are_added_later(tmp_path, full_disk, capsys):
    metrics = Metrics(tmp_path / "metrics.csv", 0)
    metrics.add({"step": 1, "loss": 0.5})
    full_disk["metrics.tmp"] = 1
    metrics.amend({"knn": 25.0})
    assert "knn" not in read_metrics(tmp_path / "metrics.csv")[0]
    assert "the run goes on, keeps its lines" in capsys.readouterr().out
    metrics.retry()
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert (row["loss"], row["knn"]) == ("0.5", "25")


def test_a_full_disk_loses_no_bad_sample(tmp_path, full_disk, capsys):
    pattern = runs.shard(tmp_path / "a.tar", 24, bad=(3, 9, 17))
    full_disk["skipped.jsonl"] = 2
    words = ("data=shards", f"data.train={pattern}", "max_steps=3", "knn.every_n_steps=0")
    runs.run_here(tmp_path / "r", *words, without=runs.SCENES)
    said = capsys.readouterr().out
    assert said.count("skipped.jsonl cannot be written") == 1 and said.count("skipped.jsonl is written again") == 1
    assert listed(tmp_path / "r" / "skipped.jsonl") == {3, 9, 17}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_saves_the_batch_that_it_came_from(tmp_path, monkeypatch, accumulation):
    poison = int(key_of(0, torch.tensor([2 * 8 + 1]))[0])  # position 1 of step 2: the first of two micro-batches
    loss = MAE.loss

    @functools.wraps(loss)
    def spoiled(self, batch, step):
        value, logs = loss(self, batch, step)
        return value + torch.where((batch["key"] == poison).any(), torch.nan, 0.0), logs

    monkeypatch.setattr(MAE, "loss", spoiled)
    words = ("max_steps=5", "knn.every_n_steps=0", "checkpoint.every_n_steps=1")
    with pytest.raises(RunStopped, match=r"the loss is not finite at step 2; `selfsight replay batch=") as stopped:
        runs.run_here(tmp_path / "r", *words, f"trainer.max_batch_per_device={8 // accumulation}")
    assert stopped.value.code == 4
    saved = load_file(tmp_path / "r" / "nonfinite-step-000000002-rank-0.safetensors")
    assert saved["position"].tolist() == list(range(16, 16 + 8 // accumulation))
    assert poison in saved["key"].tolist() and saved["crops.image"].shape[1] == 8 // accumulation
    newest = checkpoint.newest(tmp_path / "r" / "checkpoints")
    assert newest.name == "step-000000002"
    kept = load_file(tmp_path / "r" / "nonfinite-step-000000002.safetensors")
    runs.assert_identical(kept, checkpoint.load(newest)[0])  # nothing of the step reached the weights


@pytest.fixture
def burst(monkeypatch):
    """A gradient that is not finite at step 2; what the objective was before it."""
    loss, before = MAE.loss, {}

    @functools.wraps(loss)
    def spoiled(self, batch, step):
        value, logs = loss(self, batch, step)
        if step == 2 and not before:
            before.update({k: v.clone() for k, v in checkpoint.unique_state(self).items()})
        return runs.Burst.apply(value) if step == 2 else value, logs

    monkeypatch.setattr(MAE, "loss", spoiled)
    return before


@pytest.mark.parametrize("clip", ["0", "1.0"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, burst, clip):
    words = ("max_steps=5", "knn.every_n_steps=0", "checkpoint.every_n_steps=1", f"optim.clip={clip}")
    with pytest.raises(
        RunStopped, match=r"a gradient is not finite at step 2; `selfsight replay batch=\S+` repeats it"
    ):
        runs.run_here(tmp_path / "r", *words)
    newest = checkpoint.newest(tmp_path / "r" / "checkpoints")
    assert newest.name == "step-000000002"
    kept = load_file(tmp_path / "r" / "nonfinite-step-000000002.safetensors")
    runs.assert_identical(kept, checkpoint.load(newest)[0])


@pytest.mark.parametrize("late", [False, True])
def test_of_a_gradient_every_part_is_kept(tmp_path, monkeypatch, burst, late):
    start = AfterStep.on_train_start

    def as_on_a_gpu(self, *args):  # where the host learns of it one step later
        start(self, *args)
        self.late = late

    monkeypatch.setattr(AfterStep, "on_train_start", as_on_a_gpu)
    words = ("max_steps=5", "knn.every_n_steps=0", "checkpoint.every_n_steps=100", "trainer.max_batch_per_device=4")
    with pytest.raises(RunStopped, match=r"a gradient is not finite at step 2; .*or that of another part") as stopped:
        runs.run_here(tmp_path / "r", *words)
    runs.assert_identical(load_file(tmp_path / "r" / "nonfinite-step-000000002.safetensors"), burst)
    named = [f"nonfinite-step-000000002-rank-0-part-{i}.safetensors" for i in (0, 1)]
    parts = [load_file(tmp_path / "r" / name) for name in named]
    assert [part["position"].tolist() for part in parts] == [list(range(16, 20)), list(range(20, 24))]
    assert cli.main(None, str(stopped.value).split("`")[1].split()[1:]) == 1


def test_a_step_that_cannot_be_kept_is_said_all_the_same(tmp_path, monkeypatch, burst):
    def full(tensors, path, *args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    words = ("max_steps=5", "knn.every_n_steps=0", "checkpoint.every_n_steps=100")
    with pytest.raises(
        RunStopped, match=r"not finite at step 2; it cannot be kept for `selfsight replay` \(.*No space"
    ):
        runs.run_here(tmp_path / "r", *words)


def test_a_step_that_was_not_finite_is_repeated(tmp_path, capsys):
    words = ("knn.every_n_steps=0", "objective=dino", "views.local.n=1", "objective.num_prototypes=16",
             "objective.centering=center", "optim.lr=1e30", "optim.warmup=0", "optim.clip=0")  # fmt: skip
    with pytest.raises(RunStopped) as stopped:
        runs.run_here(tmp_path / "r", "max_steps=9", *words)
    command = str(stopped.value).split("`")[1].split()
    capsys.readouterr()
    assert cli.main(None, command[1:]) == 1
    said = capsys.readouterr().out
    assert "it happens again, loss nan" in said and "the first output that is not finite is that of" in said
    weights = next((tmp_path / "r").glob("nonfinite-step-?????????.safetensors"))
    state = load_file(weights)
    state["teacher.backbone.timm.patch_embed.proj.weight"][0] = torch.nan  # the first layer of a step
    save_file(state, weights)
    assert cli.main(None, command[1:]) == 1
    said = capsys.readouterr().out
    assert "the first output that is not finite is that of teacher.backbone.timm.patch_embed.proj\n" in said
    assert cli.main(None, ["replay", "batch=runs/x/other.safetensors"]) == 2
    assert "other.safetensors is not a saved step" in capsys.readouterr().err


def test_a_loader_process_that_the_system_ends_is_one_sentence_about_memory(tmp_path, monkeypatch, capsys):
    read, here = Shards.read, os.getpid()

    def out_of_memory(self, id):
        if os.getpid() != here and torch.utils.data.get_worker_info().id == 1 and (tmp_path / "now").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, id)

    monkeypatch.setattr(Shards, "read", out_of_memory)
    words = [*runs.TINY, f"run_dir={tmp_path / 'r'}", "knn.every_n_steps=0", "num_workers=2", "max_steps=40"]
    words = [word for word in words if word != "num_workers=0"]
    monkeypatch.setattr(checkpoint, "prune", lambda *_: (tmp_path / "now").touch())
    assert runs.with_handlers_put_back(lambda: cli.main("train", [*words, "checkpoint.every_n_steps=2"])) == 6
    said = capsys.readouterr().err
    assert said.startswith("stopped: a loader process was ended by the system (Killed, as it does when memory runs out")
    assert "use fewer than num_workers=2" in said and said.count("\n") == 1
    assert checkpoint.newest(tmp_path / "r" / "checkpoints") is not None


@pytest.mark.parametrize("ended", ["DataLoader worker (pid(s) 7) exited unexpectedly", PINNED])
def test_what_torch_raises_from_its_signal_handler_waits_until_a_batch_is_missing(ended):
    own, trainer, went_on = signal.getsignal(signal.SIGCHLD), SimpleNamespace(world_size=1), []

    def torchs(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    signal.signal(signal.SIGCHLD, torchs)
    try:
        trouble = Trouble(None, lambda: "A checkpoint stands")
        said = r"\(Killed, as it does when memory runs out\).*num_workers=3.*A checkpoint"
        with pytest.raises(RunStopped, match=said), trouble.told(trainer, 1, 3):
            for _ in range(2):
                trouble.on_train_batch_start()
                os.kill(os.getpid(), signal.SIGCHLD)  # where a checkpoint is written, say
                went_on.append(True)
            raise RuntimeError(ended)
        assert went_on == [True, True] and signal.getsignal(signal.SIGCHLD) is torchs
    finally:
        signal.signal(signal.SIGCHLD, own)


def test_an_error_of_another_handler_of_child_processes_is_not_kept_back():
    own = signal.getsignal(signal.SIGCHLD)

    def another(number, frame):
        raise RuntimeError("of another library")

    signal.signal(signal.SIGCHLD, another)
    try:
        trouble = Trouble(None, str)
        trouble.on_train_batch_start()
        with pytest.raises(RuntimeError, match="of another library"):
            os.kill(os.getpid(), signal.SIGCHLD)
        ours = signal.getsignal(signal.SIGCHLD)
        signal.signal(signal.SIGCHLD, lambda *args: ours(*args))  # torch's, which calls the one before
        trouble.on_train_batch_start()
        with pytest.raises(RuntimeError, match="of another library"):
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, own)


def test_another_error_of_a_loader_is_not_taken_for_one_that_was_ended():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    later = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    later.__cause__ = killed
    assert loader_is_gone(killed) == loader_is_gone(later) == "Bus error"
    assert loader_is_gone(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")) is None
    assert loader_is_gone(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")) == "no reason is known"
    itself = "DataLoader worker (pid 7) exited unexpectedly with exit code 3. Details are lost"
    assert loader_is_gone(RuntimeError(itself)) == "exit code 3"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["removed", "changed"])
def test_a_shard_that_is_removed_or_changed_during_a_run(how, workers, tmp_path, monkeypatch, capsys):
    shard = Path(runs.shard(tmp_path / "a.tar", 40))
    words = [word for word in runs.TINY if word.split("=")[0] not in (*runs.SCENES, "num_workers")]
    words += ["data=shards", f"data.train={shard}", "knn.every_n_steps=0", f"num_workers={workers}", "max_steps=30",
              "checkpoint.every_n_steps=2", f"run_dir={tmp_path / 'r'}"]  # fmt: skip

    def meddle(*_):
        if how == "removed":
            shard.unlink(missing_ok=True)
        else:
            os.utime(shard)

    monkeypatch.setattr(checkpoint, "prune", meddle)
    code = runs.with_handlers_put_back(lambda: cli.main("train", words))
    said = capsys.readouterr().err
    if how == "removed":  # what a process has opened stays readable
        assert (code, said) == (0, "")
        return
    assert code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {shard} was changed while it was in use: stop, leave the shards alone")
    assert 2 <= checkpoint.load(checkpoint.newest(tmp_path / "r" / "checkpoints"))[1]["step"] < 30


def test_a_run_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    mkdir = Path.mkdir

    def read_only(path, *args, **kwargs):
        if path == tmp_path / "r":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    words = [*runs.TINY, f"run_dir={tmp_path / 'r'}", "knn.every_n_steps=0", "max_steps=1"]
    assert runs.with_handlers_put_back(lambda: cli.main("train", words)) == 2
    said = capsys.readouterr().err
    assert f"error: run_dir={tmp_path / 'r'} cannot be written (Read-only file system): give one" in said
    assert said.count("\n") == 1
