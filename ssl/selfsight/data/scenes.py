"""Built-in images: little procedural scenes that stand in for photographs where there are none.

Each scene has a textured, lit background and two to four solid objects with texture, shading and shadow that overlap.
The class of an image is that of its main object (id 1): a shape and the texture it always carries. Colour, place,
size, turn, light and the other objects are drawn at random, and so is the ground, except that most scenes have the
one texture that goes with their class: comparing pixels says little, learning what things look like says a lot.
Everything comes with instance and semantic masks.

An image is a pure function of (seed, split, index); changing what is drawn means a new `VERSION`.
Arrays: B images of S x S pixels, float32, values in 0..1; object coordinates u, v have the object's radius as unit.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil, cos, hypot, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .rng import fold, hash_ints, key_of, purpose_hash, uniform

VERSION = 1
SLOTS = 4  # objects per image at most; slot 0 is the main object
PER_SHARD = 1000
TYPICAL = 0.9  # share of scenes whose ground has the texture of the main object's class
_ORDER = (1, 2, 0, 3)  # painted back to front: the last one may cover the rim of the main object
_REACH = 0.26  # half the side of a window that holds a small object and its shadow
_PIXELS = 1 << 17  # pixels rendered at once: small enough for the cache


class Scenes(NamedTuple):
    """Rendered scenes."""

    images: np.ndarray  # uint8 [B, S, S, 3]
    objects: np.ndarray  # uint8 [B, S, S]: 0 background, 1 main object, 2.. the others that can be seen
    masks: np.ndarray  # uint8 [B, S, S]: 0 background, 1 + class
    labels: np.ndarray  # int64 [B]


def _radius(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _polygon(u: np.ndarray, v: np.ndarray, corners: int, inner: float) -> np.ndarray:
    """Star with corners at radius 1 and the points between them at `inner`; cos(pi / corners) is a polygon."""
    half = pi / corners
    angle = np.abs(np.mod(np.arctan2(v, u), 2 * half) - half)  # 0 at the inner points, `half` at the corners
    radius = _radius(u, v)
    x, y = cos(half) - inner, sin(half)
    return (y * (radius * np.cos(angle) - inner) - x * radius * np.sin(angle)) * (1 / hypot(x, y))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 1, b - 0.36), np.maximum(b - 1, a - 0.36))


def _speckle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 1.5 * np.sin(2.5 * u + 2.1 * np.sin(2 * v + 1)) * np.sin(2.8 * v + 1.7 * np.sin(1.7 * u + 2))


def _marble(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(0.4 * u + 1.8 * np.sin(0.3 * v + 0.7 * np.sin(0.4 * u)) + 1.3 * np.sin(0.6 * v - 0.25 * u))


Drawn = dict[str, np.ndarray]  # a float32 [B] per name
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
# The shape, negative inside, in units of the object's radius; and the texture, around 0, in radians.
_KINDS: dict[str, tuple[Field, Field]] = {
    "striped disc": (lambda u, v: _radius(u, v) - 0.9, lambda u, v: np.sin(0.85 * u)),
    "checked square": (
        partial(_polygon, corners=4, inner=cos(pi / 4)),
        lambda u, v: 1.6 * np.sin(0.85 * u) * np.sin(0.85 * v),
    ),
    "dotted triangle": (
        partial(_polygon, corners=3, inner=cos(pi / 3)),
        lambda u, v: np.cos(1.6 * u) + np.cos(1.6 * v) - 0.45,
    ),
    "circled star": (partial(_polygon, corners=5, inner=0.5), lambda u, v: np.sin(2 * _radius(u, v))),
    "speckled ring": (lambda u, v: np.abs(_radius(u, v) - 0.66) - 0.3, _speckle),
    "gridded cross": (_cross, lambda u, v: np.maximum(np.cos(u), np.cos(v)) - 0.6),
    "marbled crescent": (lambda u, v: np.maximum(_radius(u, v) - 1, 0.72 - _radius(u - 0.5, v)), _marble),
    "zigzag hexagon": (
        partial(_polygon, corners=6, inner=cos(pi / 6)),
        lambda u, v: np.sin(0.9 * u + 2.4 * np.abs(np.mod(0.9 / pi * v, 2) - 1)),
    ),
    "rayed flower": (
        lambda u, v: _radius(u, v) - (0.74 + 0.24 * np.cos(5 * np.arctan2(v, u))),
        lambda u, v: np.sin(9 * np.arctan2(v, u)),
    ),
    "wavy lens": (
        lambda u, v: np.maximum(_radius(u - 0.75, v), _radius(u + 0.75, v)) - 1.27,
        lambda u, v: np.sin(0.75 * v + 1.6 * np.sin(0.4 * u)),
    ),
}
CLASSES = tuple(_KINDS)
_SHAPES, _TEXTURES = zip(*_KINDS.values())

# --- what is drawn at random: name -> (low, high) --------------------------------------------------------------------

_PALETTE = {"hue": (0, 1), "hue2": (0, 1), "saturation": (0.05, 0.45), "saturation2": (0.05, 0.45)}
_OBJECT = _PALETTE | {
    "class": (0, 1),
    "radius": (0, 1),  # share of the range of its slot
    "angle": (0, 2 * pi),  # turn of the shape
    "direction": (-0.6, 0.6),  # where around the main object, radians from the slot's own direction
    "distance": (0.15, 0.9),  # own radii beyond the main object's rim
    "squeeze": (-0.18, 0.18),  # log of the aspect
    "frequency": (9, 12),  # texture, radians per radius
    "turn": (-0.35, 0.35),  # of the texture against the shape, radians
    "phase": (-pi, pi),
    "dark": (0.08, 0.42),
    "bright": (0.62, 1.0),
    "swap": (0, 1),
    "bulge": (0.15, 0.85),  # how round it is
    "gloss": (0.0, 0.5),
}
_GROUND = _PALETTE | {
    "typical": (0, 1),
    "texture": (0, 1),
    "frequency": (24, 34),  # radians per image side
    "angle": (0, 2 * pi),
    "phase": (0, 40),
    "dark": (0.1, 0.6),
    "contrast": (0.2, 0.5),
    "slope": (0.0, 0.5),  # how fast the light falls off
}
_FRAME = {
    "count": (1, 4),  # objects beside the main one, rounded down
    "y": (0.26, 0.74),
    "x": (0.26, 0.74),
    "light": (0, 2 * pi),
    "height": (0.35, 0.9),  # of the light above the horizon, radians
    "shadow": (0.2, 0.6),
    "ambient": (0.35, 0.65),
    "warmth": (-0.12, 0.12),
    "exposure": (0.85, 1.35),
    "noise": (0.003, 0.018),
}


def render(split: str, indices: np.ndarray, *, size: int = 64, seed: int = 0) -> Scenes:
    """Render the scenes with these numbers (int64 [B], from 0) of a split; any split name is its own endless set."""
    indices = np.asarray(indices, dtype=np.int64)
    root = hash_ints(seed, purpose_hash(f"scenes/{split}"), VERSION)
    key = key_of(root, indices)
    frame, labels = _draw(key, "frame", _FRAME), _labels(root, indices)
    objects = [_draw(fold(key, f"object/{slot}"), "object", _OBJECT) for slot in range(SLOTS)]
    for slot, drawn in enumerate(objects):
        _place(slot, drawn, frame, objects[0])
        drawn["class"] = labels if slot == 0 else (labels + 1 + (drawn["class"] * 9).astype(np.int64)) % len(CLASSES)
    ground = _draw(key, "ground", _GROUND)
    # As fish are seen in water and cars on roads, most scenes have the ground that goes with their main object.
    ground["texture"] = np.where(ground["typical"] < TYPICAL, (labels + 0.5) / len(CLASSES), ground["texture"])
    canvas = _ground(ground, frame, size)
    ids = np.zeros((len(indices), size, size), dtype=np.uint8)
    for slot in _ORDER:
        _paint(canvas, ids, objects[slot], frame, slot)
    ids, masks = _number(ids, np.stack([drawn["class"] for drawn in objects], axis=1))
    return Scenes(_expose(canvas, frame, key), ids, masks, labels)


def _draw(key: np.ndarray, purpose: str, ranges: dict[str, tuple[float, float]]) -> Drawn:
    """One float32 [B] per name."""
    u = uniform(key, purpose, len(ranges))
    return {name: low + np.float32(high - low) * u[:, i] for i, (name, (low, high)) in enumerate(ranges.items())}


def _labels(root: int, indices: np.ndarray) -> np.ndarray:
    """Each run of ten images holds every class once, in random order: int64 [B]."""
    block, place = np.divmod(indices, len(CLASSES))
    order = uniform(key_of(root, block), "label", len(CLASSES)).argsort(axis=1, kind="stable")
    return order[np.arange(len(indices)), place]


def _place(slot: int, drawn: Drawn, frame: Drawn, main: Drawn) -> None:
    """Set "radius", "y", "x" (shares of the side) and "there": the others sit on the main one's inward rim."""
    if slot == 0:
        drawn["radius"] = 0.32 + 0.18 * drawn["radius"]
        drawn["y"], drawn["x"], drawn["there"] = frame["y"], frame["x"], np.ones(len(frame["y"]), dtype=bool)
        return
    drawn["radius"] = 0.09 + 0.08 * drawn["radius"]
    inward = np.arctan2(0.5 - frame["y"], 0.5 - frame["x"])
    direction = inward + (0, 0, 1.3, -1.3)[slot] + drawn["direction"]
    away = 0.8 * main["radius"] + drawn["distance"] * drawn["radius"]
    drawn["y"], drawn["x"] = frame["y"] + away * np.sin(direction), frame["x"] + away * np.cos(direction)
    drawn["there"] = slot <= frame["count"].astype(np.int64)


