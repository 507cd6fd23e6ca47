"""Where crops lie: boxes of one image, drawn from its key.

`u(purpose, n)` gives n uniform float32 numbers of the sample at hand (`data.rng.uniform` bound to its key). Runs per
sample in loader workers, so everything is a handful of small numpy operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import log
from typing import Any

import numpy as np

from .spec import Crop

Uniform = Callable[[str, int], np.ndarray]
_TRIES = 10  # as torchvision's RandomResizedCrop
_DRAWS = 2 * _TRIES + 2  # per crop: areas, ratios, and where the box lies


def independent(
    u: Uniform, crops: Sequence[Crop], height: int, width: int, sample: Any = None
) -> dict[str, np.ndarray]:
    """Random resized crops, each drawn on its own: float32 [count, 4] per kind, y0 x0 y1 x1 in whole pixels.

    The rule of torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842): the share of the area is uniform in
    `scale`, the ratio width / height log-uniform in `ratio`; the first of ten tries that fits, else the largest
    centred box with an allowed ratio. `sample` is for placements that look at objects.
    """
    low, span = _ranges(tuple(crops))
    # All kinds at once, and float64: a rounding difference between machines' exp then hardly ever crosses a pixel.
    draws = u("place", len(low) * _DRAWS).reshape(-1, _DRAWS).astype(np.float64)
    drawn = low + span * draws[:, : 2 * _TRIES]
    side = np.sqrt(drawn[:, :_TRIES] * (height * width))
    root = np.exp(drawn[:, _TRIES:])
    rows, columns = np.rint(side / root), np.rint(side * root)
    fits = (np.minimum(rows, columns) >= 1) & (rows <= height) & (columns <= width)
    chosen = np.arange(len(low)), fits.argmax(axis=1)
    boxes = np.empty((len(low), 4), dtype=np.float32)
    for axis, (extents, limit) in enumerate(((rows, height), (columns, width))):
        extent = extents[chosen]
        boxes[:, axis] = start = np.floor(draws[:, 2 * _TRIES + axis] * (limit - extent + 1))
        boxes[:, axis + 2] = start + extent
    missed = ~fits[chosen]
    if missed.any():
        centred = np.array([_fallback(crop, height, width) for crop in crops for _ in range(crop.count)])
        boxes[missed] = centred[missed]
    ends = np.cumsum([crop.count for crop in crops])
    return {crop.name: boxes[end - crop.count : end] for crop, end in zip(crops, ends)}


@lru_cache(maxsize=64)
def _ranges(crops: tuple[Crop, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Low end and span of each crop's tries, float64 [crops, 2 * tries]: area shares, then half the log of ratios."""
    low, high = [], []
    for crop in crops:
        ratios = log(crop.ratio[0]) / 2, log(crop.ratio[1]) / 2
        low += [[crop.scale[0]] * _TRIES + [ratios[0]] * _TRIES] * crop.count
        high += [[crop.scale[1]] * _TRIES + [ratios[1]] * _TRIES] * crop.count
    return np.array(low), np.array(high) - np.array(low)


def _fallback(crop: Crop, height: int, width: int) -> np.ndarray:
    """The largest centred box whose ratio is allowed: float32 [4]."""
    low, high = crop.ratio
    columns = min(width, max(1, round(height * high)))
    rows = min(height, max(1, round(width / low)))
    y0, x0 = (height - rows) // 2, (width - columns) // 2
    return np.array([y0, x0, y0 + rows, x0 + columns], dtype=np.float32)
