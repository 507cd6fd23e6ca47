"""Fixed sin-cos position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(dim: int, rows: int, columns: int, prefix: int = 0) -> Tensor:
    """MAE's table, float32 [prefix + rows * columns, dim], row-major, zero rows for prefix tokens.

    With w_i = 10000^(-i / (dim/4)), a coordinate t becomes [sin(t w_0) .., cos(t w_0) ..]. The first half of the
    channels encodes the *column*, the second half the row, as in the released weights. Computed in float64.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )

    def axis(t: Tensor) -> Tensor:
        angle = t.flatten()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    table = torch.cat([axis(column), axis(row)], dim=1)
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), table]).float()
