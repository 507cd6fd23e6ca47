"""Linear probe on frozen features: many learning rates and weight decays at once, chosen on held-out training data.

As in MAE (He et al., 2022, appendix A.1) features are standardised per dimension (BatchNorm1d without affine, eps
1e-6) before the linear layer. Because cached features never change, the standardisation uses the exact statistics of
the fitting split instead of running averages, which lag. As in DINOv2's grid (Oquab et al., 2023) all heads train side
by side, with SGD or LARS, momentum 0.9 and a cosine to zero; unlike there, the best head is chosen on a tenth of the
*training* split, by its mean over the seeds, and the test split is scored once per seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.schedules import warmup_cosine
from . import ProbeError
from .optimizers import LR_BATCH, build_optimizer
from .progress import Progress
from .readout import Want
from .select import counted, held_out, spread

if TYPE_CHECKING:
    from .store import Bank
    from .task import Outcome, Task

INIT_STD, EPS = 0.01, 1e-6
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for a batch of 256; scaled by batch / 256
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3)
CHUNK = 4096  # rows scored at once: logits of all heads are big
# What the linear layer sees: the model's own feature, or class tokens of the last n blocks, oldest first and after the
# final norm, with or without the mean of the last block's patches (DINO, DINOv2).
INPUTS = {
    "pooled": (Want("pooled"),),
    "mean": (Want("mean"),),
    "class1": (Want("class"),),
    "class1+mean": (Want("class"), Want("mean")),
    "class4": tuple(Want("class", i) for i in (-4, -3, -2, -1)),
    "class4+mean": (*(Want("class", i) for i in (-4, -3, -2, -1)), Want("mean", -1)),
}


class Recipe(NamedTuple):
    """How heads are trained. heads: (lr, weight decay) pairs, lr per 256 samples of batch. steps: instead of epochs."""

    heads: tuple[tuple[float, float], ...]
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 1024
    batch_norm: bool = True
    optimizer: str = "sgd"  # of `optimizers`
    warmup_epochs: float = 0.0


class Fitted(NamedTuple):
    """Heads of every seed: weight [S, H, C, D], bias [S, H, C]; what features are standardised with; accuracy [S, H]
    on the held-out part of train, in percent."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    accuracy: Tensor


class Linear(NamedTuple):
    """Accuracies in percent, means over the seeds. `grid`: one row per head with its accuracy on the held-out part of
    train. top1_seeds: one per seed, top1_std their spread (None: one seed). predictions: int64 [n] of the
    first seed."""

    top1: float
    top5: float
    select_top1: float
    lr: float
    weight_decay: float
    grid: list[dict[str, float]]
    predictions: Tensor
    top1_seeds: list[float]
    top1_std: float | None


def linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    select: np.ndarray,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    **recipe,
) -> Linear:
    """Fit every (lr, weight decay) on train without the `select` rows (bool [n]), choose on them, score test once.

    Features [n, D] of any float type, labels int64 >= 0. The same seed gives the same result on one device. recipe:
    the other fields of `Recipe`. ProbeError when labels are missing or the selection split is empty.
    """
    _check(train, train_labels, test_labels, select)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    how = Recipe(tuple((lr, wd) for lr in lrs for wd in weight_decays), **recipe)
    fitted = fit(train, train_labels, classes, how, select=select, seeds=seeds, device=device)
    return score(fitted, how, test, test_labels)


def fit(
    train: Tensor, labels: Tensor, classes: int, how: Recipe, *, select: np.ndarray, seeds: Sequence[int], device
) -> Fitted:
    """All heads of all seeds on train without `select`, and how each does on `select`."""
    chosen = torch.from_numpy(np.asarray(select, dtype=bool))
    x, y = train[~chosen].to(device).float(), labels[~chosen].to(device)
    mean, std = torch.zeros_like(x[0]), torch.ones_like(x[0])
    if how.batch_norm:
        mean, std = x.mean(0), (x.var(0, unbiased=False) + EPS).sqrt()
    x = x.sub_(mean).div_(std)  # indexing made this copy, which for ImageNet is gigabytes
    heads = [_fit(x, y, classes, how, seed) for seed in seeds]
    fitted = Fitted(*(torch.stack(parts) for parts in zip(*heads)), mean, std, torch.empty(0))
    held, truth = train[chosen], labels[chosen].cpu()
    hits = [_ranked(fitted, s, slice(None), held)[..., 0] == truth for s in range(len(seeds))]
    return fitted._replace(accuracy=torch.stack([100 * h.double().mean(1) for h in hits]))


