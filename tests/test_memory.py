"""A device whose memory is not enough: what is said, that nothing of it would be refused, and what shards spare it."""

import re

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import runs
from selfsight import config
from selfsight.objectives import build_objective
from selfsight.training import run
from selfsight.training.judge import Judge
from selfsight.training.lightning import precision_of, strategy_of
from selfsight.training.loop import RunStopped
from selfsight.training.module import Module
from selfsight.training.run import Run
from selfsight.training.sharded import Whole
from selfsight.training.stop import StopFlag
from selfsight.training.trouble import too_large

NO_LOOKS = ("knn.every_n_steps=0", "pictures.every_n_steps=0")


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def stopped(*words, folder):
    with pytest.raises(RunStopped) as found:
        runs.run_here(folder, *words)
    assert found.value.code == 6
    return str(found.value)


def test_a_step_that_does_not_fit_says_what_to_lower_and_that_nothing_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Module, "training_step", full)
    said = stopped("max_steps=2", NO_LOOKS[0], folder=tmp_path / "r")
    assert said.startswith("8 images at once do not fit into the memory of cpu: use trainer.max_batch_per_device=4 or ")
    assert said.endswith(". No checkpoint has been written yet: the same command begins again")


def test_a_later_step_that_does_not_fit_names_the_checkpoint_that_stands(tmp_path, monkeypatch):
    own = Module.training_step
    monkeypatch.setattr(Module, "training_step", lambda self, *a: own(self, *a) if self.step < 2 else full())
    said = stopped("max_steps=3", NO_LOOKS[0], "checkpoint.every_n_steps=1", folder=tmp_path / "r")
    assert said.endswith(". The checkpoint of step 2 stands, and the same command continues from it")


def test_judging_that_does_not_fit_is_said_at_step_0_too(tmp_path, monkeypatch):
    monkeypatch.setattr("selfsight.training.judge.Online.evaluate", full)
    said = stopped("max_steps=2", "knn.every_n_steps=1", folder=tmp_path / "r")
    assert said.startswith("judging step 0 (knn) does not fit into the memory of cpu beside the training: use knn.")
    assert said.endswith(". No checkpoint has been written yet: the same command begins again")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("trainer.checkpointing=true", "trainer.precision=bf16-mixed"),
        ("backbone=timm", "backbone.name=resnet10t"),
        ("adapt=lora",),
        ("trainer.strategy=fsdp",),
        ("trainer.compile=true",),
        ("trainer.max_batch_per_device=1",),
    ],
)
def test_nothing_is_advised_that_would_be_refused(words):
    fixed = ("objective=dino", "backbone=vit_nano", "image_size=64", "batch_size=8", "trainer.accelerator=cpu")
    words = [*(word for word in fixed if word.split("=")[0] not in {w.split("=")[0] for w in words}), *words]
    cfg = config.load("train", words)
    micro = 4 // (cfg.trainer.max_batch_per_device or 4)
    advised = re.findall(r"[\w.]+=[\w-]+", too_large(cfg, 2, micro, torch.device("cpu")))
    assert advised
    for word in advised:
        key, _, value = word.partition("=")
        assert f"{key}={value}" not in words
        again = config.load("train", [w for w in words if w.partition("=")[0] != key] + [word])
        strategy_of(again, 2, precision_of(again.trainer.precision, False))
        if key in ("trainer.checkpointing", "adapt"):
            with torch.device("meta"):
                objective = build_objective(again, total_steps=1, steps_per_epoch=1)
            objective.checkpoint_blocks()


def test_advice_covers_what_helps():
    cfg = config.load("train", ["objective=dino", "backbone=vit_nano", "batch_size=8"])
    said = too_large(cfg, 2, 1, torch.device("cpu"))
    for word in ("max_batch_per_device=2", "precision=bf16-mixed", "checkpointing=true", "strategy=fsdp", "adapt=lora"):
        assert word in said
    assert "1 image at once does not fit" in too_large(cfg, 2, 4, torch.device("cpu"))


# --- a run that is sharded: the twin with whole weights ------------------------------------------------------------


@pytest.fixture
def sharded(monkeypatch):
    """A run of one process is taken for a sharded one: it has a twin, and is judged by it."""
    monkeypatch.setattr(run, "ModelParallelStrategy", SingleDeviceStrategy)


def test_a_sharded_run_is_exported_from_main_memory(tmp_path, monkeypatch, sharded):
    """Tensors on the meta device cannot be written, so nothing may have been sent to where the judge looks."""

    class Elsewhere(Judge):
        def __init__(self, cfg, module, device, **kwargs):
            super().__init__(cfg, module, torch.device("meta"), **kwargs)

    monkeypatch.setattr(run, "Judge", Elsewhere)
    runs.run_here(tmp_path / "r", "objective=dino", "max_steps=1", *NO_LOOKS)
    assert (tmp_path / "r" / "export" / "model.safetensors").exists()


def test_the_twin_leaves_its_device_before_the_first_step_and_after_each_look(tmp_path, monkeypatch, sharded):
    events = []
    for owner, name in ((Judge, "evaluate"), (Whole, "rest"), (Module, "training_step")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=own, **k: (events.append(n), f(*a, **k))[1])
    runs.run_here(tmp_path / "r", "max_steps=2", "knn.every_n_steps=1")
    looks = [i for i, event in enumerate(events) if event == "evaluate"]
    assert len(looks) == 3 and all(events[i + 1] == "rest" for i in looks), events


def test_only_the_backbone_of_a_twin_goes_to_the_device_for_k_nn(tmp_path):
    cfg = config.load("train", [*runs.TINY, "objective=dino", f"run_dir={tmp_path}", "max_steps=1"])
    made = runs.with_handlers_put_back(lambda: Run(cfg, StopFlag()))
    twin = made._module(build_objective(cfg, total_steps=1, steps_per_epoch=1))
    judge = Judge(cfg, twin, torch.device("meta"), train=None, val=None, batch_at=None, folder=tmp_path, measure=False)
    moved = {id(p) for p in judge.backbone().parameters()}
    assert moved and all(p.is_meta == (id(p) in moved) for p in twin.parameters())
