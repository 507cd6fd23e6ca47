"""Fine-tuning: the whole backbone and a fresh classifier are trained on labels; the number most papers compare.

One rate and one layer decay train on the whole training split, once per seed, and the last epoch is scored on the test
split. Of several, each trains once on the training split without its held-out tenth; the one that is best there is then
trained on all of it. The accuracies over the epochs are there to be seen; no epoch is chosen by them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from ..backbones.adapters import merged
from ..backbones.watch import blocks_of
from ..results import out_folder
from ..training.layer_decay import layers_of
from . import ProbeError
from .augment import make_policy, mixes
from .classifier import HEAD_STD, build_classifier, classifier_args, held_by, used_drop_path, used_pool
from .finetune_published import published
from .identity import data_facts, digest, weights_hash
from .readout import plain
from .select import counted, held_out, spread
from .store import FULL, Bank
from .task import Outcome, Task
from .tuning import Diverged, Job, Judge, Training, result

LAYER_DECAY = 0.75  # where nothing is frozen and nothing was given
VERSION = 1  # of everything that decides a number, and of the files of an unfinished run


class Choice(NamedTuple):
    """The setting that is trained on all, its accuracy on the held-out tenth (None: it was the only one), and a row for
    every setting."""

    lr: float
    layer_decay: float
    select_top1: float | None
    grid: list[dict[str, Any]]


def run(task: Task) -> Outcome:
    """Choose, train once per seed, score the last epoch on test."""
    p = task.settings
    task.loaded.model.cpu()  # a device has enough to do with the copy that is trained
    size = _apply_published(task)
    if task.cfg.adapt is None:
        task.cfg.adapt = held_by(task.loaded) or {"name": "none"}
    if p.layer_decays is None:  # adapters of early blocks are as new as those of late ones
        p.layer_decays = [LAYER_DECAY if adapted(task) == "none" else 1.0]
    _check(task)
    saved = _saved_folder(task) if p.save else None
    train, test = task.samples()
    if task.classes < 2 or len(train) < 2:
        raise ProbeError(f"fine-tuning needs at least two classes and two training samples, and there are "
                         f"{task.classes} and {len(train)}")  # fmt: skip
    model = build_classifier(task.loaded, task.classes, pool=p.pool, drop_path=p.drop_path, adapt=task.cfg.get("adapt"))
    folder = out_folder(task.cfg) / f".finetune-{_identity(task, train, test)}"
    with _working_in(folder, task):
        choice = _choose(task, train, folder)
        judge = Judge(task.splits.test[0], test.ids, task)
        jobs = [Job(f"seed-{seed}", choice.lr, choice.layer_decay, seed, train.ids) for seed in task.seeds]
        found = [result(task, job, judge, folder, keep=p.save and job is jobs[0]) for job in jobs]
        if saved:
            _save(task, Training(task, jobs[0], folder / jobs[0].name).judged, saved, found[0]["top1"])
    train.bad += {i: (i, why) for f in found for i, why in f["bad"]}.values()
    test.bad += [tuple(b) for b in found[0]["judge_bad"]]
    numbers = _numbers(found, jobs, choice) | {
        "pool": used_pool(model), "drop_path": used_drop_path(model), "saved": str(saved) if saved else None,
    }  # fmt: skip
    parameters = sum(t.numel() for t in model.parameters() if t.requires_grad)
    task.warn_of_end(choice.grid, "select_top1")
    words = _words(task, choice, numbers, size)
    return Outcome(numbers, words, parameters, lambda: shutil.rmtree(folder, ignore_errors=True))


def _numbers(found: list[dict[str, Any]], jobs: list[Job], choice: Choice) -> dict[str, Any]:
    top1 = [f["top1"] for f in found]
    return {
        "top1": float(np.mean(top1)), "top1_std": spread(top1), "top1_seeds": top1,
        "top5": float(np.mean([f["top5"] for f in found])), "queries": found[0]["judged"],
        "select_top1": choice.select_top1, "lr": choice.lr, "layer_decay": choice.layer_decay,
        "batch": found[0]["batch"], "steps": found[0]["steps"], "grid": choice.grid,
        "curve": [{"seed": job.seed, **row} for job, f in zip(jobs, found) for row in f["curve"]],
    }  # fmt: skip


def _choose(task: Task, train: Bank, folder: Path) -> Choice:
    """The best setting on the held-out tenth of the training split, each trained once by the first seed."""
    p = task.settings
    settings = [(lr, decay) for lr in p.lrs for decay in p.layer_decays]
    if len(settings) == 1:
        return Choice(*settings[0], None, [])
    held = held_out(train.ids)
    if not 0 < held.sum() < len(held) - 1:
        raise ProbeError(f"{int(held.sum())} of {len(held)} training samples are held out to choose among "
                         f"{len(settings)} settings; use more training samples, or one of probe.lrs and "
                         "probe.layer_decays")  # fmt: skip
    judge = Judge(task.splits.train[0], train.ids[held], task)
    grid = []
    for i, (lr, decay) in enumerate(settings):
        job = Job(f"choice-{i}-seed-{task.seeds[0]}", lr, decay, task.seeds[0], train.ids[~held])
        try:
            accuracy = result(task, job, judge, folder)["top1"]
        except Diverged as error:
            print(f"warning: {error}", flush=True)
            accuracy = None
        grid.append({"lr": lr, "layer_decay": decay, "select_top1": accuracy})
    best = max(grid, key=lambda row: -math.inf if row["select_top1"] is None else row["select_top1"])
    if best["select_top1"] is None:
        raise ProbeError(f"fine-tuning diverged with every rate of {list(p.lrs)}; use smaller probe.lrs")
    return Choice(best["lr"], best["layer_decay"], best["select_top1"], grid)


# ---- what is asked, looked at before anything is read or trained -----------------------------------------------------


def _apply_published(task: Task) -> str:
    """Fill in `probe.protocol` for this model; the word for its size."""
    name = task.settings.protocol
    if not name:
        return ""
    width = plain(task.loaded.model, task.loaded.image_size).num_features
    values, size, own = published(name, task.loaded.architecture, width)
    for key, value in values.items():  # nobody typed one of them (`protocols.apply_protocol`)
        task.settings[key] = value
    if not own:
        task.warn(f"probe.protocol={name} was not published for a {task.loaded.architecture} of width {width}; it "
                  f"takes the values of {size}")  # fmt: skip
    return size


def _check(task: Task) -> None:
    """ProbeError for settings that this model, these images or this machine cannot have."""
    p, loaded = task.settings, task.loaded
    if task.cfg.bank.precision == "16-mixed":
        raise ProbeError("bank.precision=16-mixed needs scaled losses, which fine-tuning does not have here; use "
                         "bf16-mixed or 32-true")  # fmt: skip
    make_policy(p.augment, loaded.image_size, loaded.mean)
    model = build_classifier(loaded, 2, pool=p.pool, drop_path=p.drop_path, adapt=task.cfg.get("adapt"))
    if p.save and any(hasattr(block, "adapter") for block in blocks_of(model).values()):
        raise ProbeError("probe.save=true writes a model that timm opens, and adapters with a ReLU cannot be merged "
                         "into one; leave it out, or use adapt=lora, apla or bitfit on a run without them")  # fmt: skip
    try:
        layers_of(model, p.grouping)
    except ValueError as error:
        raise ProbeError(f"probe.grouping={p.grouping}: {error}, and this is {loaded.architecture}; use "
                         "probe.grouping=single") from error  # fmt: skip


def _saved_folder(task: Task) -> Path:
    """Where `probe.save` puts the classifier; ExportError if something else stands there."""
    from ..interop.export import refuse_existing

    folder = out_folder(task.cfg) / "finetuned"
    refuse_existing(folder, overwrite=True)
    return folder


# ---- an unfinished run -----------------------------------------------------------------------------------------------


def _identity(task: Task, train: Bank, test: Bank) -> str:
    """16 digits for all that decides the numbers: an unfinished run is continued only by the same."""
    loaded, bank = task.loaded, task.cfg.bank
    settings = {k: v for k, v in OmegaConf.to_container(task.settings, resolve=True).items() if k != "seeds"}
    facts = [
        VERSION, settings, task.cfg.seed, weights_hash(loaded.model), loaded.architecture, loaded.image_size,
        loaded.crop_pct, list(loaded.mean), list(loaded.std), bank.precision, bool(bank.channels_last), task.classes,
        *(data_facts(source, rows.ids) for (source, _), rows in zip(task.splits[:2], (train, test))),
    ]  # fmt: skip
    if (name := adapted(task)) != "none":
        facts.append([name, OmegaConf.to_container(task.cfg.adapt, resolve=True)])
    return digest(json.dumps(facts).encode())[:16]


@contextlib.contextmanager
def _working_in(folder: Path, task: Task) -> Iterator[None]:
    """The folder of an unfinished run, for one process at a time; errors of disk and memory as sentences."""
    new = not folder.parent.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            _lock(file, folder)
            try:
                yield
            except ProbeError:  # the same would come of it again
                shutil.rmtree(folder, ignore_errors=True)
                if new:
                    folder.parent.rmdir()
                raise
    except OSError as error:
        why = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        raise ProbeError(f"fine-tuning cannot keep its state in {folder} ({why}); what was saved before stands, and "
                         "the same command continues there, out=… starts elsewhere") from error  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        batch = task.settings.max_batch or task.settings.batch_size
        raise ProbeError(f"{batch} images at once do not fit into the memory of the GPU; use "
                         f"probe.max_batch={max(1, batch // 2)} (the batch stays the same)") from error  # fmt: skip


def _lock(file: IO[str], folder: Path) -> None:
    """ProbeError if another process holds it; the lock goes with the process, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ProbeError(f"another process is fine-tuning the same in {folder}; wait for it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
            raise


def _save(task: Task, model: nn.Module, folder: Path, top1: float) -> None:
    """The classifier of the first seed as a folder that timm opens."""
    from ..interop.classifier import Classifier, export_classifier

    loaded, source, model = task.loaded, task.splits.train[0], merged(model)
    facts = {k: loaded.facts.get(k) for k in ("objective", "backbone", "which")}
    args = classifier_args(loaded, model)
    export_classifier(
        Classifier(model, loaded.architecture, args, task.classes, tuple(source.classes or ())), folder,
        mean=loaded.mean, std=loaded.std, image_size=loaded.image_size, crop_pct=loaded.crop_pct,
        card={**facts, "data": source.describe, "note": f"fine-tuned, top-1 {top1:.2f} % on {task.splits.words}"},
    )  # fmt: skip


# ---- words -----------------------------------------------------------------------------------------------------------


def _words(task: Task, choice: Choice, numbers: dict[str, Any], size: str) -> str:
    p = task.settings
    after = f"After {p.protocol} ({size}). " if p.protocol else ""
    pool = {"avg": "the mean of its positions", "token": "its class token"}.get(numbers["pool"], numbers["pool"])
    one = f"rate {choice.lr:g} per 256 images, layer decay {choice.layer_decay:g} ({p.grouping})"
    chosen = f"{one}, nothing chosen"
    if choice.grid:
        chosen = (f"rate of {list(p.lrs)} per 256 images and layer decay of {list(p.layer_decays)} ({p.grouping}) "
                  "chosen on a held-out tenth of the training images, then trained on all of them")  # fmt: skip
    return (
        f"{after}Fine-tuning of {_trained(task)} and a fresh linear head (deviation {HEAD_STD:g}) on {pool}: AdamW, "
        f"{chosen}, weight decay {p.weight_decay:g} (none for 1-D tensors, tokens, positions), "
        f"{counted(p.epochs, 'epoch')}, batch {numbers['batch']:,}, {p.warmup_epochs:g} epochs of warm-up, cosine per "
        f"step to {p.min_lr:g}, drop path {numbers['drop_path']:g}; {_augmented(p)}{_also(p)}; the last epoch is "
        f"scored on the test split; mean over {counted(len(task.seeds), 'seed')} (start of the head, order, "
        "augmentation)."
    )


def adapted(task: Task) -> str:
    """The kind of `adapt=`."""
    return (task.cfg.get("adapt") or {}).get("name", "none")


def _trained(task: Task) -> str:
    if (name := adapted(task)) == "none":
        return "the whole backbone"
    if held_by(task.loaded):
        return "the adapters that a frozen backbone holds"
    options = ", ".join(f"{k} {v}" for k, v in task.cfg.adapt.items() if k != "name")
    return f"what {name} ({options}) trains of a frozen backbone"


def _augmented(p: Any) -> str:
    """How training images were changed."""
    words = [f"random crops of {p.scale[0]:g} to {p.scale[1]:g} of the area (bicubic)"]
    words += [f"flips {p.flip:g}"] * bool(p.flip) + [str(p.augment)] * bool(p.augment)
    words += [f"random erasing {p.erase:g}"] * bool(p.erase)
    words += [f"mixup {p.mixup:g}, cutmix {p.cutmix:g}"] * mixes(p) + [f"label smoothing {p.smoothing:g}"] * bool(
        p.smoothing
    )
    words += [f"{p.repeats} views of an image per batch"] * (p.repeats > 1)
    return ", ".join(words)


def _also(p: Any) -> str:
    clip = f", gradients clipped to {p.clip:g}" if p.clip else ""
    return clip + (f", scored on the average of the weights (decay {p.ema:g}, with warm-up)" if p.ema else "")
