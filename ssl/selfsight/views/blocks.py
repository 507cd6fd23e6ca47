"""Where I-JEPA's context and target blocks lie in each image of a batch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..backbones.tokens import BackboneError
from ..data.rng import step_key, uniform
from . import masks

RANDOM_TARGET = 0.6  # share of the cells that is predicted where cells are drawn at random, as in CNN-JEPA


class Blocks:
    """Which cells are context and which are targets. The shape of the targets is one per step, of at most five.

    random_share: of the steps, in which context and the one target are cells at random (CNN-JEPA mixes these in).
    rule "official": the reference's sampler, whose masks depend on the batch (every process and micro-batch of a step
    draws the same places) and whose contexts change in size; for parity.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        rule: str = "unbiased",
        seed: int = 0,
        targets: int = 4,
        context_ratio: float = 0.3,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        random_share: float = 0.0,
    ):
        self.random_share = random_share
        self.grid, self.rule, self.seed, self.targets, self.min_keep = grid, rule, seed, targets, min_keep
        self.target_scale, self.target_aspect = tuple(target_scale), tuple(target_aspect)
        self.context_scale = tuple(context_scale)
        self.shapes, self.shares = masks.block_shapes(grid, self.target_scale, self.target_aspect)
        self.keep = round(context_ratio * math.prod(grid))
        if rule == "official" and random_share:
            raise BackboneError(
                f"objective.random_share={random_share:g} goes with objective.masking=unbiased: the reference's "
                "sampler draws blocks in every step; use 0"
            )
        if rule == "official":
            self._refuse_endless_search()
        else:
            self._refuse_contexts_that_may_not_be_there(context_ratio)

    def _refuse_contexts_that_may_not_be_there(self, ratio: float) -> None:
        most, cells = masks.least_context(self.grid, self.shapes, self.context_scale), math.prod(self.grid)
        if most < 1:
            raise BackboneError(
                f"objective.target_scale={list(self.target_scale)} may leave no context on a grid of {self.grid[0]} x "
                f"{self.grid[1]}; use smaller targets, the default is [0.15, 0.2]"
            )
        if not 1 <= self.keep <= most:
            raise BackboneError(
                f"objective.context_ratio={ratio} is a context of {self.keep} of {cells} cells, and 1 to {most} are "
                f"sure to be found beside the targets; use a ratio from {math.ceil(100 / cells) / 100:g} to "
                f"{math.floor(100 * most / cells) / 100:g}"
            )

    def _refuse_endless_search(self) -> None:
        """The reference draws again while a block has `min_keep` cells or fewer, however small blocks are."""
        spans = (self.target_scale, self.target_aspect), (self.context_scale, (1.0, 1.0))
        shapes = [masks.official_shape(u, self.grid, *span) for u in np.linspace(0, 1, 2001) for span in spans]
        least = min(h * w for h, w in shapes)
        if least <= self.min_keep:
            raise BackboneError(
                f"objective.masking=official draws blocks of {least} cells on a grid of {self.grid[0]} x "
                f"{self.grid[1]} and wants more than objective.min_keep={self.min_keep}, which it would search for "
                f"without end; use objective.min_keep={max(0, least - 1)}, larger images or objective.masking=unbiased"
            )

    def __call__(self, key: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Keys int64 [B] -> ids of the context [B, K] and of the targets [B, targets, Kt], int64."""
        common = step_key(self.seed, step)
        if self.rule == "official":
            spans = self.target_scale, self.target_aspect, self.context_scale
            shapes = masks.official_shapes(step, self.grid, *spans)
            generator = torch.Generator().manual_seed(common)
            drawn = masks.official_multiblock(
                len(key), self.grid, shapes, generator, targets=self.targets, min_keep=self.min_keep
            )
            return drawn[0].to(key.device), drawn[1].to(key.device)
        if uniform(np.array([common]), "random_cells", 1).item() < self.random_share:
            context, others = masks.random_split(key, math.prod(self.grid), self.keep, "random_cells")
            return context, others[:, None, : round(RANDOM_TARGET * math.prod(self.grid))]
        number = uniform(np.array([common]), "block_shape", 1).item()  # on the host: it decides the shape of tensors
        shape = self.shapes[min(int(np.searchsorted(self.shares.cumsum(), number)), len(self.shapes) - 1)]
        return masks.multiblock(key, self.grid, shape, self.keep, targets=self.targets, scale=self.context_scale)
