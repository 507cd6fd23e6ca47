"""Pieces of losses that several objectives share. Means are over the global batch where counts vary."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are. For sums that half precision cannot hold."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standardise(target: Tensor, eps: float = 1e-6) -> Tensor:
    """MAE's normalised pixel target: zero mean and unit *unbiased* variance over the last axis, eps in the root."""
    target = upcast(target)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) * (variance + eps).rsqrt()


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast switched off on x's device (which may have none): sums that half precision cannot hold."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum over all processes, without a gradient; a new tensor."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def global_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over all processes, x and weight [R] -> scalar whose DDP-averaged gradient is the true one.

    sum(w x) * world / all_reduce(sum w): averaging this over processes gives the mean over the global batch, also
    when processes hold different numbers of valid entries.
    """
    return (x * weight).sum() * world_size() / all_sum(weight.sum()).clamp(min=1e-6)


def cross_entropy(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    """H(target, softmax(logits / temp)) of matching rows: [*, K] twice -> [*]; rows of `target` sum to 1.

    As log-sum-exp minus inner product, so that no second tensor of log-probabilities is kept.
    """
    with full_precision(logits):
        scaled = upcast(logits) / temp
        return scaled.logsumexp(-1) - (target * scaled).sum(-1)


def cross_view(target: Tensor, logits: Tensor, temp: float) -> Tensor:
    """H of every teacher view against every student view: [g, B, K], [v, B, K] -> [g, v, B] (DINO, eq. 2 and 3)."""
    with full_precision(logits):
        scaled = upcast(logits) / temp
        return scaled.logsumexp(-1) - torch.einsum("gbk,vbk->gvb", target, scaled)


def other_views(pairs: Tensor) -> Tensor:
    """Mean over pairs of different views: [g, v, B] -> [B]; the first g student views are the teacher's."""
    g, v, _ = pairs.shape
    same = torch.arange(g, device=pairs.device)
    return (pairs.sum((0, 1)) - pairs[same, same].sum(0)) / (g * v - g)


def entropy(target: Tensor) -> Tensor:
    """Mean entropy of distributions [*, K], nats."""
    return torch.special.entr(target).sum(-1).mean()


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of what others did with them comes back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.rows :][: ctx.rows]


def koleo(features: Tensor, scope: str = "global", eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko spread of unit vectors: features [B, D] -> -mean log distance to the nearest other.

    Sablayrolles et al. (ICLR 2019), as in DINOv2: always float32 (half precision loses eps). Neighbours are sought in
    the batch of all processes, or of this one (scope "rank", the reference).
    """
    with full_precision(features):
        x = F.normalize(upcast(features), dim=-1, eps=eps)
        several = scope == "global" and world_size() > 1
        everyone = _Gather.apply(x) if several else x
        first = dist.get_rank() * len(x) if several else 0
        own = torch.arange(first, first + len(x), device=x.device)
        with torch.no_grad():
            nearest = (x @ everyone.T).scatter(1, own[:, None], -1.0).argmax(1)
        return -(F.pairwise_distance(x, everyone[nearest], p=2, eps=eps) + eps).log().mean()


def info_nce(queries: Tensor, keys: Tensor, temp: float) -> Tensor:
    """Each query finds its own key among those of all processes: [B, D] twice -> [B], times 2 temp as in MoCo v3.

    Keys carry no gradient (they are a teacher's).
    """
    with full_precision(queries):
        q, k = (F.normalize(upcast(x), dim=-1) for x in (queries, keys.detach()))
        everyone = _Gather.apply(k) if world_size() > 1 else k
        first = dist.get_rank() * len(k) if world_size() > 1 else 0
        own = torch.arange(first, first + len(k), device=k.device)
        return 2 * temp * F.cross_entropy(q @ everyone.T / temp, own, reduction="none")
