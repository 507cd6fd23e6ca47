"""Linear CKA between layers, from batches (Nguyen, Raghu & Kornblith, ICLR 2021): 1 = the same up to rotation, scale.

The features of a layer are all its patch tokens, image by image in one long row. Each batch gives the unbiased HSIC
(Song et al., JMLR 2012) of every pair of layers; their means over batches make the ratio, so that memory does not grow
with the images and the result does not depend on the size of batches, but for noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_BATCH = 4  # the unbiased estimator divides by n - 3


def gram(patches: Tensor) -> Tensor:
    """Inner products between the images of a batch, patches [B, N, D] -> float64 [B, B] on the CPU."""
    rows = patches.detach().float().flatten(1)
    rows = rows - rows.mean(0)  # HSIC does not see it, and float32 sums are better without a large mean
    return (rows @ rows.T).cpu().double()


def hsic(left: Tensor, right: Tensor) -> Tensor:
    """Unbiased HSIC of every pair: Gram matrices [L, n, n] and [R, n, n] -> [L, R]."""
    n = left.shape[-1]
    off = 1 - torch.eye(n, dtype=left.dtype)
    k, m = left * off, right * off
    k_rows, m_rows = k.sum(-1), m.sum(-1)
    both = k.flatten(1) @ m.flatten(1).T
    means = torch.outer(k_rows.sum(-1), m_rows.sum(-1)) / ((n - 1) * (n - 2))
    return (both + means - 2 / (n - 2) * k_rows @ m_rows.T) / (n * (n - 3))


class CKA:
    """CKA between the layers of two models, or of one with itself."""

    def __init__(self) -> None:
        self.cross = self.left = self.right = 0.0

    def update(self, left: Tensor, right: Tensor) -> None:
        """Gram matrices of one batch of images, [L, n, n] and [R, n, n]; a batch of fewer than 4 is left out."""
        n = left.shape[-1]
        if n < MIN_BATCH:
            return
        self.cross = self.cross + n * hsic(left, right)
        self.left = self.left + n * hsic(left, left).diagonal()
        self.right = self.right + n * hsic(right, right).diagonal()

    def matrix(self) -> list[list[float | None]]:
        """[L][R], None where a layer does not vary between images."""
        left, right = self.left[:, None].clamp(min=0), self.right[None].clamp(min=0)
        found = torch.where(left * right > 0, self.cross / (left * right).sqrt(), torch.nan)
        return [[None if value != value else value for value in row] for row in found.tolist()]
