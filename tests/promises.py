"""The promises that hold for every objective on every family, as functions: what is equal to what, and how nearly.

`measure` runs them in one group of four processes: starting processes costs more than most cells.

    processes   1 = 2 = 4 processes: loss, gradients, weights, centres and teacher after two optimizer steps
    sharded     2 processes with shards of everything (`trainer.strategy=fsdp`): the same again
    recomputed  with activation checkpointing: the same again
    order       another number of workers, of micro-batches, of processes, or a start in the middle: the same sequence
    resume      killed at a random step, stopped at another, continued twice: the bits of a run that was left alone
    unlabelled  those runs have images without labels
    export      timm's model from the run's export folder gives the features of the network that was trained
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import runs
from selfsight import config
from selfsight.backbones import vit
from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError
from selfsight.data import open_source
from selfsight.data.loader import Positions, Samples, make_loader
from selfsight.data.order import Order
from selfsight.interop import export
from selfsight.objectives import NAMES, build_objective
from selfsight.objectives.glare import GLARE
from selfsight.objectives.objective import Objective
from selfsight.training import checkpoint, sharded
from selfsight.training.loop import RunStopped
from selfsight.training.meet import same_start
from selfsight.training.module import Module
from selfsight.training.teacher import is_sharded, local
from selfsight.views.photo import prepare
from selfsight.views.spec import Batch

CONTRACTS = ("processes", "sharded", "recomputed", "order", "resume", "unlabelled", "export")
FAMILIES = {
    "ViT": ("backbone=vit_nano", "image_size=32"),
    "ConvNeXt V1": ("backbone=convnext_nano_lite", "image_size=64"),
    "ConvNeXt V2": ("backbone=convnextv2_nano_lite", "image_size=64"),
    "SHViT": ("backbone=shvit_nano_lite", "image_size=128"),
}
HIDING = ("mae", "ijepa", "dmt_jepa")  # cells are dropped: there V1 and V2 differ, else one stands for both
ADAPTERS = ("uniadapter", "adaptformer", "lora", "apla", "bitfit")
CELLS = {
    f"{objective} {family}": (f"objective={objective}", *words)
    for objective in NAMES
    for family, words in FAMILIES.items()
    if objective in HIDING or family != "ConvNeXt V1"
} | {
    "dino resnet10t": ("objective=dino", "backbone=timm", "backbone.name=resnet10t", "image_size=64"),
    **{f"dino ViT {kind}": ("objective=dino", *FAMILIES["ViT"], f"adapt={kind}") for kind in ADAPTERS},
}  # fmt: skip
CENTRED = ("objective.centering=center", "objective.koleo=0")
VARIANTS = {  # other ways through the same objectives: `processes` alone
    "dino ViT drop path": ("objective=dino", *FAMILIES["ViT"], "backbone.drop_path=0.2", *CENTRED),
    "dino ViT sinkhorn": (
        "objective=dino", *FAMILIES["ViT"], "objective.centering=sinkhorn", "objective.koleo=0.1",
        "objective.head_batch_norm=true",
    ),
    "ibot ViT dinov2": (
        "objective=ibot", *FAMILIES["ViT"], "objective.centering=sinkhorn", "objective.koleo=0.1",
        "objective.patch_head=separate",
    ),
    "odis ViT skip": ("objective=odis", *FAMILIES["ViT"], "objective.no_mask=skip", *CENTRED),
    "cim ViT contrast": (
        "objective=cim", *FAMILIES["ViT"], "objective.sigma_cont=0.5", "objective.exemplars=2",
        "objective.projector_hidden=16", "objective.projector_dim=8",
    ),
    "glare ViT sinkhorn": ("objective=glare", *FAMILIES["ViT"], "objective.koleo=0.1", "views.local.n=1"),
    "glare ConvNeXt V1 mask": ("objective=glare", *FAMILIES["ConvNeXt V1"], "objective.patch_aug=mask"),
    "dino SHViT lora": ("objective=dino", "backbone=shvit_nano_lite", "image_size=64", "adapt=lora"),
    "glare ViT uniadapter": ("objective=glare", *FAMILIES["ViT"], "adapt=uniadapter", *CENTRED),
}  # fmt: skip
SMALL = ("num_prototypes=64", "head_hidden=32", "head_bottleneck=16")  # heads whose size proves nothing
BATCH, STEPS, WORLD = 8, 2, 4
RUN_STEPS, FIRST_SAVED = 7, 2
TRAIN = ("data.num_train=40", "data.num_val=8", f"batch_size={BATCH}")


def words_of(name: str) -> tuple[str, ...]:
    """The words of a cell or variant, with small heads where it has any."""
    words = (CELLS | VARIANTS)[name]
    keys = config.load("train", list(words)).objective
    return (*words, *(f"objective.{word}" for word in SMALL if word.split("=")[0] in keys))


def built(words: tuple[str, ...]) -> tuple[Objective, Samples]:
    """A fresh objective and its training samples of the built-in scenes."""
    cfg = config.load("train", [*words, *TRAIN])
    torch.manual_seed(0)
    objective = build_objective(cfg, total_steps=10, steps_per_epoch=5).train()
    source = open_source(cfg.data, "train")
    return objective, Samples(source, Order(0, source.lengths), objective.views(), seed=0)


def ready(batch: Batch, objective: Objective) -> Batch:
    """A batch as it comes from the loader, with flips and photometry, on the CPU."""
    batch.pop("events")
    return prepare(batch, objective.views(), torch.tensor([0.5] * 3), torch.tensor([0.25] * 3))


# --- processes -----------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """DDP wants a forward."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, step: int) -> Tensor:
        return self.objective.loss(batch, step)[0]


