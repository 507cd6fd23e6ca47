"""Two processes with half the batch each compute what one process computes: loss, gradient, and a whole run."""

import json
import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import runs
from selfsight import config
from selfsight.backbones import vit
from selfsight.config import ConfigError
from selfsight.data import open_source
from selfsight.data.loader import Positions, Samples
from selfsight.data.order import Order
from selfsight.objectives import build_objective
from selfsight.training.log import read_metrics
from selfsight.training.loop import same_start
from selfsight.views.photo import prepare

CENTRED = ("objective.centering=center", "objective.koleo=0")
CASES = {
    "mae vit_nano": ("objective=mae", "backbone=vit_nano", "image_size=32"),
    "mae convnextv2": ("objective=mae", "backbone=convnextv2_nano_lite", "image_size=64"),
    "mae convnext": ("objective=mae", "backbone=convnext_nano_lite", "image_size=64"),
    "mae shvit": ("objective=mae", "backbone=shvit_nano_lite", "image_size=128"),
    "dino vit": ("objective=dino", "backbone=vit_nano", "image_size=32", "backbone.drop_path=0.2", *CENTRED),
    "dino vit sinkhorn": (
        "objective=dino", "backbone=vit_nano", "image_size=32", "objective.centering=sinkhorn", "objective.koleo=0.1",
        "objective.head_batch_norm=true",
    ),
    "dino convnext": ("objective=dino", "backbone=convnext_nano_lite", "image_size=64"),
    "dino shvit": ("objective=dino", "backbone=shvit_nano_lite", "image_size=128", *CENTRED),
    "ibot vit": ("objective=ibot", "backbone=vit_nano", "image_size=32", *CENTRED),
    "ibot vit dinov2": (
        "objective=ibot", "backbone=vit_nano", "image_size=32", "objective.centering=sinkhorn", "objective.koleo=0.1",
        "objective.patch_head=separate",
    ),
    "ibot convnext": ("objective=ibot", "backbone=convnext_nano_lite", "image_size=64"),
    "ibot shvit": ("objective=ibot", "backbone=shvit_nano_lite", "image_size=128"),
    "selfpatch vit": ("objective=selfpatch", "backbone=vit_nano", "image_size=32", *CENTRED),
    "selfpatch shvit": ("objective=selfpatch", "backbone=shvit_nano_lite", "image_size=128"),
    "odis vit": ("objective=odis", "backbone=vit_nano", "image_size=32", "objective.no_mask=skip", *CENTRED),
    "odis convnext": ("objective=odis", "backbone=convnext_nano_lite", "image_size=64", "objective.no_mask=skip"),
    "odis shvit": ("objective=odis", "backbone=shvit_nano_lite", "image_size=128"),
    "ijepa vit": ("objective=ijepa", "backbone=vit_nano", "image_size=32"),
    "ijepa convnext": ("objective=ijepa", "backbone=convnext_nano_lite", "image_size=64"),
    "ijepa shvit": ("objective=ijepa", "backbone=shvit_nano_lite", "image_size=128"),
    "dmt_jepa vit": ("objective=dmt_jepa", "backbone=vit_nano", "image_size=32"),
    "dmt_jepa shvit": ("objective=dmt_jepa", "backbone=shvit_nano_lite", "image_size=128"),
    "cim vit": (
        "objective=cim", "backbone=vit_nano", "image_size=32", "objective.sigma_cont=0.5", "objective.exemplars=2",
        "objective.projector_hidden=16", "objective.projector_dim=8",
    ),
    **{
        f"dino vit {kind}": ("objective=dino", "backbone=vit_nano", "image_size=32", f"adapt={kind}")
        for kind in ("uniadapter", "adaptformer", "lora", "apla", "bitfit")
    },
    "dino shvit lora": ("objective=dino", "backbone=shvit_nano_lite", "image_size=64", "adapt=lora"),
    "glare vit": (
        "objective=glare", "backbone=vit_nano", "image_size=32", "adapt=uniadapter", "views.local.n=1", *CENTRED,
    ),
    "glare vit sinkhorn": ("objective=glare", "backbone=vit_nano", "image_size=32", "objective.koleo=0.1"),
    "glare convnext": ("objective=glare", "backbone=convnext_nano_lite", "image_size=64", "objective.patch_aug=mask"),
    "glare shvit": ("objective=glare", "backbone=shvit_nano_lite", "image_size=128"),
    "cim shvit": ("objective=cim", "backbone=shvit_nano_lite", "image_size=128", "objective.exemplars=2"),
}  # fmt: skip
FAST = (
    "mae vit_nano",
    "mae convnext",
    "mae shvit",
    "dino vit",
    "dino vit sinkhorn",
    "ibot vit",
    "selfpatch vit",
    "odis vit",
    "ijepa vit",
    "dmt_jepa vit",
    "cim vit",
    "glare vit",
    "dino vit uniadapter",
    "dino vit adaptformer",
    "dino vit lora",
    "dino vit apla",
    "dino vit bitfit",
)
BATCH, STEPS = 8, 2


