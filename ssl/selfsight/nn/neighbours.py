"""The most similar of the patches around every patch, on a grid of any size (SelfPatch, section 3.2; DMT-JEPA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import full_precision, upcast


@torch.no_grad()
def top_neighbours(
    tokens: Tensor, grid: tuple[int, int], k: int, *, window: int = 3, border: str = "clip", include_self: bool = False
) -> tuple[Tensor, Tensor]:
    """tokens [B, N, D], N = rows * columns -> ids int64 [B, N, k] by falling cosine similarity, valid bool [B, N, k].

    The window's centre is its own neighbour (the first) only with include_self. border "clip": cells outside are not
    valid, so a corner has 3 valid ones of 8; "wrap": the grid is a torus, as SelfPatch's reference has it. Shifted
    copies of the map are compared one by one, so no [B, N, window^2, D] tensor is made; similarities are float32 (half
    precision ties).
    """
    rows, columns = grid
    row = torch.arange(rows, device=tokens.device)[:, None]
    column = torch.arange(columns, device=tokens.device)[None, :]
    reach = window // 2
    shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    if not include_self:
        shifts.remove((0, 0))
    similarity, ids, valid = [], [], []
    with full_precision(tokens):
        x = F.normalize(upcast(tokens), dim=-1).unflatten(1, grid)
        for dy, dx in shifts:
            similarity.append((x * x.roll((-dy, -dx), (1, 2))).sum(-1).flatten(1))
            y, z = row + dy, column + dx
            ids.append(((y % rows) * columns + z % columns).flatten())
            inside = (y >= 0) & (y < rows) & (z >= 0) & (z < columns)
            valid.append((inside if border == "clip" else torch.ones_like(inside)).flatten())
    ids, valid = torch.stack(ids, -1), torch.stack(valid, -1)  # [N, shifts]
    scores = torch.stack(similarity, -1).masked_fill(~valid, float("-inf"))
    best = scores.topk(min(k, len(shifts)), dim=-1).indices
    shape = len(tokens), -1, -1
    return ids.expand(shape).gather(2, best), valid.expand(shape).gather(2, best)
