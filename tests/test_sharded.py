"""`trainer.strategy=fsdp`: two processes with shards end where two whole ones do, and one goes on from there."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import runs
from selfsight import config
from selfsight.backbones.watch import blocks_of
from selfsight.config import ConfigError
from selfsight.objectives import build_objective
from selfsight.training import sharded
from selfsight.training.lightning import make_trainer, strategy_of
from selfsight.training.log import read_metrics
from selfsight.training.stop import Agreement
from selfsight.training.teacher import local

WORDS = (
    "objective=dino", "max_steps=6", "knn.every_n_steps=3", "checkpoint.every_n_steps=2", "optim.clip=0.5",
    "objective.num_prototypes=64", "objective.head_hidden=32", "objective.head_bottleneck=16",
    "trainer.max_batch_per_device=2",
)  # fmt: skip
REFUSED = {
    "adapt=lora": "adapt=lora: student and teacher",
    "trainer.compile=true": "trainer.compile=true",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_go_together_is_refused_in_one_sentence(word):
    cfg = config.load("train", ["trainer.strategy=fsdp", "backbone=vit_nano", word])
    precision = cfg.trainer.precision if "precision" in word else "32-true"
    with pytest.raises(ConfigError, match=f"trainer.strategy=fsdp does not go together with {REFUSED[word]}.*; use"):
        strategy_of(cfg, 2, precision)


def test_a_generic_model_is_refused():
    cfg = config.load("train", ["trainer.strategy=fsdp", "objective=dino", "backbone=timm", "backbone.name=resnet18"])
    with pytest.raises(ConfigError, match="backbone=timm"):
        strategy_of(cfg, 2, "32-true")


def test_two_processes_share_the_weights():
    cfg = config.load("train", ["trainer.strategy=fsdp", "backbone=vit_nano"])
    assert isinstance(strategy_of(cfg, 2, "bf16-mixed"), ModelParallelStrategy)


def test_one_process_has_nothing_to_shard():
    cfg = config.load("train", ["trainer.strategy=fsdp", "trainer.devices=1", "trainer.accelerator=cpu"])
    assert strategy_of(cfg, 1, "32-true") == "auto"
    assert make_trainer(cfg, []).world_size == 1


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_only_the_watchdog_ends_a_wait(name):
    """torch would end processes that wait for half an hour for one that evaluates."""
    cfg = config.load("train", [f"trainer.strategy={name}"])
    assert strategy_of(cfg, 2, "32-true")._timeout.days > 30


def test_only_the_watchdog_ends_the_wait_for_one_that_evaluates(tmp_path, monkeypatch):
    """The group in which processes agree has a limit of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        group = Agreement().group
        assert group._get_backend(torch.device("cpu")).options._timeout.days > 30
    finally:
        dist.destroy_process_group()


class Copies(TorchDispatchMode):
    """Notes what is copied to bfloat16."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.made.append((tuple(out.shape), StorageWeakRef(out.untyped_storage())))
        return out

    def left(self, shapes):
        return sum(shape in shapes and not storage.expired() for shape, storage in self.made)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["vit_nano", pytest.param("convnext_nano_lite", marks=pytest.mark.slow)])
def test_half_precision_keeps_no_copies_of_blocks_and_computes_the_same(mesh, name):
    cfg = config.load("train", ["objective=dino", f"backbone={name}", "image_size=64", "views.local.n=0"])
    images, copies, gradients = torch.randn(2, 3, 64, 64), [], []
    for cut in (False, True):
        torch.manual_seed(0)
        objective = build_objective(cfg, total_steps=1, steps_per_epoch=1).train()
        backbone = objective.student["backbone"]
        objective.loss = lambda backbone=backbone: backbone(images).pooled.float().square().sum()
        blocks = list(blocks_of(backbone.timm).values())
        shapes = {tuple(p.shape) for block in blocks for p in block.parameters() if p.ndim > 1}
        if cut:
            sharded.shard(objective, mesh)
        with Copies() as noted, torch.autocast("cpu", torch.bfloat16):
            loss = objective.loss()
            copies.append(noted.left(shapes))
        loss.backward()
        gradients.append({n: local(p.grad) for n, p in backbone.named_parameters() if p.grad is not None})
    assert copies[0] > len(blocks) and copies[1] == 0
    runs.assert_identical(*gradients)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A run of two processes with DDP, and one of two with shards and recomputed blocks, whose processes note what
    they hold."""
    return pair(tmp_path_factory.mktemp("fsdp"), WORDS, "trainer.checkpointing=true")


