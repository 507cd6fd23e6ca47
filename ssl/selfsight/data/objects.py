"""Object ids of an image: `objects.png` (an index map) or `boxes.json` (rectangles), undecoded bytes to an id map.

    objects.png   one channel of 1 to 16 bits, or a palette image whose indices count; 0 = no object, every other
                  value one object, but 255 in 8 bits = ignore
    boxes.json    {"boxes": [[x1, y1, x2, y2, score, id], …], "size": [height, width]}; score and id may be left out

A map covers the image as it is shown, whatever its own resolution: 256 pixels on the longest side are plenty.
"""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
from PIL import Image

from .decode import MAX_PIXELS
from .source import Raw, SampleError

BOX_MAP = 256  # longest side of a map that boxes are painted into, pixels
IGNORE = 255
MAX_ID = 65535
_GRAY, _PALETTE = 0, 3  # colour types of a PNG header
_COLOURS = {2: "RGB", 4: "gray and alpha", 6: "RGBA"}
_BOXES = '{"boxes": [[x1, y1, x2, y2, score, id], …], "size": [height, width]}'


def object_map(raw: Raw) -> np.ndarray | None:
    """Ids [h, w] (uint8 or uint16, 0 = no object) of a sample; None if it has neither map nor boxes.

    Raises SampleError, naming the file and the key, if they cannot be used.
    """
    where = raw.side or raw.where
    if raw.objects is not None:
        return _decode(raw.objects, where)
    return _paint(raw.boxes, where) if raw.boxes is not None else None


def _decode(data: bytes, where: str) -> np.ndarray:
    """The map of objects.png: 255 in 8 bits is nothing."""
    ids = id_map(data, where, "objects.png")
    eight_bits = data[24] == 8
    return np.where(ids == IGNORE, np.uint8(0), ids) if eight_bits and ids.max() == IGNORE else ids


def id_map(data: bytes, where: str, name: str) -> np.ndarray:
    """Ids [h, w] (uint8 or uint16) of a PNG as stored: no palette is looked up and nothing is scaled, or ids would
    become colours. SampleError, calling the file `name`, if it cannot be used."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 33:
        raise SampleError(where, f"{name} is empty" if not data else f"{name} is no PNG image")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    depth, colour = data[24], data[25]
    if colour not in (_GRAY, _PALETTE):
        kind = _COLOURS.get(colour, f"colour type {colour}")
        raise SampleError(where, f"{name} has {kind} pixels; write the ids as one channel of 8 or 16 bits")
    if width * height > MAX_PIXELS:
        raise SampleError(where, f"{name} says {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on size or odd metadata: the checks above decide
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                ids = np.asarray(image)
    except Exception as error:  # Pillow's plug-in raises whatever the bytes lead it to
        raise SampleError(where, f"{name} is truncated or damaged ({error})") from error
    if depth == 16:
        return ids.astype(np.uint16)
    ids = ids.astype(np.uint8, copy=False)
    # Pillow stretches gray of 2 and 4 bits to 0..255, but not one bit (read as booleans) and not palettes.
    return ids // np.uint8(255 // (2**depth - 1)) if colour == _GRAY and 1 < depth < 8 else ids


def _paint(data: bytes, where: str) -> np.ndarray:
    """Boxes to uint16 [h, w] at no more than `BOX_MAP` pixels, the largest first, so that small ones stay visible.

    Corners are edges in pixels of "size": a box covers x1 <= x < x2. Without ids, box number i (from 1) is object i.
    """
    boxes, ids, height, width = _parse(data, where)
    share = min(1.0, BOX_MAP / max(height, width))
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    boxes = np.clip(boxes, 0, (width, height, width, height))
    sides = boxes[:, 2:] - boxes[:, :2]
    corners = np.rint(boxes * np.tile((columns / width, rows / height), 2)).astype(np.int64)
    last = columns - 1, rows - 1
    painted = np.zeros((rows, columns), np.uint16)
    for i in np.argsort(-sides.prod(axis=1), kind="stable"):
        if sides[i].min() > 0:  # otherwise it lies outside the image
            x0, y0 = np.minimum(corners[i, :2], last)
            x1, y1 = np.maximum(corners[i, 2:], (x0 + 1, y0 + 1))  # a sliver keeps one pixel
            painted[y0:y1, x0:x1] = ids[i]
    return painted


def _parse(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Corners float64 [n, 4] (x1 y1 x2 y2), ids int64 [n], height and width of a boxes.json."""
    try:
        content = json.loads(data)
        table, size = np.array(content["boxes"]), np.array(content["size"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SampleError(where, f"boxes.json is not of the form {_BOXES}") from None
    if size.shape != (2,) or size.dtype.kind not in "iuf" or not (size >= 1).all() or not np.isfinite(size).all():
        raise SampleError(where, f'boxes.json: "size" is {content["size"]}; expected [height, width] in pixels')
    if not table.size:
        table = np.zeros((0, 4))
    if table.ndim != 2 or table.shape[1] not in (4, 5, 6) or table.dtype.kind not in "iuf":
        raise SampleError(where, f'boxes.json: "boxes" must be rows of 4, 5 or 6 numbers each, {_BOXES}')
    for row in table[~np.isfinite(table).all(axis=1) | (table[:, :2] > table[:, 2:4]).any(axis=1)]:
        raise SampleError(where, f"boxes.json: {row[:4].tolist()} is no box; expected x1 <= x2 and y1 <= y2")
    ids = table[:, 5] if table.shape[1] == 6 else np.arange(1, len(table) + 1)
    for number in ids[(ids != np.rint(ids)) | (ids < 1) | (ids > MAX_ID)]:
        raise SampleError(where, f"boxes.json: id {number:g} is not a whole number from 1 to {MAX_ID}")
    return table[:, :4].astype(np.float64), ids.astype(np.int64), int(size[0]), int(size[1])
