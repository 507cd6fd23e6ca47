"""Where crops lie: boxes of one image, drawn from its key; independently, overlapping, or around one of its objects.

`u(purpose, n)` gives n uniform float32 numbers of the sample at hand (`data.rng.uniform` bound to its key). Runs per
sample in loader workers, so everything is a handful of small numpy operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil, floor, log
from typing import Any, NamedTuple

import numpy as np

from ..data.objects import object_map
from ..data.source import SampleError
from .objects import TOUCH, Region
from .spec import Crop

Uniform = Callable[[str, int], np.ndarray]
_TRIES = 10  # as torchvision's RandomResizedCrop
_DRAWS = 2 * _TRIES + 2  # per crop: areas, ratios, and where the box lies
_LATTICE = 32  # offsets compared per axis; for images of up to 64 px that is nearly always every one


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


def overlapping(
    u: Uniform, crops: Sequence[Crop], height: int, width: int, sample: Any = None
) -> dict[str, np.ndarray]:
    """Crops of the first kind that share a part of the image, the other kinds within the box around them (UDI; GLARE).

    Each is drawn as by `independent`; further ones of the first kind are then moved towards the first one, no more
    than it takes to share half of the shorter side along each axis, so at least a quarter of the smaller one's area.
    """
    placed = independent(u, crops[:1], height, width)
    boxes = placed[crops[0].name]
    for box in boxes[1:]:
        for axis in (0, 1):
            (start, end), length = boxes[0, [axis, axis + 2]], box[axis + 2] - box[axis]
            least = np.ceil(min(end - start, length) / 2)
            last = (height, width)[axis] - length
            box[axis] = np.clip(box[axis], max(start + least - length, 0), min(end - least, last))
            box[axis + 2] = box[axis] + length
    if len(crops) > 1:
        y0, x0 = boxes[:, :2].min(0)
        y1, x1 = boxes[:, 2:].max(0)
        inner = independent(lambda purpose, n: u(f"{purpose}/inner", n), crops[1:], int(y1 - y0), int(x1 - x0))
        placed |= {name: found + np.array([y0, x0, y0, x0], np.float32) for name, found in inner.items()}
    return placed


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


class Placed(dict[str, np.ndarray]):
    """Boxes by kind of crop, float32 [count, 4], and the object that they were laid around, if there is one."""

    region: Region | None = None


class AroundObject(NamedTuple):
    """Crops that show one object of the image, as in ODIS (arXiv 2506.05409); `crops[0]` are the global ones.

    The first global crop shows the object on at least `min_area` of its own area, the others at least that or
    `min_visible` of the object. Where that is impossible they show as much of it as they can. Sizes and shapes of all
    crops are those of `independent`, and an image without objects gets exactly its boxes.
    choice: of an object, with probability in proportion to the root of its area (sqrt_area), uniform, or the largest.
    locals: other kinds of crops lie at random, or like the further global ones (object).
    sampling: "analytic" draws the place uniformly among those that will do; "official" draws whole crops until one
    will do (10 tries for the first, 20 for a further one, which needs to show any part), then goes without the object;
    "none" leaves the crops where `independent` puts them and chooses among the objects of the first one.
    """

    min_area: float = 0.04
    choice: str = "sqrt_area"
    min_visible: float = 0.25
    locals: str = "random"
    sampling: str = "analytic"
    required: bool = False  # a sample without objects is a bad sample

    def __call__(self, u: Uniform, crops: Sequence[Crop], height: int, width: int, sample: Any = None) -> Placed:
        """Boxes as `independent` gives them, and the object. SampleError if the sample's objects are malformed."""
        placed = Placed(independent(u, crops, height, width))
        ids = None if sample is None else object_map(sample)
        found = None if ids is None else _objects(ids)
        some = found is not None and len(found[0]) > 0
        if self.required and not some:
            raise SampleError(
                sample.where, "it has no object mask, and objective.no_mask=error wants one (full does not)"
            )
        if some:
            lay = {"analytic": _analytic, "official": _rejected, "none": _as_they_lie}[self.sampling]
            lay(self, placed, _Image(u, tuple(crops), ids, *found, height, width))
        return placed


class _Image(NamedTuple):
    """What is known of the image at hand."""

    u: Uniform
    crops: tuple[Crop, ...]
    ids: np.ndarray
    numbers: np.ndarray  # ids that occur
    sizes: np.ndarray  # and their areas in pixels of the map
    height: int
    width: int


def _analytic(rule: AroundObject, placed: Placed, image: _Image) -> None:
    """Move the boxes of `independent` to where they show the object; no tries."""
    kinds = image.crops if rule.locals == "object" else image.crops[:1]
    count = 3 * sum(crop.count for crop in kinds)
    draws = image.u("around", count + len(image.numbers)).astype(np.float64)
    order, draws = _order(rule.choice, image.sizes, draws[count:]), iter(draws[:count].reshape(-1, 3))
    first, own = placed[kinds[0].name][0], next(draws)
    least = max(1.0, rule.min_area * _map_area(first, image))  # a pixel of the map at least
    for i in order[image.sizes[order] >= least - TOUCH]:
        region = Region(image.ids, int(image.numbers[i]))
        box, area = _slide(region, first, least, own, image)
        if area >= least - TOUCH:
            break
    else:  # no object is large enough for a crop of this size
        region = Region(image.ids, int(image.numbers[order[0]]))
        box, _ = _slide(region, first, least, own, image)
    placed.region = region
    for crop in kinds:
        for v, old in enumerate(placed[crop.name]):
            if crop is not kinds[0] or v:
                least = max(1.0, min(rule.min_visible * region.size, rule.min_area * _map_area(old, image)))
                box, _ = _slide(region, old, least, next(draws), image)
            placed[crop.name][v] = box


