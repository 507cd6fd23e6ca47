"""report.html: a run on one self-contained page (no script, no external file), readable while the run still goes on."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..results import METRICS, eval_names
from .log import duration, read_metrics

WIDTH, HEIGHT = 520, 240  # of a chart, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
MAX_POINTS = 600
# column -> (title, unit, explanation, scale to the unit shown); other columns follow under their own names
CURVES = {
    "loss": ("Loss", "", "as logged, not smoothed", 1),
    "knn": ("k-NN accuracy", "%", "on a fixed bank and fixed queries", 1),
    "rankme": ("RankMe", "", "effective rank of the features; a fall towards 1 is collapse", 1),
    "feature_std": ("Feature deviation", "", "of unit-length features; 0 is collapse", 1),
    "lr": ("Learning rate", "", "", 1),
    "images_per_second": ("Speed", "images/s", "all processes together", 1),
    "data_wait": ("Data wait", "%", "share of the time spent waiting for images", 100),
    "mfu": ("Model FLOPs utilisation", "%", "of the devices' peak", 100),
}
HIDDEN = {"step", "images", "epoch", "knn_raw_pixels", "bad_samples"}
PICTURES = {
    "reconstruction": "What the model sees, and what it fills in",
    "views": "Views of an image, and what the teacher looks at",
    "blocks": "Context and target blocks; the teacher's features there, and what is predicted of them",
    "pca": "Principal components of the patch tokens: equal colours mean similar features",
}
TILES = (("knn", "k-NN", "{:.1f} %"), ("loss_last", "final loss", "{:.4g}"), ("rankme", "RankMe", "{:.1f}"),
         ("images_seen", "images seen", "{:,}"), ("images_per_second", "images per second", "{:,.0f}"),
         ("seconds", "time", ""))  # fmt: skip

STYLE = """
:root { --paper:#fcfcfb; --card:#fff; --ink:#1f2328; --soft:#667079; --rule:#e3e5e8; --line:#2563a8; --mark:#b4540a; }
@media (prefers-color-scheme: dark) {
  :root { --paper:#15181c; --card:#1c2025; --ink:#e6e8ea; --soft:#98a1aa; --rule:#31373e;
          --line:#6cb0f5; --mark:#f0a35e; }
}
* { box-sizing: border-box; }
body { margin:0 auto; max-width:1120px; padding:40px 24px 72px; background:var(--paper); color:var(--ink);
       font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
h1 { font-size:2rem; line-height:1.2; margin:0 0 4px; letter-spacing:-.015em; }
h2 { font-size:1.15rem; margin:44px 0 14px; }
p.sub, figcaption, .unit { color:var(--soft); } p.sub { margin:0 0 28px; overflow-wrap:anywhere; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; }
.tile, .chart, figure, details { background:var(--card); border:1px solid var(--rule); border-radius:10px; }
.tile { padding:14px 16px; }
.tile b { display:block; font-size:1.35rem; white-space:nowrap; font-weight:600; letter-spacing:-.01em; }
.tile span { color:var(--soft); font-size:.86rem; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)); gap:16px; }
.chart { padding:14px 14px 6px; } .chart h3 { margin:0; font-size:.98rem; }
.chart h3 .unit { font-weight:400; font-size:.86rem; } .chart svg { width:100%; height:auto; display:block; }
svg text { fill:var(--soft); font:11.5px system-ui,sans-serif; } svg .rule { stroke:var(--rule); }
svg .line { fill:none; stroke:var(--line); stroke-width:1.8; stroke-linejoin:round; } svg .dot { fill:var(--line); }
svg .reference { stroke:var(--mark); stroke-dasharray:5 4; stroke-width:1.3; }
svg text.reference { fill:var(--mark); stroke:none; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
td { padding:6px 12px 6px 0; border-bottom:1px solid var(--rule); vertical-align:top; overflow-wrap:anywhere; }
td:first-child { color:var(--soft); width:34%; }
figure { margin:0 0 16px; padding:14px; }
figure img { width:100%; height:auto; display:block; border-radius:4px; background:#fff; }
figcaption { font-size:.9rem; margin-top:8px; } details { padding:10px 16px; margin-bottom:12px; }
summary { cursor:pointer; font-weight:600; }
pre { overflow-x:auto; font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; }
"""


class Series(NamedTuple):
    """(step, value) points in order, and horizontal lines to compare with: name -> value."""

    points: list[tuple[float, float]]
    references: dict[str, float]


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from what is there: config.yaml, metrics.csv, evals/, summary.json, pictures/."""
    run_dir = Path(run_dir)
    summary = _read_json(run_dir / "summary.json")
    config = (run_dir / "config.yaml").read_text() if (run_dir / "config.yaml").exists() else ""
    rows = read_metrics(run_dir / "metrics.csv")
    names = [str(summary[k]) for k in ("objective", "backbone") if summary.get(k)]
    title = " on ".join(names) or run_dir.name
    parts = [
        f"<h1>{escape(title)}</h1><p class='sub'>{escape(_subtitle(run_dir, summary, rows))}</p>",
        _tiles(summary),
        _section("Curves", _charts(rows, summary)),
        _section("Evaluations", _evaluations(run_dir)),
        _section("Pictures", _pictures(run_dir / "pictures")),
        _section("Summary", _summary(summary)),
        _section("Configuration", _folded("The resolved configuration", config)),
    ]
    page = (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
            f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<meta name='color-scheme' content='light dark'><style>{STYLE}</style></head>"
            f"<body>{''.join(parts)}</body></html>\n")  # fmt: skip
    path = run_dir / "report.html"
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    tmp.write_text(page, encoding="utf-8")
    tmp.replace(path)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _subtitle(run_dir: Path, summary: dict[str, Any], rows: Sequence[dict[str, str]]) -> str:
    step = summary.get("steps") or (rows[-1]["step"] if rows else 0)
    state = "" if summary else ", still running"
    when = (summary.get("provenance") or {}).get("time", "")
    return " · ".join(str(x) for x in (run_dir, f"{int(step):,} steps{state}", when) if x)


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _tiles(summary: dict[str, Any]) -> str:
    cells = []
    for key, name, form in TILES:
        if (value := summary.get(key)) is not None:
            text = duration(value) if key == "seconds" else form.format(value)
            cells.append(f"<div class='tile'><b>{escape(text)}</b><span>{escape(name)}</span></div>")
    return f"<div class='tiles'>{''.join(cells)}</div>" if cells else ""


# --- curves ------------------------------------------------------------------------------------------------------


def _charts(rows: Sequence[dict[str, str]], summary: dict[str, Any]) -> str:
    columns = list(dict.fromkeys([*CURVES, *(k for row in rows for k in row)]))
    charts = []
    for column in columns:
        title, unit, words, scale = CURVES.get(column, (column.replace("_", " "), "", "", 1))
        points = [(float(r["step"]), scale * v) for r in rows if (v := _number(r.get(column))) is not None]
        if column in HIDDEN or not points:
            continue
        series = Series(_thin(points), _references(column, summary, rows))
        small = ", ".join(w for w in (unit, words) if w)
        heading = f"<h3>{escape(title)} <span class='unit'>{escape(small)}</span></h3>"
        charts.append(f"<div class='chart'>{heading}{chart(series, title)}</div>")
    return f"<div class='charts'>{''.join(charts)}</div>" if charts else ""


def _evaluations(run_dir: Path) -> str:
    """The curves of `evals/*.csv`, with the standard error of the last number."""
    charts = []
    for name in eval_names(run_dir):
        rows = read_metrics(run_dir / "evals" / f"{name}.csv")
        for metric, word in METRICS.items():
            points = [(float(r["step"]), v) for r in rows if (v := _number(r.get(metric))) is not None]
            if not points:
                continue
            error = _number(rows[-1].get("standard_error"))
            small = f"{word}, %; {points[-1][1]:.2f}{f' ± {error:.2f}' if error is not None else ''} at the last"
            heading = f"<h3>{escape(name)} <span class='unit'>{escape(small)}</span></h3>"
            charts.append(f"<div class='chart'>{heading}{chart(Series(_thin(points), {}), f'{name} {word}')}</div>")
    return f"<div class='charts'>{''.join(charts)}</div>" if charts else ""


def _number(text: str | None) -> float | None:
    """A finite number, or None (blank cells, n/a, nan)."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points, always with the last; extremes of a long curve are kept, step by step."""
    stride = -(-2 * len(points) // MAX_POINTS)
    if stride <= 2:
        return points
    kept = []
    for i in range(0, len(points), stride):
        part = points[i : i + stride]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _references(column: str, summary: dict[str, Any], rows: Sequence[dict[str, str]]) -> dict[str, float]:
    if column != "knn":
        return {}
    first = rows[0] if rows else {}
    found = {"raw pixels": summary.get("knn_raw_pixels", _number(first.get("knn_raw_pixels"))),
             "at the start" if summary.get("init") else "untrained": summary.get(
                 "knn_untrained", _number(first.get("knn")))}  # fmt: skip
    return {name: float(value) for name, value in found.items() if value is not None}


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span [low, high], about `count` of them."""
    if high <= low:
        high, low = low + (abs(low) or 1.0) * 0.5, low - (abs(low) or 1.0) * 0.5
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        text = f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
        return re.sub(r"\.?0+e", "e", text)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def chart(series: Series, name: str) -> str:
    """An inline SVG line chart over steps with axes, tick labels and reference lines. name: for screen readers."""
    points, references = series
    values = [v for _, v in points] + list(references.values())
    steps = [s for s, _ in points]
    ys, xs = ticks(min(values), max(values)), ticks(0, max(steps) or 1, 6)
    x_high = max(steps) or 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / x_high

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ys[0]) / (ys[-1] - ys[0])

    out = []
    for tick in ys:
        out.append(f"<line class='rule' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(tick):.1f}' y2='{y(tick):.1f}'/>")
        text = _label(tick, ys[1] - ys[0])
        out.append(f"<text x='{LEFT - 8}' y='{y(tick) + 4:.1f}' text-anchor='end'>{text}</text>")
    for tick in (t for t in xs if t <= x_high * 1.001 and t == int(t)):
        text = _label(tick, xs[1] - xs[0])
        out.append(f"<text x='{x(tick):.1f}' y='{HEIGHT - BOTTOM + 17}' text-anchor='middle'>{text}</text>")
    out.append(f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 4}' text-anchor='end'>step</text>")
    out += _reference_lines(references, y)
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    out.append(f"<polyline class='line' points='{path}'/>")
    if len(points) <= 30:
        out += [f"<circle class='dot' cx='{x(s):.1f}' cy='{y(v):.1f}' r='2.6'/>" for s, v in points]
    label = escape(f"{name}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last", quote=True)
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}'>{''.join(out)}</svg>"


def _reference_lines(references: dict[str, float], y: Any) -> list[str]:
    """Dashed lines with their names at the right; names of close lines are moved apart."""
    out, last = [], math.inf
    for name, value in sorted(references.items(), key=lambda item: item[1]):
        at = y(value)
        text = min(at - 5, last - 13)
        last = text
        out.append(f"<line class='reference' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}'/>")
        words = f"{escape(name)} {value:.1f}"
        out.append(f"<text class='reference' x='{WIDTH - RIGHT}' y='{text:.1f}' text-anchor='end'>{words}</text>")
    return out


# --- pictures, tables --------------------------------------------------------------------------------------------


def _pictures(folder: Path) -> str:
    """Of each kind the newest and the first, embedded; those between stay files beside the report."""
    out = []
    kinds = sorted({p.stem.rpartition("-")[0] for p in folder.glob("*-*.png")}, key=_picture_order)
    for kind in kinds:
        found = sorted(folder.glob(f"{kind}-*.png"), key=lambda p: p.stem)
        shown = [found[-1]] if len(found) == 1 else [found[-1], found[0]]
        between = f" ({len(found) - 2} more in pictures/)" if len(found) > 2 else ""
        for i, path in enumerate(shown):
            step = path.stem.rpartition("-")[2].lstrip("0") or "0"
            words = f"{PICTURES.get(kind, kind)}: step {step}{between if i else ''}"
            data = base64.b64encode(path.read_bytes()).decode()
            alt = escape(words, quote=True)
            image = f"<img alt='{alt}' src='data:image/png;base64,{data}'>"
            out.append(f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>")
    return "".join(out)


def _picture_order(kind: str) -> tuple[int, str]:
    known = list(PICTURES)
    return (known.index(kind) if kind in known else len(known), kind)


def _summary(summary: dict[str, Any]) -> str:
    rows = [f"<tr><td>{escape(k.replace('_', ' '))}</td><td>{escape(v)}</td></tr>" for k, v in _flat(summary)]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) rows; unknown ones are left out."""
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            out += _flat(value, f"{name}: " if prefix or key != "provenance" else "")
        elif isinstance(value, float):
            out.append((name, f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"))
        elif value is not None:
            grouped = isinstance(value, int) and not isinstance(value, bool)
            out.append((name, f"{value:,}" if grouped else str(value)))
    return out


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""
