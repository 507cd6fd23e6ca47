"""`selfsight show runs/*`: run folders side by side, as tables and as curves (`show.svg`).

JSON files of probes may be named as well: they are rows of the second table.
"""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .results import read_result
from .show_probes import Cells, curves_of, probe_table, probes_of
from .training.log import count, read_metrics

FILES = ("config.yaml", "summary.json", "metrics.csv")  # any of them makes a folder a run folder
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#8b5a2b", "#555555")
Points = list[tuple[float, float]]


class ShowError(ValueError):
    """What was named is no run folder; the message says which one is near."""


class Run(NamedTuple):
    """One run folder: its summary (of a finished run) or what metrics.csv says so far, and its curves over images."""

    folder: Path
    status: str  # done | running at step N of M | stopped at step N of M
    numbers: dict[str, Any]
    loss: Points
    knn: Points
    probes: Cells  # numbers by column of the second table
    evals: dict[str, Points]  # curves of the evaluations during training, by title


def show(cfg: Any) -> list[dict[str, Any]]:
    """Print the tables of the run folders `cfg.runs` and write their curves to `cfg.out` (default show.svg).

    Returns the numbers of each run and each JSON file; "probes" are those of the second table. Raises ShowError for a
    folder that is not there or holds no run; entries of a pattern like runs/* that are no runs are left out as long as
    one is.
    """
    out = Path(cfg.get("out") or "show.svg")
    if out.suffix != ".svg":
        raise ShowError(f"out={out} does not end in .svg, the format of the curves")
    named = [_existing(Path(name)) for name in cfg.runs]
    files = {str(path): {path.stem: found} for path in named if path.is_file() and (found := read_result(path))}
    folders = [path for path in named if str(path) not in files]
    others = [folder for folder in folders if not _is_run(folder)]
    if len(others) == len(folders) and not files:
        raise ShowError(f"{others[0]} is no run folder: it holds none of {', '.join(FILES)}{_near(others[0])}")
    runs = [read_run(folder) for folder in folders if folder not in others]
    tables = [table(runs) if runs else "", probe_table({str(run.folder): run.probes for run in runs} | files)]
    print("\n\n".join(filter(None, tables)))
    if others:
        print(f"\nleft out, no run folders: {', '.join(map(str, others))}")
    if any(run.loss or run.knn or run.evals for run in runs):
        out.write_text(curves(runs), encoding="utf-8")
        print(f"\ncurves: {out}")
    return [{"run": str(run.folder), "status": run.status, **run.numbers, **_probed(run.probes)} for run in runs] + [
        {"file": name, **_probed(cells)} for name, cells in files.items()
    ]


def _probed(cells: Cells) -> dict[str, Any]:
    if not cells:
        return {}
    return {"probes": {c: {r.metric: r.value, "standard_error": r.error} for c, r in cells.items()}}


# ---- reading -------------------------------------------------------------------------------------------------


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in FILES)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ShowError(f"{path} does not exist{_near(path)}")
    return path


def _near(path: Path) -> str:
    """The run folder that was probably meant: beside the path, else in runs/."""
    places = [place for place in (path.parent, Path("runs"), path) if place.is_dir()]
    known = {str(p) for place in places for p in place.iterdir() if _is_run(p)}
    if not known:
        return "; no run folder is near it"
    by_name = {Path(p).name: p for p in sorted(known)}
    close = difflib.get_close_matches(path.name, by_name, n=1, cutoff=0.0)
    return f"; the nearest run folder is {by_name[close[0]]}"