def _slide(region: Region, box: np.ndarray, least: float, draws: np.ndarray, image: _Image) -> tuple[np.ndarray, float]:
    """A box of the same size that shows at least this area of the object (map pixels), and the area that it shows.

    Uniform among the places that do, or among those that show most if none does. draws: [3]. Candidates are a lattice
    of whole pixels whose position is drawn too, so that every pixel can be the start, and each of them is exact.
    """
    y0, x0, y1, x1 = region.on_map(box, image.height, image.width)
    rows, columns = y1 - y0, x1 - x0
    # A window that shows the area overlaps the bounding box by this much, and the one that shows most by all it can.
    high = min(rows, region.bottom - region.top)
    wide = min(columns, region.right - region.left)
    tall, across = min(least / wide, high), min(least / high, wide)
    scale = region.shape[0] / image.height, region.shape[1] / image.width
    ys = _lattice(region.top + tall - rows, region.bottom - tall, scale[0], image.height - (box[2] - box[0]), draws[0])
    xs = _lattice(
        region.left + across - columns, region.right - across, scale[1], image.width - (box[3] - box[1]), draws[1]
    )
    areas = region.areas(ys * scale[0], rows, xs * scale[1], columns)
    will_do = np.flatnonzero(areas >= min(least, areas.max()) - TOUCH)
    at = will_do[int(draws[2] * len(will_do))]
    y, x = ys[at // len(xs)], xs[at % len(xs)]
    return np.array([y, x, y + box[2] - box[0], x + box[3] - box[1]], np.float32), float(areas.flat[at])


def _lattice(low: float, high: float, scale: float, last: float, draw: float) -> np.ndarray:
    """Up to `_LATTICE` whole numbers, equally spaced from a drawn start, in [low, high] / scale and [0, last]."""
    start = min(max(ceil(low / scale - TOUCH), 0), int(last))
    span = max(min(floor(high / scale + TOUCH), int(last)) - start, 0) + 1
    count = min(span, _LATTICE)
    return start + np.floor((np.arange(count) + draw) * (span / count))


def _rejected(rule: AroundObject, placed: Placed, image: _Image) -> None:
    """Draw crops until one will do, as the reference does; boxes of `independent` where none did."""
    first = image.crops[0]
    for box in _tries(image, first, "first", 10):
        placed.region = _chosen_in(box, rule, image)
        if placed.region:
            placed[first.name][0] = box
            break
    else:
        return
    for crop in image.crops if rule.locals == "object" else image.crops[:1]:
        views = range(1 if crop is first else 0, crop.count)
        boxes = _tries(image, crop, "further", (20 if crop is first else 10) * len(views))
        shows = [placed.region.area(box, image.height, image.width) > TOUCH for box in boxes]
        for v, box in zip(views, boxes[shows]):
            placed[crop.name][v] = box


def _as_they_lie(rule: AroundObject, placed: Placed, image: _Image) -> None:
    """Choose an object of the first crop; all boxes stay those of `independent`."""
    placed.region = _chosen_in(placed[image.crops[0].name][0], rule, image)


def _chosen_in(box: np.ndarray, rule: AroundObject, image: _Image) -> Region | None:
    """One of the objects that take more than `min_area` of a box, which is rounded to whole pixels of the map."""
    (rows, columns), (height, width) = image.ids.shape, (image.height, image.width)
    y0, x0, y1, x1 = np.rint(box * (rows / height, columns / width, rows / height, columns / width)).astype(np.int64)
    seen = image.ids[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    numbers, sizes = _objects(seen)
    large = sizes > rule.min_area * seen.size
    if not large.any():
        return None
    order = _order(rule.choice, sizes[large], image.u("object", int(large.sum())).astype(np.float64))
    return Region(image.ids, int(numbers[large][order[0]]))


def _tries(image: _Image, crop: Crop, purpose: str, count: int) -> np.ndarray:
    """Boxes of `independent`, float32 [count, 4], that no other crop draws."""
    u = lambda name, n: image.u(f"{name}/{purpose}/{crop.name}", n)  # noqa: E731
    return independent(u, (crop._replace(count=count),), image.height, image.width)[crop.name]


def _objects(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids that occur, without 0, and their areas in pixels: int64 [k] each."""
    largest = int(ids.max(initial=0))
    if largest <= 16:  # counting a few values one by one is quicker than a histogram
        sizes = np.array([0] + [np.count_nonzero(ids == number) for number in range(1, largest + 1)])
    else:
        sizes = np.bincount(ids.ravel())
        sizes[0] = 0
    numbers = np.flatnonzero(sizes)
    return numbers, sizes[numbers]


def _order(choice: str, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """A random order of the objects in which each next one is drawn by its weight: int64 [k] from uniform float64 [k].

    The first of them with a property is then drawn by weight among all with that property.
    """
    if choice == "largest":
        return np.argsort(-sizes, kind="stable")
    if choice not in ("sqrt_area", "uniform"):
        raise ValueError(f"choice={choice!r} is not one of sqrt_area, uniform, largest")
    weights = np.sqrt(sizes) if choice == "sqrt_area" else 1.0
    return np.argsort(-np.log1p(-draws) / weights, kind="stable")


def _map_area(box: np.ndarray, image: _Image) -> float:
    """Area of a box in pixels of the id map."""
    rows, columns = image.ids.shape
    return float((box[2] - box[0]) * (box[3] - box[1])) * rows * columns / (image.height * image.width)