def resample_in_double(table: Tensor, new_size, old_size, num_prefix_tokens: int) -> Tensor:
    """timm's rule for positions in the table's own precision; timm rounds to float32, which differs between splits."""
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    if new_size == old_size:
        return table
    grid = grid.unflatten(1, old_size).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=True).flatten(2).mT
    return torch.cat([prefix, grid], dim=1)


def uneven(batch: Batch, objective: Objective, step: int) -> Batch:
    """The drawn batch, in which the second half of the global batch has no object, no place that both views show, and
    no hidden patch where their number varies: half of the processes have nothing to take a mean over."""
    without = batch["position"] % BATCH >= BATCH // 2
    if "has_object" in batch:
        batch["has_object"] = batch["has_object"] & ~without
    if isinstance(objective, GLARE):
        batch["boxes"]["global"][1, without] += 1e4
    batch = objective.draw(batch, step)
    if "mask" in batch and batch["mask"].ndim == 3:
        batch["mask"] = batch["mask"] & ~without[:, None]
    return batch


def after_two_steps(words: tuple[str, ...], rank: int, world: int, how: str = "") -> dict[str, Tensor]:
    """In float64: loss, gradients of two steps and everything that they move (weights, buffers, teacher).

    how: "sharded" or "recomputed" in the place of DDP or plain blocks.
    """
    with mock.patch.object(vit, "resample_abs_pos_embed", resample_in_double):
        return _two_steps(words, rank, world, how)


