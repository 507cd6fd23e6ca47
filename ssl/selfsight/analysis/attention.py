"""What the heads of a block look at: distance, entropy, NMI, and how alike the heads are.

Definitions as in Park et al., ICLR 2023 ("What do self-supervised vision transformers learn?"): among patches only;
class token and registers are left out and rows renormalised. Averages are over queries, then images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def patch_distances(grid: tuple[int, int], patch: float) -> Tensor:
    """Distance in pixels between the centres of patches, [N, N]."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).float()
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist") * patch


def among_patches(weights: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Weights [B, h, n, n] over all tokens -> (rows over patches alone, renormalised, [B, h, N, N]; the share of
    attention that went to the prefix tokens, [B, h])."""
    inner = weights[:, :, prefix:, prefix:]
    mass = inner.sum(-1, keepdim=True)
    return inner / mass.clamp(min=1e-12), 1 - mass.mean((-2, -1))


def mean_distance(weights: Tensor, distances: Tensor) -> Tensor:
    """sum_k A_qk |pos_q - pos_k|, mean over queries: [B, h, N, N] -> [B, h], in the unit of the distances [N, N]."""
    return torch.einsum("bhqk,qk->bh", weights, distances) / weights.shape[-2]


def entropy_and_nmi(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of rows in nats, and normalised mutual information of query and key place, [B, h, N, N] -> [B, h] each.

    With p(q) = 1/N and p(k) = mean_q A_qk: I(q; k) = H(k) - mean_q H(A_q), NMI = I / sqrt(H(q) H(k)). 0: all queries
    look at the same places; 1: each looks at a place of its own.
    """
    rows = torch.special.entr(weights).sum(-1).mean(-1)
    marginal = torch.special.entr(weights.mean(-2)).sum(-1)
    shared = (marginal - rows).clamp(min=0)
    return rows, shared / (math.log(weights.shape[-1]) * marginal).sqrt().clamp(min=1e-6)


def head_cosine(weights: Tensor) -> Tensor:
    """Mean cosine between the maps of different heads, [B, h, N, N] -> [B]; nan for a single head. 1: all the same."""
    heads = weights.shape[1]
    unit = torch.nn.functional.normalize(weights.flatten(2), dim=-1)
    alike = unit @ unit.mT
    return (alike.sum((-2, -1)) - heads) / (heads * (heads - 1)) if heads > 1 else alike[:, 0, 0] * math.nan


class AttentionStats:
    """Sums over the images seen so far; `update` with any number of images at a time."""

    def __init__(self, grid: tuple[int, int], patch: float, prefix: int):
        self.distances, self.prefix, self.images = patch_distances(grid, patch), prefix, 0
        self.sums: dict[str, Tensor] = {}

    def update(self, weights: Tensor) -> None:
        """weights: [b, h, n, n] over all tokens, prefix first."""
        inner, away = among_patches(weights.float(), self.prefix)
        self.distances = self.distances.to(inner.device)
        entropy, nmi = entropy_and_nmi(inner)
        found = {"distance": mean_distance(inner, self.distances), "entropy": entropy, "nmi": nmi, "to_prefix": away,
                 "head_cosine": head_cosine(inner)}  # fmt: skip
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.sum(0).cpu().double()
        self.images += len(weights)

    def result(self) -> dict[str, Any]:
        """distance (px), entropy (nats), nmi, to_prefix: a list over heads each; head_cosine: one number."""
        return {name: (total / self.images).tolist() for name, total in self.sums.items()}
