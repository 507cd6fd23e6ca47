"""From stage maps of a hierarchical backbone to tokens at one stride, and to one pooled vector.

Shapes: B images, c stage width, h x w stage grid, D width of the tokens, N = H * W tokens of the fused grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import Tensor, nn


def stages_for(reductions: Sequence[int], stride: int | None) -> tuple[int, ...]:
    """Stages to fuse for tokens no coarser than `stride` pixels; () where the last stage is fine enough.

    reductions: pixels per position of each stage, fine to coarse. ValueError if no stage is fine enough.
    """
    if stride is None or stride >= reductions[-1]:
        return ()
    fine = [r for r in reductions if r <= stride]
    if not fine:
        raise ValueError(f"its finest stage has stride {reductions[0]}, and tokens at stride {stride} are asked for")
    return tuple(i for i, r in enumerate(reductions) if r >= fine[-1])


class StageFusion(nn.Module):
    """A 1x1 convolution per stage, up-sampled to the finest of them, summed, LayerNorm.

    The idea is Hiera's multi-stage fusion (Ryali et al., ICML 2023). Nearest up-sampling, because it keeps every cell
    apart: interpolation would let the zeros of hidden cells fade into visible ones.
    """

    def __init__(self, widths: Sequence[int], dim: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.norm = LayerNorm2d(dim)
        for projection in self.projections:
            trunc_normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, maps: Sequence[Tensor], norm: bool = True) -> Tensor:
        """maps, fine to coarse, [B, c, h, w] each -> [B, D, H, W] on the first's grid; norm=False: no LayerNorm."""
        size = maps[0].shape[-2:]
        x = self.projections[0](maps[0])
        for projection, stage in zip(self.projections[1:], maps[1:]):
            x = x + F.interpolate(projection(stage), size=size)
        return self.norm(x) if norm else x


def pooled_mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over positions, x [B, D, h, w] -> [B, D]; weight [B, 1, h, w] or None for all. All-zero weights give 0."""
    if weight is None:
        return x.mean((-2, -1))
    weight = weight.to(x.dtype)
    return (x * weight).sum((-2, -1)) / weight.sum((-2, -1)).clamp(min=1e-6)


def focus_weight(focus: Tensor, grid: tuple[int, int], size: Sequence[int]) -> Tensor:
    """Share of each position of the pooled map that is in focus: bool [B, N] on `grid` -> float [B, 1, *size]."""
    return F.adaptive_avg_pool2d(focus.unflatten(1, grid)[:, None].float(), tuple(size))


def visibility(ids: Tensor, cells: tuple[int, int]) -> Tensor:
    """1 at kept cells, 0 at hidden ones: ids int64 [B, K] -> float32 [B, 1, *cells]."""
    seen = torch.zeros(len(ids), math.prod(cells), device=ids.device)
    return seen.scatter(1, ids, 1.0).unflatten(1, cells)[:, None]


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Repeat every position `factor` times along both axes: [B, c, h, w] -> [B, c, h * factor, w * factor]."""
    return x if factor == 1 else x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def flat(x: Tensor) -> Tensor:
    """A map as tokens: [B, D, h, w] -> [B, h * w, D]."""
    return x.flatten(2).transpose(1, 2)
