"""Patch-level augmentation: some patches of a view altered, the others as they are (GLARE's local consistency)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.rng import uniform
from . import photo

KINDS = ("blur", "noise", "gray", "shuffle")  # "mask" is the backbone's own mask token


def alter(kind: str, images: Tensor, mask: Tensor, key: Tensor, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised views [n, B, c, s, s], mask bool [n, B, h, w] of patches of `patch` pixels -> the same views, altered
    where the mask is true. Everything random is drawn from the keys, int64 [B]."""
    altered = torch.stack([_ALTER[kind](x, key, f"{kind}/{v}", patch, mean, std) for v, x in enumerate(images)])
    return torch.where(pixels(mask, patch, images.shape[-1]), altered, images)


def pixels(mask: Tensor, patch: int, size: int) -> Tensor:
    """Patches [n, B, h, w] to pixels [n, B, 1, size, size]."""
    return mask.repeat_interleave(patch, -1).repeat_interleave(patch, -2)[..., None, :size, :size]


def _blur(x: Tensor, key: Tensor, purpose: str, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """The whole view blurred, so that patches have no seams inside; sigma 2 to 4 pixels for patches of 16."""
    sigma = (2 + 2 * uniform(key, purpose, 1)[:, 0]) * (patch / 16)
    return photo.blur(x, sigma, min(max(3, 13 * patch // 16 | 1), 2 * x.shape[-1] - 1))


def _noise(x: Tensor, key: Tensor, purpose: str, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """Uniform noise of the images' own variance (they are normalised) added to every value."""
    return x + (12**0.5 * (uniform(key, purpose, x[0].numel()) - 0.5)).view_as(x).to(x.dtype)


def _gray(x: Tensor, key: Tensor, purpose: str, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    mean, std = mean[:, None, None], std[:, None, None]
    return (photo.to_gray(x * std + mean) - mean) / std


def _shuffle(x: Tensor, key: Tensor, purpose: str, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    """The pixels of each patch in a random order, the same order for all patches of a view."""
    order = uniform(key, purpose, patch * patch).argsort(dim=1, stable=True)
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    whole = x[..., : rows * patch, : columns * patch]  # what is left of an incomplete patch stays
    cut = whole.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch)).transpose(-3, -2).flatten(-2)
    index = order[:, None, None, None].expand_as(cut)
    mixed = cut.gather(-1, index).unflatten(-1, (patch, patch)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    out = x.clone()
    out[..., : rows * patch, : columns * patch] = mixed
    return out


_ALTER = {"blur": _blur, "noise": _noise, "gray": _gray, "shuffle": _shuffle}
