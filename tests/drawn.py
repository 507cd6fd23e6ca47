"""Objects drawn for tests: id maps, samples that carry them, a sample's random numbers."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from selfsight.data.rng import key_of, uniform
from selfsight.data.source import Raw


def png(ids: np.ndarray, **kwargs) -> bytes:
    out = io.BytesIO()
    Image.fromarray(ids).save(out, "PNG", **kwargs)
    return out.getvalue()


def raw(objects: np.ndarray | bytes | None = None, boxes: dict | bytes | None = None) -> Raw:
    objects = png(objects) if isinstance(objects, np.ndarray) else objects
    boxes = json.dumps(boxes).encode() if isinstance(boxes, dict) else boxes
    return Raw("k", b"", -1, "t.tar, key k", objects=objects, boxes=boxes)


def bound(position: int):
    key = key_of(0, np.array([position]))
    return lambda purpose, n: uniform(key, purpose, n)[0]


def disc(shape: tuple[int, int], y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


def two_discs(shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A large object (1) and a small one (2)."""
    ids = np.zeros(shape, np.uint8)
    ids[disc(shape, 0.6 * shape[0], 0.35 * shape[1], 0.25 * shape[0])] = 1
    ids[disc(shape, 0.2 * shape[0], 0.8 * shape[1], 0.14 * shape[0])] = 2
    return ids


def covered(ids: np.ndarray, box: np.ndarray, height: int, width: int, fine: int = 1) -> float:
    """Area of a bool map inside a box, in map pixels, by counting points `fine` times as dense as image pixels."""
    ys = (np.arange(int(box[0]) * fine, int(box[2]) * fine) + 0.5) / fine * ids.shape[0] / height
    xs = (np.arange(int(box[1]) * fine, int(box[3]) * fine) + 0.5) / fine * ids.shape[1] / width
    seen = ids[ys.astype(int)][:, xs.astype(int)]
    return float(seen.mean() * (box[2] - box[0]) * (box[3] - box[1]) * ids.size / (height * width))
