"""What `adapt=` adds beside frozen layers: bottlenecks, low-rank differences, trainable rows. Channels come last.

All of them give a difference of zero at the start, so that an adapted network begins as the frozen one.
Shapes: D width, r rank, O outputs of the layer that is adapted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spans = Sequence[tuple[int, int]]  # half-open ranges of outputs, rising and apart


class Bottleneck(nn.Module):
    """scale * up(ReLU(down(x))), x [*, D] -> [*, D]: UniAdapter (Lu et al., ICLR 2024) and AdaptFormer (Chen et al.,
    NeurIPS 2022).

    norm: a LayerNorm before it. learn_scale: one trained factor. The up-projection starts at zero, also where
    UniAdapter's code leaves its visual one random. No dropout: what is random here is drawn from a sample's key.
    """

    def __init__(self, dim: int, rank: int, *, scale: float = 0.1, learn_scale: bool = False, norm: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(dim) if norm else None
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)  # down: Kaiming-uniform with a = sqrt(5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale = nn.Parameter(torch.full((1,), scale)) if learn_scale else scale

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return self.scale * self.up(F.relu(self.down(x)))


class LowRank(nn.Module):
    """LoRA (Hu et al., ICLR 2022): alpha / r * B A x, x [*, D] -> [*, O], one pair (A, B) for each span of outputs.

    a: [pairs * r, D], Kaiming-uniform; b: [rows of all spans, r], zero; both as in the reference's MergedLinear.
    """

    def __init__(self, dim: int, outputs: int, rank: int, *, alpha: float = 16, spans: Spans | None = None):
        super().__init__()
        self.outputs, self.factor = outputs, alpha / rank
        self.spans = ((0, outputs),) if spans is None else tuple(spans)
        self.sizes = [end - start for start, end in self.spans]
        self.a = nn.Parameter(torch.empty(len(self.spans) * rank, dim))
        self.b = nn.Parameter(torch.zeros(sum(self.sizes), rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.a).chunk(len(self.spans), -1)
        parts = [F.linear(part, b) for part, b in zip(low, self.b.split(self.sizes))]
        return self.factor * spread(parts, self.spans, self.outputs, -1)

    def difference(self) -> tuple[Tensor, Tensor | None]:
        """What to add to the layer's weight [O, D] and bias [O]."""
        pairs = zip(self.b.split(self.sizes), self.a.chunk(len(self.spans)))
        return self.factor * spread([b @ a for b, a in pairs], self.spans, self.outputs, 0), None


class Rows(nn.Module):
    """APLA's random subset (Sorkhei et al., CVPR 2025): `rank` of a layer's output rows, x [*, D] -> [*, O].

    weight, bias: by how much the rows differ from the frozen ones, so weight decay pulls them back to where they
    started. rows: drawn once from the global generator, like initial weights; kept in checkpoints.
    """

    def __init__(self, dim: int, outputs: int, rank: int, *, bias: bool = True):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.zeros(rank, dim))
        self.bias = nn.Parameter(torch.zeros(rank)) if bias else None
        self.register_buffer("rows", torch.randperm(outputs)[:rank].sort().values)

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight, self.bias)
        return part.new_zeros(*part.shape[:-1], self.outputs).index_copy(-1, self.rows, part)

    def difference(self) -> tuple[Tensor, Tensor | None]:
        """What to add to the layer's weight [O, D] and bias [O]."""
        weight = self.weight.new_zeros(self.outputs, self.weight.shape[1]).index_copy(0, self.rows, self.weight)
        if self.bias is None:
            return weight, None
        return weight, self.bias.new_zeros(self.outputs).index_copy(0, self.rows, self.bias)


def spread(parts: Sequence[Tensor], spans: Spans, size: int, dim: int) -> Tensor:
    """Parts at their spans of an axis of this size, zeros elsewhere."""
    pieces, at = [], 0
    for part, (start, end) in zip(parts, spans):
        if start > at:
            pieces.append(_zeros(part, start - at, dim))
        pieces.append(part)
        at = end
    if at < size:
        pieces.append(_zeros(parts[0], size - at, dim))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _zeros(like: Tensor, size: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)