def _two_steps(words: tuple[str, ...], rank: int, world: int, how: str) -> dict[str, Tensor]:
    objective, samples = built(words)
    objective.double()
    net = Wrapped(objective)
    if how == "recomputed":
        objective.checkpoint_blocks()
    if how == "sharded":
        sharded.shard(objective, init_device_mesh("cpu", (world,)))
        if hasattr(objective, "ema"):
            objective.ema.bind()
        held, all_of_it = (sum(f(p).numel() for p in objective.parameters()) for f in (local, lambda p: p))
        assert held < 0.6 * all_of_it, f"{held} of {all_of_it} numbers stay here"
    elif world > 1:
        net = DistributedDataParallel(net, broadcast_buffers=False)
    learning = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in learning], lr=0.1, momentum=0.9)
    found = {}
    for step, where in enumerate(Positions(0, STEPS, BATCH, 1, rank, world)):
        batch = ready(samples[where], objective)
        batch["images"] = {k: v.double() for k, v in batch["images"].items()}
        optimizer.zero_grad()
        loss = net(uneven(batch, objective, step), step)
        loss.backward()
        objective.after_backward(step)
        found |= {f"step {step}/{n}.grad": whole(p.grad) for n, p in learning if p.grad is not None}
        optimizer.step()
        objective.after_step(step)
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        found[f"step {step}/loss"] = total / world
    found |= {n: whole(v) for n, v in objective.state_dict().items()}
    if world > 1:  # what every process holds is the same on all of them
        sums = torch.stack([v.double().sum() for v in found.values()])
        everyone = [torch.empty_like(sums) for _ in range(world)]
        dist.all_gather(everyone, sums)
        found["spread"] = torch.stack([(s - everyone[0]).abs().max() for s in everyone]).max()
    else:
        found["spread"] = torch.zeros((), dtype=torch.float64)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A copy, put together from its parts if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor.clone()


