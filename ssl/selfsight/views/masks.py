"""Masks with static shapes, drawn from each sample's key."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
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
    inside = rectangles(grid, top, left, height, width)  # [B, 16, C]
    number = torch.arange(16, device=key.device)[:, None]
    first = torch.where(inside, number, 16).amin(1)
    ranks = (first + u[:, 64:]).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts.reshape(b, 1)


def rectangles(grid: tuple[int, int], top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Which cells each rectangle covers: corners and sides [*] in cells -> bool [*, C]."""
    rows, columns = grid
    y = torch.arange(rows, device=top.device).repeat_interleave(columns)
    x = torch.arange(columns, device=top.device).repeat(rows)
    inside = (y >= top[..., None]) & (y < (top + height)[..., None])
    return inside & (x >= left[..., None]) & (x < (left + width)[..., None])


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


# --- I-JEPA's blocks -----------------------------------------------------------------------------------------------

Span = tuple[float, float]
LAYOUTS = 8  # drawn for each image at once; at the default sizes all but one in millions find one that fits


def block_shapes(
    grid: tuple[int, int], scale: Span, aspect: Span, most: int = 5
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """At most `most` (height, width) of a block that stand for all, the likeliest first, and shares that add up to 1.

    Area uniform in `scale` of the grid, height / width log-uniform in `aspect`, independent of each other, rounded to
    whole cells. Few shapes, because each is a shape of tensors in training: one after another the shape that leaves
    all others nearest to a chosen one (in the logarithms of the sides), with the share of those that it stands for.
    """
    points = (np.arange(64) + 0.5) / 64
    area = grid[0] * grid[1] * (scale[0] + points[:, None] * (scale[1] - scale[0]))
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** points
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, grid[0]).astype(int)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, grid[1]).astype(int)
    counts = Counter(zip(height.ravel().tolist(), width.ravel().tolist(), strict=True))
    found = sorted(counts)
    weight, sides = np.array([counts[shape] for shape in found], dtype=np.float64), np.log(found)
    apart = ((sides[:, None] - sides) ** 2).sum(-1)
    chosen, nearest = [], np.full(len(found), np.inf)
    while len(chosen) < min(most, len(found)):
        left = (weight[:, None] * np.minimum(nearest[:, None], apart)).sum(0)
        left[chosen] = np.inf
        chosen.append(int(left.argmin()))
        nearest = np.minimum(nearest, apart[:, chosen[-1]])
    shares = np.bincount(apart[:, chosen].argmin(1), weight, len(chosen)) / weight.sum()
    order = np.argsort(-shares, kind="stable")
    return [found[chosen[i]] for i in order], shares[order]


def least_context(grid: tuple[int, int], shapes: list[tuple[int, int]], scale: Span) -> int:
    """Cells of a context that `multiblock` can always find: the smallest block less one target, the largest."""
    side = max(1, round(math.sqrt(scale[0] * grid[0] * grid[1])))
    return min(side, grid[0]) * min(side, grid[1]) - max(h * w for h, w in shapes)


