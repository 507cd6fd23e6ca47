"""Object proposals without annotations: normalised cuts of an image's own patch features, one object after another.

MaskCut (Wang et al., CutLER, CVPR 2023, arXiv:2301.11320), which repeats TokenCut's single cut (Wang et al., CVPR 2022,
arXiv:2202.11539; Shi and Malik's normalised cut). Per image and round:

1. patches are nodes, joined where the cosine of their features exceeds tau (weight 1, else 1e-5);
2. the second smallest generalised eigenvector of (D - A) x = lambda D x splits them at its mean;
3. the object's side is the one of the strongest entry, unless it holds three of the image's corners;
4. the object is the connected part of that side around its strongest patch; its patches lose their features, and the
   next round looks for another one.

Shapes: B images, N = h * w patches in row-major order, D feature channels, R rounds. Nothing here knows about models,
files or randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WEAK = 1e-5  # weight of patches that are not alike; keeps the graph connected
OVERLAP = 0.5  # IoU with an earlier object from which a find is that object again
FLAT = 1e-6  # second eigenvalue of the random walk below which every patch is like every other: nothing to cut


class Proposals(NamedTuple):
    """masks: bool [B, R, h, w], disjoint, in the order they were found; empty from the round on that found nothing.
    vectors: float64 [B, R, h, w], the eigenvector of each round (the sign is arbitrary), 0 where none was needed."""

    masks: Tensor
    vectors: Tensor


def affinity(features: Tensor, tau: float) -> Tensor:
    """[B, N, D] -> float64 [B, N, N]: 1 where the cosine of two patches exceeds tau, else 1e-5 (also for zeros)."""
    x = F.normalize(features.double(), dim=-1)
    return torch.where(x @ x.mT > tau, 1.0, WEAK).double()


def second_vector(graph: Tensor) -> tuple[Tensor, Tensor]:
    """The generalised eigenvector that cuts: float64 [B, N], and bool [B], whether there is anything to cut.

    Solved as the ordinary problem of D^-1/2 A D^-1/2, in float64: weights span five orders of magnitude. The result
    has x' D x = 1. graph: symmetric positive weights [B, N, N], N >= 2.
    """
    scale = graph.sum(-1).rsqrt()
    values, vectors = torch.linalg.eigh(graph * scale[:, :, None] * scale[:, None, :])
    return vectors[..., -2] * scale, values[..., -2] > FLAT


def object_side(vector: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The side of the cut that is an object, bool [B, N], and its strongest patch, int64 [B]; the sign plays no part.

    vector: [B, N]. An object seldom fills three corners of an image, what surrounds it does.
    """
    strongest = vector.abs().argmax(-1, keepdim=True)
    vector = vector * vector.gather(-1, strongest).sign()
    side = vector > vector.mean(-1, keepdim=True)
    corners = side.view(-1, *grid)[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(-1)
    other = (corners >= 3)[:, None]
    return side ^ other, torch.where(other, -vector, vector).argmax(-1)


def component(side: Tensor, seed: Tensor) -> Tensor:
    """The part of each mask that is connected (by edges, not corners) with its seed.

    side: bool [B, h, w]; seed: int64 [B], row-major, on the mask. Returns bool [B, h, w].
    """
    part = torch.zeros_like(side)
    part.view(len(side), -1).scatter_(1, seed[:, None], True)
    part &= side
    while True:
        grown = part.clone()
        grown[:, 1:] |= part[:, :-1]
        grown[:, :-1] |= part[:, 1:]
        grown[:, :, 1:] |= part[:, :, :-1]
        grown[:, :, :-1] |= part[:, :, 1:]
        grown &= side
        if torch.equal(grown, part):
            return part
        part = grown


def overlap(found: Tensor, earlier: Tensor) -> Tensor:
    """Largest IoU of bool [B, N] with any of bool [B, r, N]: float [B], 0 for r = 0 and for empty masks."""
    if not earlier.shape[1]:
        return torch.zeros(len(found), device=found.device)
    both = (found[:, None] & earlier).sum(-1)
    either = (found[:, None] | earlier).sum(-1)
    return (both / either.clamp(min=1)).amax(1)


def maskcut(
    features: Tensor, grid: tuple[int, int], *, objects: int = 3, tau: float = 0.15, min_area: float = 0.01
) -> Proposals:
    """Up to `objects` disjoint masks per image from patch features [B, h * w, D], any float type, on any device.

    tau: cosine above which two patches belong together. min_area: share of the patches that an object must exceed.
    An image ends with the first round that finds nothing new: its graph would not change any more.
    ValueError if the features do not fill the grid or are not finite.
    """
    b, n, _ = features.shape
    h, w = grid
    if n != h * w:
        raise ValueError(f"{n} patches do not fill a grid of {h} x {w}")
    if not features.isfinite().all():
        raise ValueError("the features are not finite")
    masks = torch.zeros(b, objects, n, dtype=torch.bool, device=features.device)
    vectors = torch.zeros(b, objects, n, dtype=torch.float64, device=features.device)
    live = torch.arange(b if n > 1 else 0, device=features.device)
    for r in range(objects):
        if not len(live):
            break
        earlier = masks[live, :r]
        free = ~earlier.any(1)
        vector, cuttable = second_vector(affinity(features[live] * free[..., None], tau))
        side, seed = object_side(vector, grid)
        found = component(side.view(-1, h, w), seed).flatten(1)
        new = found & free
        good = cuttable & (overlap(found, earlier) <= OVERLAP) & (new.sum(1) > min_area * n)
        vectors[live, r], masks[live, r] = vector, new & good[:, None]
        live = live[good]
    return Proposals(masks.view(b, objects, h, w), vectors.view(b, objects, h, w))


def label_map(masks: Tensor) -> Tensor:
    """Disjoint masks bool [B, R, h, w] -> uint8 [B, h, w]: 0 = none, 1.. in the order of the rounds."""
    ids = torch.arange(1, masks.shape[1] + 1, dtype=torch.uint8, device=masks.device)
    return (masks * ids[:, None, None]).sum(1, dtype=torch.uint8)


# ---- against known objects -----------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """IoU of proposals with the known objects of one image, the best match in each case: of the first proposal, of
    any proposal, and of the centred square of 40 % of the image, which any method should beat."""

    first: float
    best: float
    centre: float


def agreement(labels: np.ndarray, truth: np.ndarray) -> Agreement | None:
    """Compare two maps of object ids, [h, w] and [H, W] (0 = none; nearest neighbour where they differ in size).

    None where nothing is known: `truth` without objects.
    """
    known = [truth == i for i in np.unique(truth) if i]
    if not known:
        return None
    labels = resize_ids(labels, truth.shape)
    found = [_best_iou(labels == i, known) for i in range(1, int(labels.max()) + 1)]
    return Agreement(found[0] if found else 0.0, max(found, default=0.0), _best_iou(_centre(truth.shape), known))


def resize_ids(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ids [h, w] at another (height, width), nearest neighbour."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, size))
    return labels[rows[:, None], columns]


def _best_iou(mask: np.ndarray, known: Sequence[np.ndarray]) -> float:
    return max(float((mask & one).sum() / max(1, (mask | one).sum())) for one in known)


def _centre(size: tuple[int, int], share: float = 0.4) -> np.ndarray:
    rows, columns = (np.abs((np.arange(n) + 0.5) / n - 0.5) < share**0.5 / 2 for n in size)
    return rows[:, None] & columns