def difference(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-7, atol: float = 1e-9) -> float:
    """The largest difference relative to the largest number of its tensor; AssertionError names a tensor that is
    further off than the tolerances."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:3]
    largest = 0.0
    for key, expected in one.items():
        found = other[key]
        assert found.shape == expected.shape and found.dtype == expected.dtype, key
        if not expected.numel():
            continue
        apart = (found.double() - expected.double()).abs()
        far = apart.max().item() / max(expected.abs().max().item(), 1e-3)
        assert torch.allclose(found, expected, rtol=rtol, atol=atol), f"{key} is {far:.1e} of its largest number away"
        largest = max(largest, far)
    return largest


def refusal(start: int) -> str:
    """What processes that would continue from these steps are told; nothing if they may."""
    try:
        same_start({"step": start}, "", torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


# --- order ---------------------------------------------------------------------------------------------------------


def sequence(objective: Objective, samples: Samples, start: int, micro: int, world: int, workers: int) -> dict:
    """Global position -> hash of what the model would see there, in steps [start, 3), over all processes."""
    found = {}
    for rank in range(world):
        for batch in make_loader(samples, Positions(start, 3, BATCH, micro, rank, world), workers, False):
            batch = ready(batch, objective)
            for i, position in enumerate(batch["position"].tolist()):
                assert position not in found
                parts = [batch["key"][i], batch["id"][i], *(v[:, i] for v in batch["images"].values())]
                parts += [v[:, i] for v in batch["boxes"].values()]
                data = b"".join(p.contiguous().numpy().tobytes() for p in parts)
                found[position] = hashlib.sha256(data).hexdigest()
    return found


def same_order(words: tuple[str, ...]) -> str:
    """AssertionError unless every split of the work sees the same sequence."""
    objective, samples = built(words)
    whole = sequence(objective, samples, 0, 1, 1, 0)
    assert sorted(whole) == list(range(3 * BATCH))
    for micro, world, workers in ((1, 1, 2), (4, 1, 0), (1, 2, 0), (2, 2, 1), (1, 4, 0)):
        other = sequence(objective, samples, 0, micro, world, workers)
        assert other == whole, f"{micro} micro-batches, {world} processes, {workers} workers"
    rest = {k: v for k, v in whole.items() if k >= BATCH}
    assert sequence(objective, samples, 1, 2, 4, 0) == rest, "continued from step 1 on four processes"
    return f"{len(whole)} samples"


# --- runs: kill, stop, continue, export ----------------------------------------------------------------------------


class Killed(BaseException):
    """What a process that dies cannot catch."""


@contextlib.contextmanager
def at_step(step: int, act: Callable[[], None]):
    """Within, `act` is called in the optimizer step that takes a run to `step`."""
    own = Module.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        own(self, *args, **kwargs)
        if self.step == step:
            act()

    with mock.patch.object(Module, "optimizer_step", optimizer_step):
        yield


def die() -> None:
    raise Killed


def survives(name: str, folder: Path) -> dict[str, str]:
    """Train without labels; kill, stop and continue; compare. AssertionError says what differs."""
    draw = random.Random(name)
    killed, stopped = sorted(draw.sample(range(FIRST_SAVED + 1, RUN_STEPS), 2))  # so that each finds something saved
    words = (
        *words_of(name), f"max_steps={RUN_STEPS}", "data=shards", f"data.train={folder}/pile.tar", "optim.clip=1.0",
        "trainer.max_batch_per_device=4", f"checkpoint.every_n_steps={FIRST_SAVED}", "knn.every_n_steps=100",
    )  # fmt: skip
    left = (*runs.SCENES, "image_size")
    features: dict[str, Tensor] = {}
    own = export.export_backbone

    def noted(backbone, out, **kwargs):
        backbone.eval()
        with torch.no_grad():
            features[Path(out).parent.name] = backbone(looked_at(kwargs["image_size"])).pooled
        return own(backbone, out, **kwargs)

    with mock.patch.object(export, "export_backbone", noted):
        whole = runs.run_here(folder / name / "whole", *words, without=left)
        parts = folder / name / "parts"
        with at_step(killed, die), contextlib.suppress(Killed):
            runs.run_here(parts, *words, without=left)
            raise AssertionError(f"the run was not killed at step {killed}")
        assert checkpoint.newest(parts / "checkpoints") is not None, f"killed at {killed} before anything was saved"
        with at_step(stopped, lambda: os.kill(os.getpid(), signal.SIGTERM)), contextlib.suppress(RunStopped):
            runs.run_here(parts, *words, without=left)
            raise AssertionError(f"the run was not stopped at step {stopped}")
        runs.run_here(parts, *words, without=left)
    runs.assert_identical(runs.final_state(folder / name / "whole"), runs.final_state(parts))
    assert "knn" not in whole or whole["knn"] is None
    assert whole["loss_last"] == whole["loss_last"] and whole["rankme"] > 0
    return {
        "resume": f"killed at {killed}, stopped at {stopped}",
        "unlabelled": f"loss {whole['loss_first']:.3g} to {whole['loss_last']:.3g}",
        "export": f"{same_features(folder / name, features):.0e}",
    }


def looked_at(size: int) -> Tensor:
    """Fixed images."""
    return torch.linspace(0, 97, 2 * 3 * size * size).sin().view(2, 3, size, size)


def same_features(folder: Path, features: dict[str, Tensor]) -> float:
    """The largest difference between the network in training and timm's model, relative to the largest feature."""
    worst = 0.0
    for part, expected in features.items():
        cfg = config.read(folder / part / "config.yaml")
        with torch.no_grad():
            mine = export.open_export(folder / part / "export")(looked_at(cfg.image_size))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        worst = max(worst, ((mine - expected).abs().max() / expected.abs().max()).item())
    torch.testing.assert_close(*features.values(), rtol=0, atol=0)
    return worst


# --- all of them in one group of processes -------------------------------------------------------------------------