def score(fitted: Fitted, how: Recipe, test: Tensor, labels: Tensor) -> Linear:
    """The head that is best on the held-out part of train, on average over the seeds, on the test split."""
    accuracy, labels = fitted.accuracy.mean(0), labels.cpu()
    best = int(accuracy.argmax())
    ranked = [_ranked(fitted, s, slice(best, best + 1), test)[0] for s in range(len(fitted.weight))]
    hits = [order == labels[:, None] for order in ranked]
    top1 = [100 * h[:, 0].double().mean().item() for h in hits]
    top5 = [100 * h.any(1).double().mean().item() for h in hits]
    grid = [{"lr": lr, "weight_decay": wd, "select_top1": a} for (lr, wd), a in zip(how.heads, accuracy.tolist())]
    return Linear(float(np.mean(top1)), float(np.mean(top5)), accuracy[best].item(), *how.heads[best], grid,
                  ranked[0][:, 0], top1, spread(top1))  # fmt: skip


def _ranked(fitted: Fitted, seed: int, heads: slice, x: Tensor) -> Tensor:
    """The five best classes of every row by some heads of a seed, [heads, n, 5]; -1 where a head diverged."""
    weight, bias = fitted.weight[seed, heads], fitted.bias[seed, heads]
    parts = ((part.to(weight.device).float() - fitted.mean) / fitted.std for part in x.split(CHUNK))
    out = []
    for part in parts:
        logits = _logits(part, weight, bias)
        best = logits.topk(min(5, weight.shape[1]), dim=-1).indices
        out.append(best.masked_fill(~logits.isfinite().all(-1, keepdim=True), -1).cpu())
    return torch.cat(out, dim=1)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, D], weight [H, C, D], bias [H, C] -> [H, n, C]."""
    return torch.einsum("nd,hcd->hnc", x, weight) + bias[:, None]


def _fit(x: Tensor, labels: Tensor, classes: int, how: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """All heads of a seed: they start from the same weights and see the same batches in the same order."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(classes, x.shape[1], generator=generator) * INIT_STD
    weight = start.to(x.device).repeat(len(how.heads), 1, 1).requires_grad_()
    bias = torch.zeros(len(how.heads), classes, device=x.device, requires_grad=True)
    train_heads(weight, bias, x, labels, how, generator)
    return weight.detach(), bias.detach()


def train_heads(
    weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor, how: Recipe, generator: torch.Generator | None
) -> None:
    """Change weight [H, C, D] and bias [H, C] in place. generator: of the order of the batches; None: as they stand."""
    lr, decay = (torch.tensor(v, device=x.device, dtype=torch.float32) for v in zip(*how.heads))
    optimizer = build_optimizer(how.optimizer, {"weight": weight, "bias": bias}, decay)
    batch = min(how.batch_size, len(x))
    per_epoch = len(x) // batch
    steps, warmup = how.steps or how.epochs * per_epoch, round(how.warmup_epochs * per_epoch)
    pace = warmup_cosine(batch / LR_BATCH, steps, warmup)
    said = Progress(f"training of {len(weight)} linear heads", steps)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator) if generator else torch.arange(len(x))
            order = order.to(x.device)
        rows = order[(step % per_epoch) * batch :][:batch]
        logits = _logits(x[rows], weight, bias)
        # Summed over heads, averaged over the batch: every head gets the gradient that it would get alone.
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(weight)), reduction="sum") / batch
        grads = torch.autograd.grad(loss, (weight, bias))
        optimizer.step({"weight": grads[0], "bias": grads[1]}, lr * pace(step))
        said()


def _check(train: Tensor, train_labels: Tensor, test_labels: Tensor, select: np.ndarray) -> None:
    for name, labels in (("train", train_labels), ("test", test_labels)):
        if not len(labels) or int(labels.min()) < 0:
            missing = int((labels < 0).sum())
            raise ProbeError(f"linear probe: {missing} of {len(labels)} {name} samples have no label; all need one")
    check_select(train, select)


def check_select(train: Tensor, select: np.ndarray) -> None:
    """ProbeError if features have diverged or nothing is left to fit on or to choose by."""
    if not torch.isfinite(train).all():
        raise ProbeError("linear probe: features contain NaN or infinity; the backbone has diverged")
    if not 0 < int(np.sum(select)) < len(train):
        raise ProbeError(
            f"linear probe: {int(np.sum(select))} of {len(train)} training samples are held out to choose a learning "
            "rate; use more training samples (a tenth is held out)"
        )


