"""Linear probe on frozen features: many learning rates and weight decays at once, chosen on held-out training data.

As in MAE (He et al., 2022, appendix A.1) features are standardised per dimension (BatchNorm1d without affine, eps
1e-6) before the linear layer. Because cached features never change, the standardisation uses the exact statistics of
the fitting split instead of running averages, which lag. As in DINOv2's grid (Oquab et al., 2023) all heads train side
by side with SGD, momentum 0.9 and a cosine to zero; unlike there, the best head is chosen on a tenth of the
*training* split, and the test split is scored once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.rng import key_of, uniform
from . import ProbeError

MOMENTUM, INIT_STD, EPS = 0.9, 0.01, 1e-6
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # for a batch of 256; scaled by batch / 256
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3)
SELECT_SHARE = 0.1


class Linear(NamedTuple):
    """Accuracies in percent. `grid`: one row per head with its accuracy on the held-out part of train."""

    top1: float
    top5: float
    select_top1: float
    lr: float
    weight_decay: float
    grid: list[dict[str, float]]
    predictions: Tensor


def held_out(ids: np.ndarray, share: float = SELECT_SHARE) -> np.ndarray:
    """bool [n]: samples of the selection split. A hash of the id, so the split survives any reordering or subset."""
    return uniform(key_of(0, np.asarray(ids)), "probe/select", 1)[:, 0] < share


def linear(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    select: np.ndarray,
    lrs: Sequence[float] = LRS,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Linear:
    """Fit every (lr, weight decay) on train without the `select` rows (bool [n]), choose on them, score test once.

    Features [n, D] of any float type, labels int64 >= 0. lrs are per 256 samples of batch. The same seed gives the
    same result on one device. ProbeError when labels are missing or the selection split is empty.
    """
    _check(train, train_labels, test_labels, select)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    chosen = torch.from_numpy(np.asarray(select, dtype=bool))
    fit, fit_labels = train[~chosen].to(device).float(), train_labels[~chosen].to(device)
    mean, std = fit.mean(0), (fit.var(0, unbiased=False) + EPS).sqrt()
    heads = [(lr, wd) for lr in lrs for wd in weight_decays]
    weight, bias = _fit((fit - mean) / std, fit_labels, classes, heads, epochs, min(batch_size, len(fit)), seed)

    def ranked(x: Tensor, head: int | slice) -> Tensor:  # [heads, n, 5]: a chunk at a time, logits of all heads are big
        parts = ((part.to(device).float() - mean) / std for part in x.split(4096))
        out = [_logits(p, weight[head], bias[head]).topk(min(5, classes), dim=-1).indices.cpu() for p in parts]
        return torch.cat(out, dim=1)

    select_hits = ranked(train[chosen], slice(None))[..., 0] == train_labels[chosen].cpu()
    accuracy = 100 * select_hits.double().mean(1)
    best = int(accuracy.argmax())
    hits = (order := ranked(test, slice(best, best + 1))[0]) == test_labels.cpu()[:, None]
    grid = [{"lr": lr, "weight_decay": wd, "select_top1": a} for (lr, wd), a in zip(heads, accuracy.tolist())]
    top1, top5 = (100 * h.double().mean().item() for h in (hits[:, 0], hits.any(1)))
    return Linear(top1, top5, accuracy[best].item(), *heads[best], grid, order[:, 0])


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, D], weight [H, C, D], bias [H, C] -> [H, n, C]."""
    return torch.einsum("nd,hcd->hnc", x, weight) + bias[:, None]


def _fit(x: Tensor, labels: Tensor, classes: int, heads, epochs: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """All heads at once; each sees the same batches in the same order and starts from the same weights."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(classes, x.shape[1], generator=generator) * INIT_STD
    weight = start.to(x.device).repeat(len(heads), 1, 1).requires_grad_()
    bias = torch.zeros(len(heads), classes, device=x.device, requires_grad=True)
    lr, decay = (torch.tensor(v, device=x.device, dtype=torch.float32) for v in zip(*heads))
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    steps = epochs * (per_epoch := len(x) // batch)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        rows = order[(step % per_epoch) * batch :][:batch]
        logits = _logits(x[rows], weight, bias)
        # Summed over heads, averaged over the batch: every head gets the gradient that it would get alone.
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(heads)), reduction="sum") / batch
        grads = torch.autograd.grad(loss, (weight, bias))
        rate = lr * (batch / 256) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            speed[0].mul_(MOMENTUM).add_(grads[0] + decay[:, None, None] * weight)
            speed[1].mul_(MOMENTUM).add_(grads[1])
            weight -= rate[:, None, None] * speed[0]
            bias -= rate[:, None] * speed[1]
    return weight.detach(), bias.detach()


def _check(train: Tensor, train_labels: Tensor, test_labels: Tensor, select: np.ndarray) -> None:
    for name, labels in (("train", train_labels), ("test", test_labels)):
        if not len(labels) or int(labels.min()) < 0:
            missing = int((labels < 0).sum())
            raise ProbeError(f"linear probe: {missing} of {len(labels)} {name} samples have no label; all need one")
    if not torch.isfinite(train).all():
        raise ProbeError("linear probe: features contain NaN or infinity; the backbone has diverged")
    if not 0 < int(np.sum(select)) < len(train):
        raise ProbeError(
            f"linear probe: {int(np.sum(select))} of {len(train)} training samples are held out to choose a learning "
            "rate; use more training samples (a tenth is held out)"
        )
