"""BatchNorm whose statistics are those of the global batch, on any device and backend.

torch's SyncBatchNorm refuses CPU tensors, so runs of several processes could not be tested without GPUs. In a single
process this is torch's own batch norm. Parameters and buffers keep their names, so state dicts are interchangeable.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """Sum over processes. What one process's number does to the loss of all is again a sum over processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel and the count, over all processes: x [B, C, *] -> [C], [C], scalar.

    One collective: every process fills its own row of a table, and summing the tables gathers them. The rows are
    combined as in Chan et al. (1979), since E[x^2] - E[x]^2 would cancel in float32.
    """
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, axes, correction=0)
    row = torch.cat([mean, variance, mean.new_full((1,), x.numel() / x.shape[1])])
    world, rank = dist.get_world_size(), dist.get_rank()
    table = _Sum.apply(torch.stack([row if r == rank else torch.zeros_like(row) for r in range(world)]))
    means, variances, counts = table[:, : len(mean)], table[:, len(mean) : -1], table[:, -1:].detach()
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, variance, total


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes: input [B, C] or [B, C, *], statistics at least in float32."""

    def forward(self, input: Tensor) -> Tensor:
        several = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, variance, total = _statistics(x)
        self._track(mean.detach(), variance.detach(), total)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, total: Tensor) -> None:
        """Update the running statistics as nn.BatchNorm does: unbiased variance; momentum None = cumulative mean."""
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        step = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.to(mean.dtype)
        unbiased = variance * (total / (total - 1))
        self.running_mean.add_((mean - self.running_mean) * step)
        self.running_var.add_((unbiased - self.running_var) * step)


class GlobalBatchNorm1d(GlobalBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d over all processes."""


class GlobalBatchNorm2d(GlobalBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes."""


_GLOBAL: dict[type, type] = {nn.BatchNorm1d: GlobalBatchNorm1d, nn.BatchNorm2d: GlobalBatchNorm2d}


def _retype(module: nn.Module, table: dict[type, type]) -> nn.Module:
    # Assigning __class__ keeps the module object itself: parameters, buffers, hooks and aliases are the very same.
    for norm in module.modules():
        norm.__class__ = table.get(type(norm), type(norm))
    return module


def to_global(module: nn.Module) -> nn.Module:
    """Every nn.BatchNorm1d / 2d inside becomes its global version (in place; same parameters, buffers and names)."""
    return _retype(module, _GLOBAL)


def from_global(module: nn.Module) -> nn.Module:
    """The inverse of `to_global`."""
    return _retype(module, {new: old for old, new in _GLOBAL.items()})


class FrozenBatchNorm(nn.Module):
    """A batch norm that always uses its running statistics, in train mode, too. They are frozen parameters here, so a
    teacher shares them as it shares frozen weights; their names stay."""

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)


def freeze_statistics(module: nn.Module) -> nn.Module:
    """Every batch norm inside becomes a `FrozenBatchNorm` (in place; weight and bias keep their requires_grad).

    ValueError names a kind that does more than normalise.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        if type(norm) not in {*_GLOBAL, *_GLOBAL.values()} or norm.running_mean is None:
            raise ValueError(f"the statistics of its {type(norm).__name__} cannot be frozen")
    for norm in norms:
        norm.__class__ = FrozenBatchNorm
        for name in ("running_mean", "running_var"):
            value = norm._buffers.pop(name)
            norm.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module


@torch.no_grad()
def reestimate(module: nn.Module, forward: Callable[[nn.Module, Tensor], object], batches: Iterable) -> nn.Module:
    """A copy of `module`, in eval mode, with running statistics measured afresh; `module` itself is not touched.

    Calls forward(copy, batch) for every batch with only the batch norms in train mode; their statistics are the plain
    average over batches (momentum None). For backbones whose statistics were spoilt by masked images. ValueError if
    there is no batch. The copy's norms are local: one process may do this while the others do something else.
    """
    fresh = from_global(copy.deepcopy(module)).eval()
    norms = [m for m in fresh.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        forward(fresh, batch)
    if not count:
        raise ValueError("running statistics cannot be re-estimated from no batches; give at least one")
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return fresh.eval()