class Wrapped(torch.nn.Module):
    """DDP wants a forward."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, batch, step):
        return self.objective.loss(batch, step)[0]


def resample_in_double(table, new_size, old_size, num_prefix_tokens):
    """timm's rule for positions in the table's own precision; timm rounds to float32, which differs between splits."""
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    if new_size == old_size:
        return table
    grid = grid.unflatten(1, old_size).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=True).flatten(2).mT
    return torch.cat([prefix, grid], dim=1)


def gradients(words: tuple[str, ...], rank: int, world: int) -> dict[str, torch.Tensor]:
    """Mean loss and averaged gradients of two steps of the global batch (no weights moved), and buffers after."""
    with mock.patch.object(vit, "resample_abs_pos_embed", resample_in_double):
        return in_double(words, rank, world)


def in_double(words: tuple[str, ...], rank: int, world: int) -> dict[str, torch.Tensor]:
    cfg = config.load("train", [*words, "data.num_train=40", "data.num_val=8", f"batch_size={BATCH}"])
    torch.manual_seed(0)
    objective = build_objective(cfg, total_steps=10, steps_per_epoch=5).double().train()
    source, views = open_source(cfg.data, "train"), objective.views()
    samples = Samples(source, Order(0, source.lengths), views, seed=0)
    net = Wrapped(objective)
    if world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False)
    total = torch.zeros((), dtype=torch.float64)
    for step, where in enumerate(Positions(0, STEPS, BATCH, 1, rank, world)):
        batch = samples[where]
        batch.pop("events")
        batch = prepare(batch, views, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3))
        batch["images"] = {k: v.double() for k, v in batch["images"].items()}
        if "has_object" in batch:  # all images of the second process's first half-batch are without an object
            batch["has_object"] &= batch["position"] % BATCH < BATCH // 2
        loss = net(objective.draw(batch, step), step)
        loss.backward()
        objective.after_step(step)
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    found = {f"grad/{n}": p.grad for n, p in objective.named_parameters() if p.grad is not None}
    buffers = {f"buffer/{n}": b for n, b in objective.named_buffers()}
    return {"loss": total / world} | found | buffers


def refusal(start: int) -> str:
    """What processes that would continue from these steps are told; nothing if they may."""
    try:
        same_start(start, torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def worker(rank: int, world: int, folder: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {name: gradients(CASES[name], rank, world) for name in names}
    results["start"] = refusal(4), refusal(4 if rank else 9)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def both(folder, names: tuple[str, ...]) -> dict:
    """These cases in one pair of processes."""
    for name in names:  # written once, before two processes ask for them
        open_source(config.load("train", [*CASES[name], "data.num_train=40", "data.num_val=8"]).data, "train")
    mp.start_processes(worker, args=(2, str(folder), names), nprocs=2, start_method="spawn")
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return both(tmp_path_factory.mktemp("two"), FAST)


@pytest.fixture(scope="module")
def two_more(tmp_path_factory):
    return both(tmp_path_factory.mktemp("two_more"), tuple(n for n in CASES if n not in FAST))


@pytest.mark.parametrize("name", FAST)
def test_loss_gradients_and_buffers_are_those_of_one_process(two, name):
    compare(two[name], gradients(CASES[name], 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in FAST])
def test_the_same_for_the_other_families(two_more, name):
    compare(two_more[name], gradients(CASES[name], 0, 1))


def test_processes_that_see_different_checkpoints_are_told(two):
    same, different = two["start"]
    assert same == "" and "process 0 would continue from step 9 and process 1 from step 4" in different
    assert "on a disk that all of them share" in different


def compare(two: dict, one: dict) -> None:
    assert one.keys() == two.keys()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def command_runs(tmp_path_factory):
    """`python train.py trainer.devices=2`, left alone and with a signal to the second process only; and one process."""
    root = tmp_path_factory.mktemp("ddp")
    data = ("data=shards", f"data.train={runs.shard(root / 'a.tar', 40, bad=(_met_by_both(40),))}")
    common = ("max_steps=8", "knn.every_n_steps=0", "checkpoint.every_n_steps=100", *data)
    runs.run_here(root / "one", *common, without=runs.SCENES)
    process = runs.start(root / "two", *common, "trainer.devices=2", without=runs.SCENES)
    more = ("max_steps=300", "trainer.devices=2")
    stopped = runs.start(root / "signalled", *common[1:], *more, without=runs.SCENES)
    runs.wait_for_step(root / "signalled", stopped, 3)
    (child,) = [int(c) for c in _children(stopped.pid) if b"train.py" in _command(c)]
    os.kill(child, signal.SIGUSR1)
    codes = process.wait(120), stopped.wait(60)
    return root, codes


def _met_by_both(samples: int) -> int:
    """A sample that process 0 meets in the first epoch and process 1 in what 8 steps see of the second."""
    ids = Order(0, [samples])(np.arange(8 * BATCH)).tolist()
    process = [position % BATCH // (BATCH // 2) for position in range(8 * BATCH)]
    met = list(zip(ids, process))
    return min({id for id, who in met[:samples] if who == 0} & {id for id, who in met[samples:] if who == 1})


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as f:  # noqa: PTH123  (a kernel file, not a path of ours)
        return f.read().split()


def _command(pid: str) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as f:  # noqa: PTH123
        return f.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_whole_run_on_two_devices_agrees_with_one(command_runs):
    root, codes = command_runs
    assert codes[0] == 0, (root / "two.log").read_text()
    one, two = runs.final_state(root / "one"), runs.final_state(root / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_bad_sample_that_both_processes_meet_is_listed_once(command_runs):
    root, _ = command_runs
    one, two = (runs.skipped(root / name) for name in ("one", "two"))
    assert len(one) == len(two) == 1
    assert [entry["id"] for entry in one] == [entry["id"] for entry in two] == [_met_by_both(40)]
    assert read_metrics(root / "two" / "metrics.csv")[-1]["bad_samples"] == "1"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc to find the second process")  # noqa: PTH110
def test_a_signal_to_one_process_stops_both_after_a_checkpoint(command_runs):
    root, codes = command_runs
    log = (root / "signalled.log").read_text()
    assert codes[1] not in (0, -signal.SIGKILL), log
    assert "stopped by a signal at step" in log
    assert list((root / "signalled" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_batch_norm_on_two_devices_trains_is_judged_and_exports_as_on_one(tmp_path):
    words = ("backbone=shvit_nano_lite", "image_size=128", "max_steps=3", "knn.every_n_steps=9", "data.num_train=40")
    left = ("image_size", "data.num_train")
    one = runs.run_here(tmp_path / "one", *words, without=left)
    process = runs.start(tmp_path / "two", *words, "trainer.devices=2", without=left)
    assert process.wait(900) == 0, (tmp_path / "two.log").read_text()
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    for key in ("loss_first", "loss_last", "rankme", "feature_std"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
    states = [runs.final_state(tmp_path / name) for name in ("one", "two")]
    exports = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two")]
    for a, b in (states, exports):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
