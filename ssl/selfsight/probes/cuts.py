"""How an image is cut for a frozen backbone: one or several square crops of every sample, uint8, never augmented."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.decode import center_box, crop_reduction, cut, decode, size_of
from ..data.source import Raw

ROTATIONS = 4


class Cut(NamedTuple):
    """kind: "center" (one square, `crop_pct` of the shorter side), "rotations" (that square turned by 0, 90, 180 and
    270 degrees), "whole" (the image squashed to a square) or "windows" (squares that slide along the longer side).

    size: pixels of a crop, and the shorter side at which windows slide. stride: of windows, in the same pixels.
    """

    kind: str
    size: int
    crop_pct: float = 1.0
    channels: int = 3
    stride: int = 0


def windows(cut: Cut, height: int, width: int) -> np.ndarray:
    """Boxes [v, 4] (y0 x0 y1 x1) of a cut's crops in a height x width image, float32; windows: the last one at the
    border, so that all is seen."""
    if cut.kind == "whole":
        return np.array([[0, 0, height, width]], dtype=np.float32)
    if cut.kind != "windows":
        return center_box(height, width, cut.crop_pct)[None]
    side = min(height, width)
    longer = max(cut.size, round(max(height, width) * cut.size / side))
    count = math.ceil((longer - cut.size) / cut.stride) + 1
    starts = np.minimum(np.arange(count) * cut.stride, longer - cut.size) * (max(height, width) / longer)
    starts = np.minimum(starts, max(height, width) - side)
    zeros = np.zeros_like(starts)
    y0, x0 = (starts, zeros) if height > width else (zeros, starts)
    return np.stack([y0, x0, y0 + side, x0 + side], axis=1).astype(np.float32)


def crops(raw: Raw, how: Cut) -> Tensor:
    """The crops of a sample, uint8 [v, c, size, size]; decoded once, a JPEG at the smallest size that serves."""
    height, width = size_of(raw.image, raw.where)
    boxes = windows(how, height, width)
    need = crop_reduction(boxes, [how.size] * len(boxes), height, width)
    image, factor = decode(raw.image, raw.where, at_least=need, channels=how.channels)
    if how.kind in ("center", "rotations"):
        square = cut(image, center_box(*image.shape[:2], how.crop_pct), how.size)
        turned = [torch.rot90(square, k, (1, 2)) for k in range(ROTATIONS if how.kind == "rotations" else 1)]
        return torch.stack(turned)
    return torch.stack([cut(image, _inside(box / factor, *image.shape[:2]), how.size) for box in boxes])


def _inside(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A box on whole pixels of the decoded image."""
    return np.clip(np.rint(box), 0, [height, width, height, width])