def tried(call: Callable) -> dict:
    """{"ok": …, "note": …} of one contract of one cell; a traceback goes to stderr."""
    try:
        return {"ok": True, "note": call()}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(folder: Path, cells: Iterable[str], variants: Iterable[str] = (), pairs: Iterable[str] = ()) -> dict:
    """cell -> contract -> {"ok", "note"}; under "start" what processes with different checkpoints are told.

    cells: with all contracts; variants: those of two optimizer steps; pairs: 1 = 2 processes alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = {"cells": list(cells), "variants": list(variants), "pairs": list(pairs)}
    runs.shard(folder / "pile.tar", 40, labelled=False)
    for name in {name for names in work.values() for name in names}:
        # scenes are written once, before four processes ask for them
        open_source(config.load("train", [*words_of(name), *TRAIN]).data, "train")
    # One server that has imported everything: processes are then forked from it, in which nothing has run yet.
    mp.get_context("forkserver").set_forkserver_preload(["promises"])
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=search):
        mp.start_processes(_process, (str(folder), work), nprocs=WORLD, start_method="forkserver")
    return collected(folder)


def collected(folder: Path) -> dict:
    """What the processes have written so far."""
    results: dict = {}
    for rank in range(WORLD):
        part = json.loads((folder / f"results-{rank}.json").read_text())
        for name, found in part.items():
            results[name] = (results.get(name, {}) | found) if isinstance(found, dict) else found
    return results


def _process(rank: int, folder: str, work: dict[str, list[str]]) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # the older name works with every torch
    root, results = Path(folder), {}
    log = (root / f"log-{rank}.txt").open("w", buffering=1)

    def note(name: str, found: dict) -> None:
        results[name] = results.get(name, {}) | found
        print(name, found, flush=True)
        (root / f"results-{rank}.json").write_text(json.dumps(results))

    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        start = _as_many(rank, root, work, note)
        if rank == 0:
            results["start"] = start
        for name in work["cells"][rank::WORLD]:
            note(name, {"order": tried(lambda n=name: same_order(words_of(n)))})
            run = tried(lambda n=name: survives(n, root))
            kinds = ("resume", "unlabelled", "export")
            note(name, {k: {"ok": run["ok"], "note": run["note"][k] if run["ok"] else run["note"]} for k in kinds})
    (root / f"results-{rank}.json").write_text(json.dumps(results))


def _as_many(rank: int, root: Path, work: dict[str, list[str]], note: Callable) -> list[str]:
    """Every cell by four processes; then by two pairs of them, which share the cells; then by each of them alone."""
    start, whole = [], [*work["cells"], *work["variants"]]
    for world in (4, 2):
        group, member = rank // world, rank % world
        names = whole if world == 4 else [*whole, *work["pairs"]]
        meet(root / f"meet-{world}-{group}", member, world)
        if world == 4:
            start = [refusal(4), refusal(4 if rank else 9)]
        for name in names[group :: WORLD // world]:
            for how in ("", "sharded") if world == 2 and name in whole else ("",):
                if how and shards(name) is not None:
                    continue
                found = tried(lambda n=name, m=member, w=world, h=how: after_two_steps(words_of(n), m, w, h))
                if member == 0 and found["ok"]:
                    save_file({k: v.contiguous() for k, v in found["note"].items()}, root / f"{name}-{world}{how}")
                elif member == 0:
                    (root / f"{name}-{world}{how}.txt").write_text(found["note"])
        leave()
    meet(root / "meet-all", rank, WORLD)  # others may still have been writing what this one compares
    leave()
    for name in names[rank::WORLD]:
        note(name, _compared(name, root, name in whole))
    return start


def meet(file: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


def shards(name: str) -> str | None:
    """Why a cell cannot be sharded, None where it can."""
    cfg = config.load("train", [*words_of(name)])
    try:
        sharded.refuse(cfg, "32-true")
    except ConfigError as error:
        return str(error)
    return None


def _compared(name: str, root: Path, whole: bool) -> dict:
    """Contract -> {"ok", "note"} of what two optimizer steps give."""
    one = after_two_steps(words_of(name), 0, 1)

    def against(*files: str) -> str:
        largest = 0.0
        for file in files:
            why = root / f"{name}-{file}.txt"
            assert not why.exists(), f"{file}: {why.read_text()}"
            largest = max(largest, difference(one, load_file(root / f"{name}-{file}")))
        return f"{largest:.0e}"

    if not whole:
        return {"processes": tried(lambda: against("2"))}
    refused = {"ok": True, "note": "refused"}
    found = {"processes": tried(lambda: against("4", "2"))}
    found["sharded"] = refused if shards(name) else tried(lambda: against("2sharded"))
    try:
        again = after_two_steps(words_of(name), 0, 1, "recomputed")
        found["recomputed"] = tried(lambda: f"{difference(one, again):.0e}")
    except BackboneError:
        found["recomputed"] = refused
    return found
