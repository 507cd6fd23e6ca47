"""Pieces of losses that several objectives share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are. For sums that half precision cannot hold."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standardise(target: Tensor, eps: float = 1e-6) -> Tensor:
    """MAE's normalised pixel target: zero mean and unit *unbiased* variance over the last axis, eps in the root."""
    target = upcast(target)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) * (variance + eps).rsqrt()


def global_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over all processes, x and weight [R] -> scalar whose DDP-averaged gradient is the true one.

    sum(w x) * world / all_reduce(sum w): averaging this over processes gives the mean over the global batch, also
    when processes hold different numbers of valid entries.
    """
    total, world = weight.sum(), 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        total = total.detach().clone()
        dist.all_reduce(total)
    return (x * weight).sum() * world / total.clamp(min=1e-6)
