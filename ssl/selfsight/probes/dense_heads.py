"""Heads that give every patch token class scores, and their training on a bank: all rates and seeds at once.

linear     a linear layer (a 1x1 convolution).
attentive  class queries that look at the tokens, then score them (`ClassQueries`).

Each patch keeps several ids of its mask; the loss is that of its pixels (`segmentation`). The seed decides a head's
start and the order of the batches, so that heads of one seed share their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..nn.pooling.attend import PoolingError, need_divisor
from . import ProbeError
from .optimizers import AdamW
from .progress import Progress
from .store import Bank

INIT_STD, EPS = 0.01, 1e-6
HEAD_WIDTH = 64  # channels of an attention head, where nothing is said
LRS = {"linear": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "attentive": (0.0003, 0.001, 0.003)}


class LinearScores(nn.Module):
    """Tokens [B, N, D] -> scores [B, N, C]. The weight starts normal of std 0.01, the bias at zero."""

    def __init__(self, dim: int, classes: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim, generator=generator) * INIT_STD)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class ClassQueries(nn.Module):
    """A query u_c per class attends to all tokens of the image, and what comes of it scores each of them.

        z_c = u_c + W_O attention(W_Q u_c, W_K x, W_V x);   score[n, c] = <LN(z_c), W_P x_n> / sqrt(D) + b_c

    Derived from Segmenter's mask transformer (Strudel et al., ICCV 2021: class embeddings, masks by inner products)
    with V-JEPA's probe's one-way attention in the place of its joint layers, so that tokens stay as they are banked.
    With W_O = 0 it is the linear head. Tokens [B, N, D] -> scores [B, N, C]; heads divide D. Parameters
    5 D^2 + (C + 5) D + C.
    """

    def __init__(self, dim: int, classes: int, num_heads: int | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.heads = need_divisor(num_heads or usual_heads(dim), dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.empty(classes, dim))
        self.q, self.v, self.out = (nn.Linear(dim, dim) for _ in range(3))
        # Their biases would drop out: of the softmax, and into `bias`.
        self.k, self.mask = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.norm, self.bias = nn.LayerNorm(dim), nn.Parameter(torch.zeros(classes))
        for weight in (self.queries, *(part.weight for part in (self.q, self.k, self.v, self.out, self.mask))):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        for part in (self.q, self.v, self.out):
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
                   for part in (self.q(self.queries), self.k(x), self.v(x)))  # fmt: skip
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # [B, heads, C, N]
        z = self.queries + self.out((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))
        return self.mask(x) @ self.norm(z).mT * x.shape[-1] ** -0.5 + self.bias


def usual_heads(dim: int) -> int:
    """Attention heads for a width: of 64 channels, or the next wider ones that divide it."""
    return next(n for n in range(max(1, dim // HEAD_WIDTH), 0, -1) if dim % n == 0)


def make_head(
    kind: str, dim: int, classes: int, num_heads: int | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """A fresh head; ProbeError where the number of attention heads does not divide the width."""
    if kind == "linear":
        if num_heads is not None:
            raise ProbeError(f"probe.num_heads={num_heads} belongs to probe.head=attentive; a linear head has none")
        return LinearScores(dim, classes, generator)
    try:
        return ClassQueries(dim, classes, num_heads, generator)
    except PoolingError as error:
        raise ProbeError(f"probe.{error}") from None


class Heads(NamedTuple):
    """Heads of S seeds and L learning rates: their parameters [S, L, ...] by the names of `head`, which computes with
    them; mean, std [D] of the tokens."""

    head: nn.Module
    params: dict[str, Tensor]
    mean: Tensor
    std: Tensor

    def __call__(self, tokens: Tensor, seed: int, rate: int) -> Tensor:
        """tokens [B, N, D] -> logits [B, N, C] of one head."""
        own = {name: values[seed, rate] for name, values in self.params.items()}
        return functional_call(self.head, own, ((tokens - self.mean) / self.std,))

    @property
    def parameters(self) -> int:
        """Of one head."""
        return sum(values[0, 0].numel() for values in self.params.values())


class Recipe(NamedTuple):
    """How heads are trained: AdamW, a cosine to zero per step. batch_size: rows of the bank."""

    kind: str = "linear"
    lrs: tuple[float, ...] = LRS["linear"]
    weight_decay: float = 0.001
    epochs: int = 20
    batch_size: int = 16
    batch_norm: bool = True
    num_heads: int | None = None


def fit(
    bank: Bank,
    ids: np.ndarray,
    rows: np.ndarray,
    classes: int,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    read: tuple[int | None, bool],
    device: torch.device | str = "cpu",
    shares: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Heads:
    """All heads on some rows of the bank. ids: of the patches' pixels, int [n, N, K]; shares: of each class among a
    patch's labelled pixels, and of labelled pixels; read: layer and norm of the tokens."""
    mean, std = _statistics(bank, rows, read, device) if recipe.batch_norm else (torch.zeros(1), torch.ones(1))
    mean, std = mean.to(device), std.to(device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, count = bank.array("patches", *read).shape[-1], len(recipe.lrs)
    starts = [make_head(recipe.kind, width, classes, recipe.num_heads, g) for g in generators]
    head = starts[0].to(device)
    params = {
        name: torch.stack([dict(s.named_parameters())[name].detach().to(device) for s in starts])[:, None]
        .repeat(1, count, *[1] * value.ndim)
        for name, value in head.named_parameters()
    }  # fmt: skip
    rates = torch.tensor(list(recipe.lrs) * len(starts), device=device)
    optimizer = AdamW({n: p.flatten(0, 1) for n, p in params.items()}, torch.full_like(rates, recipe.weight_decay))
    batch = min(recipe.batch_size, len(rows))
    per_epoch = len(rows) // batch
    steps = recipe.epochs * per_epoch
    said = Progress(f"training of {len(rates)} {recipe.kind} heads", steps)
    for step in range(steps):
        if step % per_epoch == 0:
            orders = [torch.randperm(len(rows), generator=g).numpy() for g in generators]
        grads = []
        for s, order in enumerate(orders):
            chosen = rows[order[(step % per_epoch) * batch :][:batch]]
            tokens = (bank.tokens(read[0], chosen, read[1]).to(device) - mean) / std
            own = {name: values[s].requires_grad_() for name, values in params.items()}
            losses = head_losses(head, own, tokens, *shares(torch.from_numpy(ids[chosen]).to(device)))
            # Summed over heads: each gets the gradient of its own loss.
            grads.append(torch.autograd.grad(losses.sum(), list(own.values())))
        found = {name: torch.cat(parts) for name, parts in zip(params, zip(*grads))}
        optimizer.step(found, rates * 0.5 * (1 + math.cos(math.pi * step / steps)))
        said()
    return Heads(head, params, mean, std)


def head_losses(head: nn.Module, params: dict[str, Tensor], tokens: Tensor, target: Tensor, weigh: Tensor) -> Tensor:
    """Mean loss of every head over the labelled pixels, [L]. params: [L, ...]; tokens [B, N, D] standardised, target
    [B, N, C] shares of the classes, weigh [B, N] shares of labelled pixels."""
    logits = vmap(lambda own: functional_call(head, own, (tokens,)))(params)
    entropy = -(target * logits.log_softmax(-1)).sum(-1)
    return (entropy * weigh).sum((1, 2)) / weigh.sum().clamp(min=1e-9)


def _statistics(bank: Bank, rows: np.ndarray, read, device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every dimension over the tokens of some rows, in float64."""
    total, squares, count = 0.0, 0.0, 0
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        x = bank.tokens(read[0], part, read[1]).to(device).flatten(0, 1).double()
        total, squares, count = total + x.sum(0), squares + x.square().sum(0), count + len(x)
    mean = total / count
    return mean.float(), ((squares / count - mean.square()).clamp(min=0) + EPS).sqrt().float()