def pair(root, words, *more):
    """The folder of two finished runs of two processes: `ddp`, and `fsdp` with more words."""
    started = {
        "ddp": runs.start(root / "ddp", *words, "trainer.devices=2"),
        "fsdp": runs.start(
            root / "fsdp", *words, "trainer.devices=2", "trainer.strategy=fsdp", *more, script="tests/noted_run.py"
        ),
    }
    for name, process in started.items():
        assert process.wait(900) == 0, (root / f"{name}.log").read_text()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_a_sharded_run_holds_about_half_and_computes_blocks_twice(both, rank):
    noted = json.loads((both / f"noted-{rank}.json").read_text())
    assert noted["strategy"] == "ModelParallelStrategy" and noted["sharded"]
    assert 0.4 < noted["local"] / noted["whole"] < 0.6
    assert noted["passes"] and set(noted["block_calls"].values()) == {2 * noted["passes"]}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The same in half precision, a few steps."""
    words = [word.replace("max_steps=6", "max_steps=4") for word in WORDS] + ["trainer.precision=bf16-mixed"]
    return pair(tmp_path_factory.mktemp("halves"), words)


@pytest.mark.slow
def test_shards_in_half_precision_end_where_whole_processes_do(halves):
    """The same roundings to eight bits; sums are in another order."""
    ddp, fsdp = (read_metrics(halves / name / "metrics.csv") for name in ("ddp", "fsdp"))
    losses = [[float(row["loss"]) for row in rows if row.get("loss")] for rows in (ddp, fsdp)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=2e-3)
    ddp, fsdp = (runs.final_state(halves / name) for name in ("ddp", "fsdp"))
    for key, whole in ddp.items():
        assert fsdp[key].dtype == whole.dtype, key
        assert (fsdp[key] - whole).double().norm() <= 0.01 * whole.double().norm(), key


@pytest.mark.slow
def test_shards_end_where_whole_processes_do(both):
    ddp, fsdp = (runs.final_state(both / name) for name in ("ddp", "fsdp"))
    assert {k: v.shape for k, v in ddp.items()} == {k: v.shape for k, v in fsdp.items()}
    for key in ddp:
        torch.testing.assert_close(fsdp[key], ddp[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
def test_a_sharded_run_is_judged_and_exported(both):
    ddp, fsdp = (read_metrics(both / name / "metrics.csv") for name in ("ddp", "fsdp"))
    assert [row["step"] for row in ddp if row.get("knn")] == ["0", "3", "6"]
    for row, other in zip(ddp, fsdp, strict=True):
        for key in ("step", "loss", "knn", "rankme"):
            assert bool(row.get(key)) == bool(other.get(key))  # at step 0 nothing has been trained
            if row.get(key):
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-3, abs=1e-3), key
    assert (both / "fsdp" / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_what_shards_left(both, processes):
    """On one process and on two with shards, as from the checkpoint of whole processes."""
    more = [word.replace("max_steps=6", "max_steps=8") for word in WORDS] + ["allow_change=true"]
    for name, strategy in (("ddp", "auto"), ("fsdp", "fsdp")):
        words, folder = [*more, f"trainer.strategy={strategy}"], both / f"{name}-on-{processes}"
        shutil.copytree(both / name, folder)
        if processes == 1:
            assert runs.run_here(folder, *words)["steps"] == 8
        else:
            process = runs.start(folder, *words, "trainer.devices=2")
            assert process.wait(900) == 0, folder.with_suffix(".log").read_text()
    ddp, fsdp = (runs.final_state(both / f"{name}-on-{processes}") for name in ("ddp", "fsdp"))
    for key in ddp:
        torch.testing.assert_close(fsdp[key], ddp[key], rtol=1e-4, atol=5e-5, msg=lambda m, k=key: f"{k}: {m}")
