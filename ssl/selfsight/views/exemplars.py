"""Exemplars of an image, as in CIM (arXiv 2303.12670): turned rectangles, what they show, and where they came from.

An exemplar is an upright crop of the image turned about its centre, so its footprint in the image is a tilted
rectangle. Everything is a closed form of the box and the angle, batched on the device: no canvas is turned, no mask is
rasterised and turned back. Lengths are shares of the image's side and coordinates start at its centre, so nothing
depends on a resolution. No matrix products: under autocast they would lose the position of a pixel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.rng import uniform

_TRIES = 10  # as torchvision's RandomResizedCrop


class Turned(NamedTuple):
    """Rectangles that are upright in the image turned by `angle`; any leading shape, float32."""

    angle: Tensor  # [*] radians, counter-clockwise
    box: Tensor  # [*, 4] y0 x0 y1 x1 in the turned image


def exemplar_boxes(
    key: Tensor,
    count: int,
    *,
    scale: tuple[float, float] = (0.05, 0.48),
    ratio: tuple[float, float] = (1 / 3, 3.0),
    rotation: int = 45,
) -> Turned:
    """`count` exemplars per image: key int64 [B] -> Turned of [count, B].

    A box by the rule of random resized crops (share of the area uniform in `scale`, ratio log-uniform, the first of ten
    tries that fits), and whole degrees in [-rotation, rotation), uniform; then `around`.
    """
    u = uniform(key, "exemplars", count * (2 * _TRIES + 3)).unflatten(1, (count, -1)).transpose(0, 1)
    area = scale[0] + (scale[1] - scale[0]) * u[..., :_TRIES]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[..., _TRIES : 2 * _TRIES])
    height, width = (area / aspect).sqrt(), (area * aspect).sqrt()
    first = (torch.maximum(height, width) <= 1).long().argmax(-1, keepdim=True)
    height, width = (side.gather(-1, first)[..., 0].clamp(max=1) for side in (height, width))
    top, left, turn = u[..., 2 * _TRIES :].unbind(-1)
    y, x = (top - 0.5) * (1 - height), (left - 0.5) * (1 - width)
    return around(y, x, height, width, torch.deg2rad((turn * 2 * rotation).floor() - rotation))


def around(y: Tensor, x: Tensor, height: Tensor, width: Tensor, angle: Tensor) -> Turned:
    """The turned rectangle that bounds an upright box of the image: centre, sides and angle [*] -> Turned of [*].

    Where it would leave the image it is drawn in, each corner that is outside pulling its two sides towards the centre.
    (The reference moves one corner after the other, which depends on their order; shrinking the whole rectangle would
    make exemplars a fifth smaller than the reference's on average.)
    """
    cos, sin = angle.cos(), angle.sin()
    rows = (height * cos.abs() + width * sin.abs()) / 2
    columns = (width * cos.abs() + height * sin.abs()) / 2
    reach = torch.stack([-rows, -columns, rows, columns], -1)

    def rooms(reach: Tensor) -> list[Tensor]:
        top, left, bottom, right = reach.unbind(-1)
        return [_room(y, x, down, across, cos, sin) for down in (top, bottom) for across in (left, right)]

    a, b, c, d = rooms(reach)
    reach = reach * torch.stack([torch.minimum(*pair) for pair in ((a, b), (a, c), (c, d), (b, d))], -1)
    reach = reach * torch.stack(rooms(reach)).amin(0)[..., None]  # sides drawn in unevenly may meet outside
    centre = torch.stack(turned(y, x, cos, sin), -1)
    return Turned(angle, torch.cat([centre, centre], -1) + reach)


def _room(y: Tensor, x: Tensor, down: Tensor, across: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """How much of the way from a point of the image along a direction of the turned one stays inside: [*] in 0..1."""
    ways = turned(down, across, cos, -sin)
    shares = [(0.5 - at * way.sign()) / way.abs().clamp(min=1e-6) for at, way in zip((y, x), ways)]
    return torch.minimum(*shares).clamp(0, 1)


def turned(y: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in the image -> in the image turned counter-clockwise; with -sin, back."""
    return cos * y - sin * x, cos * x + sin * y


def footprint(where: Turned, size: int) -> Tensor:
    """Which pixels of the image at this side lie in the rectangles: Turned of [*] -> bool [*, size, size]."""
    at = (torch.arange(size, device=where.angle.device) + 0.5) / size - 0.5
    cos, sin = (f(where.angle)[..., None, None] for f in (torch.cos, torch.sin))
    y, x = turned(at[:, None], at, cos, sin)
    y0, x0, y1, x1 = where.box[..., None, None].unbind(-3)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def cut(images: Tensor, where: Turned, size: int) -> Tensor:
    """What exemplars show: float [B, c, S, S] in 0..1, Turned of [E, B] -> [E, B, c, size, size].

    Bicubic and antialiased: every pixel averages samples over what it covers beyond the one source pixel that
    interpolation covers itself. Their number is that of the largest rectangle, a constant of the run; one call per
    sample keeps the memory that of the result.
    """
    count, side = len(where.angle), images.shape[-1]
    y0, x0, y1, x1 = where.box[..., None].unbind(-2)
    cos, sin = (f(where.angle)[..., None, None] for f in (torch.cos, torch.sin))
    samples = math.ceil(side / size)
    at, done = torch.arange(size, device=images.device) + 0.5, 0.0
    spread_y, spread_x = ((1 - (size / (extent * side)) ** 2).clamp(min=0).sqrt() for extent in (y1 - y0, x1 - x0))
    for i in range(samples**2):
        shift_y, shift_x = ((n + 0.5) / samples - 0.5 for n in divmod(i, samples))
        y = y0 + (y1 - y0) * (at + shift_y * spread_y) / size  # [E, B, size]
        x = x0 + (x1 - x0) * (at + shift_x * spread_x) / size
        y, x = turned(y[..., :, None], x[..., None, :], cos, -sin)
        grid = 2 * torch.stack([x, y], -1).transpose(0, 1).flatten(1, 2)  # [B, E * size, size, 2]
        done = done + F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    crops = (done / samples**2).clamp(0, 1)
    return crops.unflatten(2, (count, size)).permute(2, 0, 1, 3, 4)
