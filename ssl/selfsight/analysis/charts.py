"""Inline SVG of the analysis page: lines over layers or frequencies, and matrices. No script, no external file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..training.report import ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 250, 58, 14, 12, 40
CELL, MARGIN = 30, 74  # of a matrix
# Early to late layers; all of them are seen on light and on dark paper.
DEPTH = ((72, 108, 214), (150, 84, 200), (214, 78, 128), (236, 142, 44))
SHADE = ((38, 34, 82), (52, 94, 141), (34, 145, 140), (94, 201, 98), (253, 231, 37))


class Curve(NamedTuple):
    """One line. colour: a CSS colour; dots: further points without a line (the heads of a block); dashed: dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def blend(stops: Sequence[tuple[int, int, int]], share: float) -> str:
    """A CSS colour at 0..1 of the way through the stops."""
    place = min(1.0, max(0.0, share)) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(stops[i], stops[i + 1]))
    return "#" + "".join(f"{v:02x}" for v in mixed)


def plot(
    curves: Sequence[Curve], x_names: dict[float, str], x_title: str, *, limits: Sequence[tuple[float, str]] = ()
) -> str:
    """A chart with all curves. x_names: tick -> label. limits: horizontal lines to compare with, and their names."""
    values = [y for c in curves for _, y in (*c.points, *c.dots)] + [value for value, _ in limits]
    places = [x for c in curves for x, _ in (*c.points, *c.dots)]
    marks, low, high = ticks(min(values), max(values)), min(places), max(places)
    wide = (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - low) / wide if high > low else 0.5
        up = (y - marks[0]) / (marks[-1] - marks[0])
        return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    out = _axes(marks, x_names, x_title, at, low)
    for value, name in limits:
        y = at(low, value)[1]
        out.append(f"<line class='reference' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
                   f"<text class='reference' x='{WIDTH - RIGHT}' y='{y - 5:.1f}' text-anchor='end'>"
                   f"{escape(name)}</text>")  # fmt: skip
    for curve in curves:
        out += _curve(curve, at)
    words = "; ".join(f"{c.name} {c.points[0][1]:.3g} to {c.points[-1][1]:.3g}" for c in curves if c.points)
    alt = escape(words, quote=True)
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{alt}'>{''.join(out)}</svg>"


def _axes(marks: Sequence[float], x_names: dict[float, str], x_title: str, at, low: float) -> list[str]:
    out = []
    for mark in marks:
        y = at(low, mark)[1]
        out.append(f"<line class='rule' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        out.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{round(mark, 10):,g}</text>")
    every = -(-len(x_names) // 14)
    for i, (x, name) in enumerate(x_names.items()):
        if i % every == 0:
            spot = at(x, marks[0])[0]
            out.append(f"<text x='{spot:.1f}' y='{HEIGHT - BOTTOM + 17}' text-anchor='middle'>{escape(name)}</text>")
    out.append(f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 5}' text-anchor='end'>{escape(x_title)}</text>")
    return out


def _curve(curve: Curve, at) -> list[str]:
    dash = " stroke-dasharray='5 4'" if curve.dashed else ""
    spots = [at(x, y) for x, y in curve.dots]
    out = [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.4' fill='{curve.colour}' fill-opacity='.4'/>" for x, y in spots]
    points = [at(x, y) for x, y in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    out.append(f"<polyline class='line' style='stroke:{curve.colour}'{dash} points='{path}'>"
               f"<title>{escape(curve.name)}</title></polyline>")  # fmt: skip
    if len(points) <= 40 and not curve.dots:
        out += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' style='fill:{curve.colour}'/>" for x, y in points]
    return out


def legend(curves: Sequence[Curve]) -> str:
    """The names of the curves in their colours, as HTML."""
    dash = {True: "dashed", False: "solid"}
    keys = [f"<span><i style='border-top:3px {dash[c.dashed]} {c.colour}'></i>{escape(c.name)}</span>" for c in curves]
    return f"<p class='legend'>{''.join(keys)}</p>"


def matrix(values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], words: str) -> str:
    """Numbers in 0..1 as a matrix of shades, row 0 at the top; the numbers are printed where there is room."""
    width, height = MARGIN + CELL * len(columns) + 8, CELL * len(rows) + 40
    roomy, every = len(columns) <= 16, -(-max(len(rows), len(columns)) // 16)
    out = []
    for r, row in enumerate(values):
        y = CELL * r + 4
        if r % every == 0:
            out.append(f"<text x='{MARGIN - 8}' y='{y + CELL / 2 + 4}' text-anchor='end'>{escape(rows[r])}</text>")
        for c, value in enumerate(row):
            x = MARGIN + CELL * c
            text = "-" if value is None else f"{value:.2f}"
            fill = "none" if value is None else blend(SHADE, value)
            title = f"<title>{escape(rows[r])}, {escape(columns[c])}: {text}</title>"
            out.append(f"<rect x='{x}' y='{y}' width='{CELL}' height='{CELL}' fill='{fill}'>{title}</rect>")
            if roomy and value is not None:
                ink, number = "#15181c" if value > 0.6 else "#fff", "1" if value >= 0.995 else text.replace("0.", ".")
                out.append(f"<text x='{x + CELL / 2}' y='{y + CELL / 2 + 4}' text-anchor='middle' "
                           f"style='fill:{ink};font-size:10px'>{number}</text>")  # fmt: skip
    for c in range(0, len(columns), every):
        x = MARGIN + CELL * c + CELL / 2
        out.append(f"<text x='{x}' y='{CELL * len(rows) + 20}' text-anchor='middle'>{escape(columns[c])}</text>")
    alt = escape(words, quote=True)
    size = f"style='max-width:{min(560, round(1.15 * width))}px'"
    return f"<svg {size} viewBox='0 0 {width} {height}' role='img' aria-label='{alt}'>{''.join(out)}</svg>"
