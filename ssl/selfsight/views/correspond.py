"""Where the patches of one crop of an image lie in another crop of it, from the boxes of both (GLARE, UDI)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.losses import upcast


class Match(NamedTuple):
    """at: float [*, N, 2], where each patch lies in the other view, x and y, -1 and 1 at its borders.
    valid: bool [*, N], whether it lies inside."""

    at: Tensor
    valid: Tensor


def correspond(source: Tensor, target: Tensor, grid: tuple[int, int], *, corners: bool = False) -> Match:
    """Boxes [*, 4] (y0 x0 y1 x1; x0 > x1 if mirrored) of two views -> the source's patches in the target.

    A patch stands for its centre. corners: as UDI has it, the first and the last patch stand for the box's edges.
    """
    share = torch.stack(torch.meshgrid(*(_places(n, corners, source) for n in grid), indexing="ij"), -1).flatten(0, 1)
    start, end = source[..., None, :2], source[..., None, 2:]
    low, high = target[..., None, :2], target[..., None, 2:]
    inside = (start + share * (end - start) - low) / (high - low)  # [*, N, 2]: y, x in 0..1
    valid = ((inside > 0) & (inside < 1)).all(-1)
    return Match((2 * inside - 1).flip(-1), valid)


def _places(n: int, corners: bool, like: Tensor) -> Tensor:
    if corners:
        return torch.linspace(0, 1, n, device=like.device, dtype=like.dtype)
    return (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n


def sample(tokens: Tensor, match: Match, grid: tuple[int, int], *, corners: bool = False) -> Tensor:
    """The other view's tokens [R, N, D] at the places of a match [R, M]: bilinear, [R, M, D] in float32 or better.

    Places outside take the nearest patch; `match.valid` says which they are.
    """
    maps = upcast(tokens).transpose(1, 2).unflatten(2, grid)
    at = match.at[:, :, None].to(maps.dtype)
    found = F.grid_sample(maps, at, "bilinear", "border", align_corners=corners)
    return found[..., 0].transpose(1, 2)


def scattered(draws: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """One random patch in each of side x side equal parts of the grid: draws [*, 2 side^2] in 0..1 -> ids [*, side^2].
    A grid with fewer rows or columns than parts has as many parts as these."""
    parts = [min(side, n) for n in grid]
    u = draws[..., : 2 * math.prod(parts)].unflatten(-1, (2, *parts))
    edges = [torch.arange(k + 1, device=u.device) * n // k for k, n in zip(parts, grid)]
    start, size = [e[:-1] for e in edges], [e.diff() for e in edges]
    y = start[0][:, None] + (u[..., 0, :, :] * size[0][:, None]).long()
    x = start[1] + (u[..., 1, :, :] * size[1]).long()
    return (y * grid[1] + x).flatten(-2)


def regions(
    scores: Tensor, valid: Tensor, grid: tuple[int, int], count: int, window: int, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Windows of patches around where attention is highest: member bool [R, count, N], weight float [R, count].

    scores: [R, heads, N]; the heads take turns, each at the best patch that no window has taken yet. The last windows
    sit at random patches instead, one for each row of draws [R, k, N]. valid: bool [R, N], the patches that may be
    used; a window without any has weight 0.
    """
    scores = upcast(scores)  # draws in half precision would tie
    near = neighbourhood(grid, window, scores.device)  # [N, N]
    used, members = ~valid, []
    random = 0 if draws is None else draws.shape[1]
    for r in range(count):
        at_random = r - (count - random)
        row = scores[:, r % scores.shape[1]] if at_random < 0 else draws[:, at_random].to(scores.dtype)
        seed = row.masked_fill(used, -torch.inf).argmax(1)
        free = ~used.all(1)
        member = near[seed] & valid & free[:, None]
        used = used | member
        members.append(member)
    member = torch.stack(members, 1)
    return member, member.any(2).to(scores.dtype)


def neighbourhood(grid: tuple[int, int], window: int, device: torch.device | None = None) -> Tensor:
    """bool [N, N]: row i, the window x window patches around patch i (an even window has one more below and right)."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")

    def close(a: Tensor) -> Tensor:
        far = a.flatten()[None] - a.flatten()[:, None]
        return (far >= -((window - 1) // 2)) & (far <= window // 2)

    return close(y) & close(x)
