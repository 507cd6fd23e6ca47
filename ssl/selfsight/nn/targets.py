"""What the teacher's logits become before the student must match them: centred or balanced distributions.

Statistics are those of the global batch: every process gets what one process with the whole batch would compute.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .losses import all_sum, full_precision, upcast, world_size


class Center(nn.Module):
    """softmax((logits - centre) / temperature), and the centre: an average of past logits (DINO, eq. 4).

    A step's logits only gather in a pending sum, over micro-batches; `apply_` moves the centre once per optimizer
    step, over all processes. So the centre used in a step holds the steps before it, as in the reference, and nothing
    is pending when a checkpoint is written.
    official_mean: the unweighted mean of the processes' means (DINOv2's patch centre) instead of the mean of all rows.
    """

    def __init__(self, num_prototypes: int, *, official_mean: bool = False):
        super().__init__()
        self.official_mean = official_mean
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("pending", torch.zeros(num_prototypes + 1), persistent=False)  # the last entry: rows

    def forward(self, logits: Tensor, temp: float, weight: Tensor | None = None) -> Tensor:
        """Logits [*, K] -> targets [*, K] in float32 or better; weight [*] of rows in the centre, None = 1."""
        logits = upcast(logits)
        rows = logits.flatten(0, -2)
        if weight is None:
            self.add(rows.sum(0), rows.new_full((), len(rows)))
        else:
            weight = weight.flatten().to(rows.dtype)
            with full_precision(rows):  # a product of matrices, which autocast would take in half precision
                self.add(weight @ rows, weight.sum())
        return self.targets(logits, temp)

    def targets(self, logits: Tensor, temp: float) -> Tensor:
        """The same, but the logits do not count in the centre."""
        return ((upcast(logits) - self.center) / temp).softmax(-1)

    @torch.no_grad()
    def add(self, total: Tensor, count: Tensor) -> None:
        """Let `count` rows that sum to `total` [K] count in the next centre (in training only)."""
        if self.training:
            self.pending += torch.cat([upcast(total), count.reshape(1)])

    @torch.no_grad()
    def apply_(self, momentum: float) -> None:
        """c <- momentum c + (1 - momentum) mean, if there was any row and the mean is finite (a step whose loss is not
        is told of one step later, with the centre that it began with)."""
        pending = self.pending
        if self.official_mean:
            pending = pending / pending[-1].clamp(min=1e-6)
        pending = all_sum(pending)
        count = pending[-1]
        mean = pending[:-1] / count.clamp(min=1e-6)
        moves = (count > 0) & torch.isfinite(mean).all()
        self.center.copy_(torch.where(moves, momentum * self.center + (1 - momentum) * mean, self.center))
        self.pending.zero_()


@torch.no_grad()
def sinkhorn(
    logits: Tensor, temp: float, weight: Tensor | None = None, iterations: int = 3, scope: str = "global"
) -> Tensor:
    """Balanced assignments (Cuturi, 2013; SwAV; DINOv2): logits [R, K] -> targets [R, K], every row sums to 1.

    Prototypes share the rows of all processes equally (scope "rank": of this one). weight [R]: 0 for padding, which
    gets zeros. The largest logit is subtracted first; that changes nothing but cannot overflow.
    """
    scope_sum = all_sum if scope == "global" else lambda x: x
    scaled = upcast(logits) / temp
    weight = scaled.new_ones(len(scaled)) if weight is None else weight.to(scaled.dtype)
    top = torch.where(weight > 0, scaled.amax(1), -torch.inf).amax()
    if scope == "global" and world_size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top = torch.where(torch.isfinite(top), top, 0.0)  # no row anywhere
    q = (scaled - top).clamp(max=0).exp() * weight[:, None]
    rows = scope_sum(weight.sum()).clamp(min=1.0)
    q = q / scope_sum(q.sum()).clamp(min=1e-30)
    for _ in range(iterations):
        q = q / (scope_sum(q.sum(0)).clamp(min=1e-30) * q.shape[1])
        q = q / (q.sum(1, keepdim=True).clamp(min=1e-30) * rows)
    return q * rows
