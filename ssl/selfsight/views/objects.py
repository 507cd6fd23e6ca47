"""Which patches of a crop show the chosen object: exact areas of an id map inside any windows.

An id map covers the whole image at its own resolution, so a patch edge may fall between two of its pixels. Areas are
therefore differences of an integral image that is interpolated linearly between its points, which is exact for a map
of constant pixels. Integer sums and elementwise float64 arithmetic only: the same bits on every machine.
"""

from __future__ import annotations

import numpy as np

from .spec import Cells

TOUCH = 1e-6  # map pixels: less than this is rounding, not area


class Region:
    """One object of an id map: area (`size`) and bounding box (`top`, `bottom`, `left`, `right`) in map pixels."""

    def __init__(self, ids: np.ndarray, number: int):
        """ids: [h, w]; number must occur in it."""
        self.shape = ids.shape
        mask = ids == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        self.top, self.bottom = int(rows[0]), int(rows[-1]) + 1
        self.left, self.right = int(columns[0]), int(columns[-1]) + 1
        sums = np.zeros((self.bottom - self.top + 1, self.right - self.left + 1))  # whole numbers, so exact
        sums[1:, 1:] = mask[self.top : self.bottom, self.left : self.right]
        self._sums = sums.cumsum(axis=0).cumsum(axis=1)
        self.size = int(self._sums[-1, -1])

    def areas(self, ys: np.ndarray, rows: float, xs: np.ndarray, columns: float) -> np.ndarray:
        """Area of the object in windows of one size, by where they start: float64 [n], [m] -> [n, m] (map pixels)."""
        sums = _differences(self._sums, ys - self.top, rows)
        return _differences(np.ascontiguousarray(sums.T), xs - self.left, columns).T

    def area(self, box: np.ndarray, height: int, width: int) -> float:
        """Area of the object (map pixels) in a box y0 x0 y1 x1 of the height x width image."""
        y0, x0, y1, x1 = self.on_map(box, height, width)
        return float(self.areas(np.array([y0]), y1 - y0, np.array([x0]), x1 - x0)[0, 0])

    def on_map(self, box: np.ndarray, height: int, width: int) -> tuple[float, float, float, float]:
        """A box in pixels of the image in pixels of the map."""
        (rows, columns), (y0, x0, y1, x1) = self.shape, box.tolist()
        return y0 * rows / height, x0 * columns / width, y1 * rows / height, x1 * columns / width


def _differences(sums: np.ndarray, starts: np.ndarray, extent: float) -> np.ndarray:
    """Rows of an integral image at starts + extent minus rows at starts, interpolated: [r, c], [n] -> [n, c]."""
    n, last = len(starts), len(sums) - 1
    at = np.concatenate([starts, starts + extent])
    at = np.minimum(np.maximum(at, 0), last)
    below = at.astype(np.int64)
    rows, part = sums.take(below, axis=0), (at - below)[:, None]
    if part.any():  # a map as large as the image needs no interpolation
        rows *= 1 - part
        rows += sums.take(np.minimum(below + 1, last), axis=0) * part
    return rows[n:] - rows[:n]


def patches(region: Region, box: np.ndarray, height: int, width: int, cells: Cells) -> np.ndarray:
    """Patches of a crop that belong to the object: uint8 [h, w] of `cells.grid`, all 0 if the crop shows none of it.

    box: y0 x0 y1 x1 in pixels of the height x width image. A patch is on if the object covers at least
    `cells.threshold` of it (shape "exact") or any of it ("box", where each group of neighbouring patches then becomes
    a rectangle). If the crop shows the object and no patch is on, the one with the largest area is.
    """
    y0, x0, y1, x1 = region.on_map(box, height, width)
    rows, columns = (y1 - y0) / cells.grid[0], (x1 - x0) / cells.grid[1]
    areas = region.areas(y0 + rows * np.arange(cells.grid[0]), rows, x0 + columns * np.arange(cells.grid[1]), columns)
    on = areas > TOUCH
    if not on.any():
        return np.zeros(cells.grid, np.uint8)
    if cells.shape == "exact":
        on &= areas >= cells.threshold * rows * columns - TOUCH
        if not on.any():
            on.flat[areas.argmax()] = True
        return on.astype(np.uint8)
    return rectangles(on, cells.margin)


def rectangles(on: np.ndarray, margin: int = 0) -> np.ndarray:
    """Each 8-connected group replaced by its bounding box, grown by `margin`: bool [h, w] -> uint8 [h, w]."""
    filled = np.zeros(on.shape, np.uint8)
    for top, bottom, left, right in _groups(on):
        filled[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = 1
    return filled


def _groups(on: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Bounding boxes (top, bottom, left, right; ends excluded) of 8-connected groups: bool [h, w].

    A row is one Python integer with a bit per column, so that all neighbours in a row are found in three operations.
    """
    rows = [int.from_bytes(row.tobytes(), "little") for row in np.packbits(on, axis=1, bitorder="little")]
    boxes = []
    for start in range(len(rows)):
        while rows[start]:
            group = {start: rows[start] & -rows[start]}
            waiting = [start]
            while waiting:
                y = waiting.pop()
                bits = group[y]
                while (wider := (bits | bits << 1 | bits >> 1) & rows[y]) != bits:
                    bits = wider
                group[y] = bits
                for near in (y - 1, y + 1):
                    old = group.get(near, 0)
                    if 0 <= near < len(rows) and (new := (bits | bits << 1 | bits >> 1) & rows[near] & ~old):
                        group[near] = old | new
                        waiting.append(near)
            columns = 0
            for y, bits in group.items():
                rows[y] &= ~bits
                columns |= bits
            left = (columns & -columns).bit_length() - 1
            boxes.append((min(group), max(group) + 1, left, columns.bit_length()))
    return boxes