def multiblock(
    key: Tensor, grid: tuple[int, int], shape: tuple[int, int], keep: int, *, targets: int = 4, scale: Span = (0.85, 1)
) -> tuple[Tensor, Tensor]:
    """Target blocks of one shape and a context beside them: ids int64 [B, keep] and [B, targets, height * width].

    Any place on the grid is as likely as any other. The context is a random `keep` of what a square block (`scale` of
    the grid) has outside all targets. Of LAYOUTS drawings per image the first with that many counts; the last of them
    puts all targets in one place, so that `keep` up to `least_context` always works. key int64 [B].
    """
    (rows, columns), (height, width) = grid, shape
    per, cells = 2 * targets + 3, rows * columns
    u = uniform(key, "multiblock", LAYOUTS * per + cells)
    drawn, noise = u[:, : LAYOUTS * per].unflatten(1, (LAYOUTS, per)), u[:, LAYOUTS * per :]
    top = (drawn[..., :targets] * (rows - height + 1)).long()
    left = (drawn[..., targets : 2 * targets] * (columns - width + 1)).long()
    top[:, -1], left[:, -1] = top[:, -1, :1], left[:, -1, :1]
    area, down, across = drawn[..., 2 * targets :].unbind(-1)
    side = (cells * (scale[0] + area * (scale[1] - scale[0]))).sqrt().round()
    tall, wide = side.clamp(1, rows), side.clamp(1, columns)
    block = rectangles(grid, (down * (rows - tall + 1)).floor(), (across * (columns - wide + 1)).floor(), tall, wide)
    context = block & ~rectangles(grid, top, left, height, width).any(2)  # [B, LAYOUTS, C]
    enough = (context.sum(2) >= keep) * torch.arange(LAYOUTS, 0, -1, device=key.device)
    chosen = torch.arange(len(key), device=key.device), enough.argmax(1)
    order = (noise + (~context[chosen]).float()).argsort(dim=1, stable=True)
    y = torch.arange(height, device=key.device)[:, None]
    inner = (y * columns + torch.arange(width, device=key.device)).flatten()
    return order[:, :keep], (top[chosen] * columns + left[chosen])[..., None] + inner


def official_shape(number: float, grid: tuple[int, int], scale: Span, aspect: Span) -> tuple[int, int]:
    """A block's (height, width) in I-JEPA's reference: one number for area and aspect, sides below the grid's."""
    area = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    ratio = aspect[0] + number * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def official_shapes(
    step: int, grid: tuple[int, int], target: Span, aspect: Span, context: Span
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The reference's (height, width) of targets and of the context in its iteration `step`."""
    generator = torch.Generator().manual_seed(step)
    first, second = (torch.rand(1, generator=generator).item() for _ in range(2))
    return official_shape(first, grid, target, aspect), official_shape(second, grid, context, (1.0, 1.0))


def official_multiblock(
    batch: int,
    grid: tuple[int, int],
    shapes: tuple[tuple[int, int], tuple[int, int]],
    generator: torch.Generator,
    *,
    targets: int = 4,
    min_keep: int = 10,
) -> tuple[Tensor, Tensor]:
    """The reference's sampler, bit for bit: ids int64 [B, K] and [B, targets, Kt], on the CPU; for parity only.

    shapes: of targets and context. No block reaches the last row or column, and contexts are cut to the smallest of
    the batch by their first cells, so that they gather at the top. A context of `min_keep` cells or fewer is drawn
    again; every 20 times one target fewer is kept out of it. ValueError where a block itself is no larger than that.
    """
    if min(h * w for h, w in shapes) <= min_keep:
        raise ValueError(f"blocks of {shapes} cells are not larger than min_keep={min_keep}")

    def place(shape: tuple[int, int]) -> np.ndarray:
        top, left = (
            int(torch.randint(0, side - length, (1,), generator=generator)) for side, length in zip(grid, shape)
        )
        mask = np.zeros(grid, dtype=bool)
        mask[top : top + shape[0], left : left + shape[1]] = True
        return mask.ravel()

    def beside(blocks: list[np.ndarray]) -> np.ndarray:
        tries = 0
        while True:
            mask = place(shapes[1])
            for block in blocks[: max(0, targets - tries // 20)]:
                mask &= ~block
            if mask.sum() > min_keep:
                return np.flatnonzero(mask)
            tries += 1

    contexts, chosen = [], []
    for _ in range(batch):
        blocks = [place(shapes[0]) for _ in range(targets)]
        chosen.append(np.stack([np.flatnonzero(block) for block in blocks]))
        contexts.append(beside(blocks))
    keep = min(map(len, contexts))
    return torch.from_numpy(np.stack([c[:keep] for c in contexts])), torch.from_numpy(np.stack(chosen))