def read_run(folder: Path) -> Run:
    """What a run folder holds; numbers that are not there are None."""
    cfg = config.read(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    rows = read_metrics(folder / "metrics.csv")
    summary = _summary(folder / "summary.json")
    loss, knn = _points(rows, "loss"), _points(rows, "knn")
    numbers = {key: (cfg.get(key) or {}).get("name") for key in ("objective", "backbone", "data")}
    numbers |= summary or _so_far(rows, loss, knn)
    status = "done" if summary is not None else _unfinished(folder, rows, cfg)
    return Run(folder, status, numbers, loss, knn, probes_of(folder), curves_of(folder))


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShowError(f"{path} is no JSON ({error}): remove it to see the run by its metrics.csv") from None
    keys = ("loss_first", "loss_last", "knn_untrained", "knn", "rankme", "images_per_second", "images_seen", "steps")
    return {key: found.get(key) for key in (*keys, "seconds")} | {
        key: found[key] for key in ("objective", "backbone") if found.get(key)
    }


def _so_far(rows: list[dict[str, str]], loss: Points, knn: Points) -> dict[str, Any]:
    speeds = sorted(float(row["images_per_second"]) for row in rows if row.get("images_per_second"))
    rank = [float(row["rankme"]) for row in rows if row.get("rankme")]
    later = [value for images, value in knn if images > 0]
    seen = float(rows[-1].get("images", 0)) if rows else 0
    middle = speeds[len(speeds) // 2] if speeds else None
    return {
        "loss_first": loss[0][1] if loss else None,
        "loss_last": loss[-1][1] if loss else None,
        "knn_untrained": next((value for images, value in knn if images == 0), None),
        "knn": later[-1] if later else None,
        "rankme": rank[-1] if rank else None,
        "images_per_second": middle,
        "images_seen": int(seen),
        "steps": int(rows[-1]["step"]) if rows else 0,
        "seconds": seen / middle if middle else None,
    }


def _points(rows: list[dict[str, str]], column: str) -> Points:
    """(images seen, value) of the rows that have this column, a finite number."""
    found = [(float(row.get("images", 0)), float(row[column])) for row in rows if row.get(column)]
    return [(images, value) for images, value in found if math.isfinite(value)]


def _unfinished(folder: Path, rows: list[dict[str, str]], cfg: Any) -> str:
    step = int(rows[-1]["step"]) if rows else 0
    total = f" of {cfg['max_steps']}" if cfg and cfg.get("max_steps") else ""
    return f"{'running' if _alive(folder, rows) else 'stopped'} at step {step}{total}"


def _alive(folder: Path, rows: list[dict[str, str]]) -> bool:
    """Whether the log was written as recently as its pace lets expect; evaluations may take a minute."""
    path = folder / "metrics.csv"
    if not path.exists():
        return False
    pace = 0.0
    if len(rows) > 1 and rows[-1].get("images_per_second"):
        pace = (float(rows[-1]["images"]) - float(rows[-2]["images"])) / float(rows[-1]["images_per_second"])
    return time.time() - path.stat().st_mtime < 60 + 3 * pace


# ---- table ---------------------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """The runs as aligned text, one line each."""
    head = ("run", "objective", "backbone", "data", "steps", "images", "loss", "k-NN %", "RankMe", "img/s", "min", "")
    rows = [head, *(_cells(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 4 or i == 11 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(run: Run) -> tuple[str, ...]:
    n = run.numbers

    def text(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if n.get(key) is None else form.format(n[key] / scale)

    def change(first: str, last: str, form: str) -> str:
        return "-" if n.get(first) is None and n.get(last) is None else f"{text(first, form)} -> {text(last, form)}"

    return (
        str(run.folder), *(n.get(key) or "-" for key in ("objective", "backbone", "data")),
        text("steps", "{:,.0f}"), count(n["images_seen"]) if n.get("images_seen") is not None else "-",
        change("loss_first", "loss_last", "{:.4f}"), change("knn_untrained", "knn", "{:.1f}"),
        text("rankme", "{:.1f}"), text("images_per_second", "{:,.0f}"), text("seconds", "{:,.1f}", 60), run.status,
    )  # fmt: skip


# ---- curves --------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP = 430, 260, 60, 40


def curves(runs: Sequence[Run]) -> str:
    """An SVG picture: k-NN, loss and evaluations over images seen, one colour per run; a panel without numbers is left
    out."""
    panels = [("k-NN, %", [r.knn for r in runs]), ("loss", [r.loss for r in runs])]
    panels += [(title, [r.evals.get(title, []) for r in runs]) for title in sorted({t for r in runs for t in r.evals})]
    panels = [(title, lines) for title, lines in panels if any(lines)]
    width = len(panels) * (_WIDTH + _LEFT + 20) + 20
    height = _TOP + _HEIGHT + 50 + 18 * len(runs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (title, lines) in enumerate(panels):
        parts += _panel(title, lines, _LEFT + i * (_WIDTH + _LEFT + 20))
    for i, run in enumerate(runs):
        y = _TOP + _HEIGHT + 54 + 18 * i
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="18" height="4" fill="{_colour(i)}"/>')
        parts.append(f'<text x="{_LEFT + 26}" y="{y - 3}">{escape(f"{run.folder} ({run.status})")}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _panel(title: str, lines: Sequence[Points], left: float) -> list[str]:
    """One pair of axes with a line per run."""
    xs = [x for line in lines for x, _ in line]
    ys = [y for line in lines for _, y in line]
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = 0.0, max(x_ticks[-1], max(xs))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        down = _TOP + _HEIGHT * (1 - (y - y_low) / (y_high - y_low))
        return left + _WIDTH * (x - x_low) / (x_high - x_low), down

    parts = [f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{escape(title)} over images seen</text>']
    for tick in y_ticks:
        x, y = at(x_low, tick)
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x + _WIDTH:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = at(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{count(tick)}</text>')
    for i, line in enumerate(lines):
        if not line:
            continue
        points = [at(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(i)}" stroke-width="1.8"/>')
        if len(points) < 30:  # single evaluations are seen as such
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_colour(i)}"/>' for x, y in points]
    return parts


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]; at least two."""
    span = high - low or max(abs(high), 1.0)
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if m * step * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