def _colors(drawn: Drawn, dark: np.ndarray, bright: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a bright colour of random hues: two of [3, B, 1, 1]."""
    return _hsv(drawn["hue"], drawn["saturation"], dark), _hsv(drawn["hue2"], drawn["saturation2"], bright)


def _hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    k = np.mod(np.array([[5], [3], [1]], dtype=np.float32) + 6 * hue, 6)
    return (value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1)))[:, :, None, None]


def _each(values: np.ndarray) -> np.ndarray:
    """[B] -> [B, 1, 1]."""
    return values[:, None, None]


def _rotate(y: np.ndarray, x: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) of a frame turned by angle [B]."""
    c, s = _each(np.cos(angle)), _each(np.sin(angle))
    return x * c + y * s, y * c - x * s


def _groups(values: np.ndarray, functions: tuple[Field, ...]) -> Iterator[tuple[Field, np.ndarray]]:
    """Each function with the rows that use it."""
    for number, function in enumerate(functions):
        rows = np.flatnonzero(values == number)
        if len(rows):
            yield function, rows


def _ground(drawn: Drawn, frame: Drawn, size: int) -> np.ndarray:
    """The background, lit from one side: [3, B, S, S]."""
    steps = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    y, x = np.broadcast_arrays(steps[:, None], steps)
    u, v = _rotate(y, x, drawn["angle"])
    # Far from the origin, so that circles and rays are seen from aside.
    u = u * _each(drawn["frequency"]) + _each(drawn["phase"])
    v = v * _each(drawn["frequency"]) + 17
    mix = np.empty_like(u)
    kind = (drawn["texture"] * len(_TEXTURES)).astype(np.int64)
    for texture, rows in _groups(kind, _TEXTURES):
        mix[rows] = texture(u[rows], v[rows])
    mix = np.clip(0.5 + 0.9 * mix, 0, 1)
    dark, bright = _colors(drawn, drawn["dark"], drawn["dark"] + drawn["contrast"])
    toward = _each(np.cos(frame["light"])) * x + _each(np.sin(frame["light"])) * y
    return (dark + (bright - dark) * mix) * (1 + _each(drawn["slope"]) * toward)


def _paint(canvas: np.ndarray, ids: np.ndarray, drawn: Drawn, frame: Drawn, slot: int) -> None:
    """Paint one object of every image, with its shadow, into the canvas [3, B, S, S] and the slots [B, S, S]."""
    size = canvas.shape[-1]
    rows = np.flatnonzero(drawn["there"])
    there = {name: values[rows] for name, values in drawn.items()}
    light = {name: values[rows] for name, values in frame.items()}
    window = size if slot == 0 else min(size, ceil(2 * _REACH * size))  # small objects touch a part of the image only
    at, axes = [rows[:, None, None]], []
    for axis, shape in (("y", (-1, window, 1)), ("x", (-1, 1, window))):
        start = np.clip(np.floor((there[axis] - _REACH) * size).astype(np.int64), 0, size - window)
        pixels = (start[:, None] + np.arange(window)).reshape(shape)
        at.append(pixels)
        center = ((pixels + 0.5) / size).astype(np.float32)
        axes.append((center - _each(there[axis])) / _each(there["radius"]))
    p, q = np.broadcast_arrays(*axes)
    inside, mix, shadow = _shape_and_texture(there, light, p, q)
    alpha = np.clip(0.5 - inside * _each(there["radius"] * size), 0, 1)  # one pixel of soft border
    shade, shine = _shading(there, light, inside, p, q)
    unshadowed = 1 - _each(light["shadow"]) * np.clip(0.5 - 2.5 * shadow, 0, 1)
    for plane, dark, bright in zip(canvas, *_colors(there, there["dark"], there["bright"])):
        below = plane[*at] * unshadowed
        plane[*at] = below + ((dark + (bright - dark) * mix) * shade + shine - below) * alpha
    ids[*at] = np.where(alpha > 0.5, slot + 1, ids[*at])


def _shape_and_texture(
    drawn: Drawn, frame: Drawn, p: np.ndarray, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape function, share of the bright colour, and shape function of the shadow: [B, S, S] each."""
    u, v = _rotate(p, q, drawn["angle"])
    aspect = _each(np.exp(drawn["squeeze"]))
    u, v = u * aspect, v / aspect
    s, t = (w * _each(drawn["frequency"]) for w in _rotate(v, u, drawn["turn"]))
    s += _each(drawn["phase"])
    # The shadow falls away from the light.
    drop = _each(0.3 * np.cos(frame["height"]))
    p, q = p + drop * _each(np.sin(frame["light"])), q + drop * _each(np.cos(frame["light"]))
    a, b = _rotate(p, q, drawn["angle"])
    a, b = a * aspect, b / aspect
    inside, mix, shadow = np.empty_like(u), np.empty_like(u), np.empty_like(u)
    for (shape, rows), (texture, _) in zip(_groups(drawn["class"], _SHAPES), _groups(drawn["class"], _TEXTURES)):
        inside[rows], shadow[rows] = shape(u[rows], v[rows]), shape(a[rows], b[rows])
        mix[rows] = texture(s[rows], t[rows])
    mix = np.clip(0.5 + 1.4 * mix, 0, 1)
    return inside, np.where(_each(drawn["swap"] < 0.5), mix, 1 - mix), shadow


def _shading(
    drawn: Drawn, frame: Drawn, inside: np.ndarray, p: np.ndarray, q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse factor and highlight of a body that bulges toward the viewer, bevelled at its border: [B, S, S] each."""
    bulge = _each(drawn["bulge"])
    ny, nx = p * bulge, q * bulge
    nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0.05, 1))
    flat, up = np.cos(frame["height"]), np.sin(frame["height"])
    ly, lx = _each(flat * np.sin(frame["light"])), _each(flat * np.cos(frame["light"]))
    facing = np.clip(nx * lx + ny * ly + nz * _each(up), 0, 1)
    bevel = 0.7 + 0.3 * np.clip(-6 * inside, 0, 1)
    ambient = _each(frame["ambient"])
    highlight = facing * facing
    highlight *= highlight
    highlight *= highlight
    return (ambient + (1.25 - ambient) * facing) * bevel, _each(drawn["gloss"]) * highlight * highlight