def wants(task: Task, settings: Any) -> list[Want]:
    """What a run with these settings reads."""
    return list(dict.fromkeys(w for name in settings.inputs for w in inputs_of(name, settings.layer, settings.norm)))


def inputs_of(name: str, layer: int | None, norm: bool) -> tuple[Want, ...]:
    """Arrays of a named input where it is read from another layer than the last, or without the final norm; ProbeError
    where four blocks are asked for and fewer are there."""
    if layer is None and norm:
        return INPUTS[name]
    last, out = -1 if layer is None else layer, []
    for want in INPUTS[name]:
        back = 0 if want.layer is None else want.layer + 1  # blocks before the last one
        if last >= 0 > last + back:
            raise ProbeError(f"probe.inputs={name} reads four blocks up to probe.layer={last}; use a layer of at least "
                             "3, or class1")  # fmt: skip
        out.append(Want(want.kind, last + back, norm))
    return tuple(out)


def recipe_of(settings: Any) -> Recipe:
    """By the keys of `probe=linear`."""
    heads = tuple((lr, wd) for lr in settings.lrs for wd in settings.weight_decays)
    return Recipe(heads, settings.epochs, settings.steps, settings.batch_size, settings.batch_norm, settings.optimizer,
                  settings.warmup_epochs)  # fmt: skip


def run(task: Task) -> Outcome:
    """Every input, learning rate and weight decay; the best on held-out training images is scored on test."""
    from .task import Outcome

    p, names = task.settings, list(task.settings.inputs)
    task.need_held_out()
    train, test = task.banks(*wants(task, p))
    how = recipe_of(p)
    select, best, found, grid = held_out(train.ids), -1.0, None, []
    arrays = {name: inputs_of(name, p.layer, p.norm) for name in names}
    for name in names:
        x = join(train, arrays[name])
        check_select(x, select)
        fitted = fit(x, train.labels, task.classes, how, select=select, seeds=task.seeds, device=task.device)
        means = fitted.accuracy.mean(0).tolist()
        grid += [
            {"input": name, "lr": lr, "weight_decay": wd, "select_top1": a} for (lr, wd), a in zip(how.heads, means)
        ]
        if max(means) > best:
            best, found = max(means), (name, fitted)
    name, fitted = found
    scored = score(fitted, how, join(test, arrays[name]), test.labels)
    numbers = {
        "top1": scored.top1, "top1_std": scored.top1_std, "top1_seeds": scored.top1_seeds, "top5": scored.top5,
        "select_top1": scored.select_top1, "input": name, "lr": scored.lr, "weight_decay": scored.weight_decay,
        "grid": grid,
    }  # fmt: skip
    task.warn_of_end([row for row in grid if row["input"] == name], "select_top1")
    return Outcome(numbers, _words(how, names, task), fitted.weight[0, 0].numel() + fitted.bias[0, 0].numel())


def join(bank: Bank, wants: Sequence[Want]) -> Tensor:
    """float32 [n, D]: the arrays side by side."""
    parts = [bank.read(want) for want in wants]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _words(how: Recipe, names: list[str], task: Task) -> str:
    norm = ("standardised per dimension (batch norm without affine, exact statistics)" if how.batch_norm
            else "as they are (no batch norm)")  # fmt: skip
    momentum = {"sgd": "SGD, momentum 0.9", "lars": "LARS (trust 0.001), momentum 0.9"}
    optimizer = momentum.get(how.optimizer, "AdamW")
    warmup = f", {how.warmup_epochs:g} epochs of warm-up" if how.warmup_epochs else ""
    length = f"{how.steps:,} steps" if how.steps else counted(how.epochs, "epoch")
    inputs = " and ".join(names) if len(names) < 3 else f"{len(names)} inputs ({', '.join(names)})"
    count, seeds = counted(len(names) * len(how.heads), "head"), counted(len(task.seeds), "seed")
    where = task.where(inputs_of(names[-1], task.settings.layer, task.settings.norm)[-1])
    protocol = f"After {task.settings.protocol}. " if task.settings.get("protocol") else ""
    return (
        f"{protocol}One linear layer on frozen {inputs} features of {where}, no augmentation, {norm}: {count} "
        f"(input x learning rate x weight decay) trained side by side with {optimizer}{warmup}, cosine to zero, "
        f"{length}, batch {how.batch_size:,} at most; the head was chosen on a held-out tenth of the training images "
        f"and scored on the test split; mean over {seeds} (start of the heads, order of the batches)."
    )
