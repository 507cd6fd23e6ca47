"""Masks with static shapes, drawn from each sample's key."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.rng import uniform


def random_split(key: Tensor, cells: int, keep: int, purpose: str = "mask") -> tuple[Tensor, Tensor]:
    """Split the cells of every image at random: key int64 [B] -> kept ids [B, keep], hidden ids [B, cells - keep].

    As in MAE: sort uniform noise, keep the smallest (ids stay in shuffled order). The sort is stable, so that equal
    noise gives the same mask on every device.
    """
    return split_by_noise(uniform(key, purpose, cells), keep)


def split_by_noise(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Ids of the `keep` smallest and of the other numbers of each row: [B, C] -> [B, keep], [B, C - keep]."""
    order = noise.argsort(dim=1, stable=True)
    return order[:, :keep], order[:, keep:]


def block_mask(key: Tensor, grid: tuple[int, int], counts: Tensor, purpose: str = "block_mask") -> Tensor:
    """Block-wise masks with exactly counts[b] hidden cells and no loop: bool [B, C], True = hidden.

    16 rectangles per image (4 cells to half of the grid, aspect 0.3 to 1 / 0.3, as BEiT draws them); a cell's score is
    the number of the first rectangle that covers it (16 if none) plus noise; the counts[b] smallest scores are hidden.
    key int64 [B], counts int64 [B].
    """
    rows, columns = grid
    total, b = rows * columns, len(key)
    u = uniform(key, purpose, 16 * 4 + total)
    area, aspect, top, left = u[:, :64].unflatten(1, (4, 16)).unbind(1)
    area = 4 + area * max(0, total / 2 - 4)
    log_ratio = torch.log(torch.tensor(1 / 0.3, device=key.device))
    ratio = torch.exp((2 * aspect - 1) * log_ratio)
    height = (area * ratio).sqrt().round().clamp(1, rows)
    width = (area / ratio).sqrt().round().clamp(1, columns)
    top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
    y = torch.arange(rows, device=key.device).repeat_interleave(columns)
    x = torch.arange(columns, device=key.device).repeat(rows)
    inside = (y >= top[..., None]) & (y < (top + height)[..., None])
    inside &= (x >= left[..., None]) & (x < (left + width)[..., None])  # [B, 16, C]
    number = torch.arange(16, device=key.device)[:, None]
    first = torch.where(inside, number, 16).amin(1)
    ranks = (first + u[:, 64:]).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts.reshape(b, 1)


def stratified_counts(
    step_key: int, rows: Tensor, total: int, cells: int, share: float, ratio: tuple[float, float]
) -> Tensor:
    """How many cells each view hides: rows int64 [*] of `total` rows of the global batch -> int64 [*].

    Exactly the `share` of all rows is masked, with ratios evenly spread over `ratio` (the upper ends of equal bins, as
    DINOv3 does), dealt out by a permutation keyed by the step. Each process computes the whole deal and takes its rows.
    """
    masked = round(share * total)
    ends = ratio[0] + (ratio[1] - ratio[0]) * torch.arange(1, masked + 1, device=rows.device) / max(1, masked)
    counts = torch.cat([(cells * ends + 1e-4).long(), ends.new_zeros(total - masked, dtype=torch.int64)])
    key = torch.full((1,), step_key, dtype=torch.int64, device=rows.device)
    deal = uniform(key, "mask_ratio", total)[0].argsort(stable=True)
    return counts[deal][rows]


def independent_counts(key: Tensor, views: int, cells: int, share: float, ratio: tuple[float, float]) -> Tensor:
    """iBOT's own rule: each view is masked with probability `share`, by a ratio uniform in `ratio`: [views, B]."""
    u = uniform(key, "mask_ratio", 2 * views).T
    counts = (cells * (ratio[0] + (ratio[1] - ratio[0]) * u[views:])).long()
    return torch.where(u[:views] < share, counts, 0)


def random_mask(key: Tensor, cells: int, counts: Tensor, purpose: str = "random_mask") -> Tensor:
    """Single cells at random, exactly counts[b] of them: bool [B, C], True = hidden."""
    ranks = uniform(key, purpose, cells).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts.reshape(len(key), 1)


def slots(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Hidden ids padded to a constant number: mask bool [B, C] -> ids int64 [B, size], weight float [B, size].

    Row-major order; padding has weight 0 (and repeats visible cells, so that every id is valid).
    """
    ids = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    return ids, mask.gather(1, ids).float()


def drop_table(key: Tensor, kind: str, count: int, depth: int, rate: float) -> Tensor | None:
    """Stochastic depth (Huang et al., 2016) of `count` views per image: float [2 * depth, count * B], None at rate 0.

    Factors of the residual branches, 0 or 1 / (1 - rate of the block), the rate rising linearly to `rate` at the last
    block; two rows per block. key int64 [B]; columns are crop-major.
    """
    if rate == 0:
        return None
    u = uniform(key, f"drop_path/{kind}", count * 2 * depth).unflatten(1, (count, 2 * depth))
    rates = torch.linspace(0, rate, depth, device=key.device).repeat_interleave(2)
    return ((u >= rates) / (1 - rates)).permute(2, 1, 0).flatten(1)