def _number(ids: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots (0 = none) to object ids without gaps and to semantic ids. ids: [B, S, S], classes: [B, SLOTS]."""
    flat = ids.reshape(len(ids), -1)
    seen = np.stack([(flat == slot + 1).any(axis=1) for slot in range(SLOTS)], axis=1)
    numbers = np.where(seen, np.cumsum(seen, axis=1), 0)
    zero = np.zeros((len(ids), 1), dtype=np.int64)
    tables = np.concatenate([zero, numbers], axis=1), np.concatenate([zero, classes + 1], axis=1)
    objects, masks = (np.take_along_axis(table, flat.astype(np.int64), axis=1) for table in tables)
    return objects.reshape(ids.shape).astype(np.uint8), masks.reshape(ids.shape).astype(np.uint8)


def _expose(canvas: np.ndarray, frame: Drawn, key: np.ndarray) -> np.ndarray:
    """Tint of the light, exposure and sensor noise, to uint8 [B, S, S, 3]."""
    size = canvas.shape[-1]
    tint = np.stack([1 + frame["warmth"], np.ones_like(frame["warmth"]), 1 - frame["warmth"]])
    canvas *= (tint * frame["exposure"])[:, :, None, None]
    grain = uniform(key, "grain", size * size).reshape(-1, size, size) - np.float32(0.5)
    canvas += grain * _each(2 * frame["noise"])
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 3, 0)


# --- shards ----------------------------------------------------------------------------------------------------------


def ensure(split: str, *, size: int = 64, count: int, seed: int = 0, workers: int | None = None) -> str:
    """The shard pattern of a split in the cache folder, rendered first unless it is there.

    Several processes may ask at once: each writes its own folder, and the first to finish puts its one in place.
    """
    from . import cache_dir

    folder = cache_dir() / f"scenes-v{VERSION}-{size}-{count}-{seed}-{split}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            write(own, split, size=size, count=count, seed=seed, workers=workers)
            own.chmod(0o755)
            try:
                own.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise somebody else was faster, with the same bytes
                    raise
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return _pattern(folder, split, count)


def write(out: Path, split: str, *, size: int = 64, count: int, seed: int = 0, workers: int | None = None) -> str:
    """Write `count` scenes as WebDataset shards (jpg, cls, mask.png, objects.png) and classes.json; the pattern.

    workers: threads (numpy and the codecs release the interpreter); None: one per core, four at most.
    """
    if size < 16 or count < 1:
        raise ValueError(f"scenes of {size} px, {count} images: at least 16 px and 1 image are needed")
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.json").write_text(json.dumps(list(CLASSES), indent=1) + "\n")
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        for shard, start in enumerate(range(0, count, PER_SHARD)):
            numbers = range(start, min(start + PER_SHARD, count))
            _write_shard(out / _name(split, shard), pool, split, numbers, size, seed)
    return _pattern(out, split, count)


def _name(split: str, shard: int) -> str:
    return f"{split}-{shard:06d}.tar"


def _pattern(folder: Path, split: str, count: int) -> str:
    last = (count - 1) // PER_SHARD
    return str(folder / (_name(split, 0) if last == 0 else f"{split}-{{000000..{last:06d}}}.tar"))


def _write_shard(path: Path, pool: ThreadPoolExecutor, split: str, numbers: range, size: int, seed: int) -> None:
    import webdataset

    step = max(1, _PIXELS // size**2)
    parts = [numbers[at : at + step] for at in range(0, len(numbers), step)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # A fixed time stamp: equal scenes are equal files.
    with webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as tar:
        for samples in pool.map(lambda part: _encode(part, render(split, np.array(part), size=size, seed=seed)), parts):
            for sample in samples:
                tar.write(sample)
    temporary.replace(path)


def _encode(numbers: range, scenes: Scenes) -> list[dict[str, str | bytes]]:
    import simplejpeg

    return [
        {
            "__key__": f"{number:07d}",
            "jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=94, colorsubsampling="444"),
            "cls": str(label).encode(),
            "mask.png": _png(mask),
            "objects.png": _png(objects),
        }
        for number, image, objects, mask, label in zip(numbers, *scenes)
    ]


def _png(ids: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG", compress_level=3)
    return file.getvalue()
