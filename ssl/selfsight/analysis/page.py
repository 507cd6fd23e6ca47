"""analysis.html: the numbers of an analysis as charts, beside what they mean, with the pictures; self-contained."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..training.report import STYLE
from .charts import DEPTH, Curve, blend, legend, matrix, plot
from .gallery import Picture, short

EXTRA = """
.legend { margin:6px 0 2px; font-size:.84rem; color:var(--soft); display:flex; flex-wrap:wrap; gap:2px 14px; }
.legend i { display:inline-block; width:17px; margin-right:6px; vertical-align:middle; }
th { text-align:left; padding:6px 12px 6px 0; border-bottom:1px solid var(--rule); font-weight:600; }
.chart p.words { margin:2px 0 6px; font-size:.84rem; color:var(--soft); }
figure img { width:auto; max-width:100%; } .chart svg { margin:0 auto; }
"""
COLOURS = ("var(--line)", "var(--mark)")
Layer = dict[str, Any]
Read = Callable[[Layer], Any]


def write_page(result: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page as text, from what analysis.json holds and the PNG files."""
    subjects = [s for s in (result["checkpoint"], result["against"]) if s]
    names = _names(subjects)
    title = " against ".join(names)
    attention = _cards(_attention(subjects, names))
    parts = [
        f"<h1>{escape(title)}</h1><p class='sub'>{escape(result['protocol'])}</p>",
        _tiles(subjects, names),
        _section("What the heads look at", attention),
        _section("Rank and uniformity", _cards(_features(subjects, names))),
        _section("Frequencies", _cards(_fourier(subjects, names))),
        _section("High-norm tokens", _cards(_norms(subjects, names))),
        _section("How alike layers are", _cards(_cka(result["cka"], subjects, names))),
        _section("Pictures", "".join(_figure(picture, names) for picture in pictures)),
    ]
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
            f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<meta name='color-scheme' content='light dark'><style>{STYLE}{EXTRA}</style></head>"
            f"<body>{''.join(parts)}</body></html>\n")  # fmt: skip


def _names(subjects: Sequence[dict[str, Any]]) -> list[str]:
    """Short names: objective on backbone; the checkpoints themselves where those do not tell them apart."""
    short = [" on ".join(str(s[k]) for k in ("objective", "backbone") if s.get(k)) for s in subjects]
    if len(set(short)) < len(short):
        short = [f"{words} ({s['checkpoint']}, step {s['step']})" for words, s in zip(short, subjects)]
    return short if len(set(short)) == len(short) else [f"{words} [{i + 1}]" for i, words in enumerate(short)]


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _cards(cards: Sequence[tuple[str, str, str, str]]) -> str:
    """(title, unit, explanation, SVG and legend) as cards; those with nothing to draw are left out."""
    out = []
    for title, unit, words, body in (card for card in cards if card[3]):
        heading = f"<h3>{escape(title)} <span class='unit'>{escape(unit)}</span></h3>"
        out.append(f"<div class='chart'>{heading}<p class='words'>{escape(words)}</p>{body}</div>")
    return f"<div class='charts'>{''.join(out)}</div>" if out else ""


def _tiles(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The headline numbers: tiles of one checkpoint, a table of two."""
    found = []
    for s in subjects:
        pooled, last = s["pooled"], s["layers"][-1]
        found.append({"RankMe, pooled feature": f"{pooled['rankme']:.1f} of {pooled['width']}",
                      "the same, centred": f"{pooled['rankme_centred']:.1f} of {pooled['width']}",
                      "alpha, pooled and centred": _text(pooled["alpha_centred"], ".2f"),
                      "token cosine, last layer": _text(last["token_cosine"], ".2f"),
                      "high-norm tokens, last layer": f"{last['norms']['outliers']:.2%}"})  # fmt: skip
    if len(subjects) == 1:
        cells = [f"<div class='tile'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in found[0].items()]
        return f"<div class='tiles'>{''.join(cells)}</div>"
    rows = ["".join(f"<td>{escape(v)}</td>" for v in (key, *(one[key] for one in found))) for key in found[0]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# --- charts over layers -------------------------------------------------------------------------------------------


def _over_layers(
    subjects: Sequence[dict[str, Any]], names: Sequence[str], reads: dict[str, Read], **options: Any
) -> str:
    """A chart of one or more numbers per layer, for each checkpoint. A read may give a list: the heads, as dots.

    Where two checkpoints have other layers they share an axis of relative depth.
    """
    curves = []
    measured = [any(read(layer) is not None for read in reads.values() for layer in s["layers"]) for s in subjects]
    layers = {tuple(layer["name"] for layer in s["layers"]) for s, has in zip(subjects, measured) if has}
    for s, name, colour in zip(subjects, names, COLOURS):
        place = 1 if len(layers) == 1 else 1 / max(1, len(s["layers"]) - 1)
        for i, (what, read) in enumerate(reads.items()):
            found = [(place * x, value) for x, layer in enumerate(s["layers"]) if (value := read(layer)) is not None]
            points = [(x, sum(v) / len(v) if isinstance(v, list) else v) for x, v in found]
            dots = [(x, head) for x, v in found if isinstance(v, list) for head in v]
            words = ", ".join(w for w in (what, name if len(subjects) > 1 else "") if w)
            if points:
                curves.append(Curve(words, points, colour, dots, dashed=i > 0))
    if not curves:
        return ""
    keys = legend(curves) if len(curves) > 1 or len(subjects) > 1 else ""
    if len(layers) > 1:
        return plot(curves, {0: "first", 0.25: "¼", 0.5: "½", 0.75: "¾", 1: "last"}, "layer", **options) + keys
    return plot(curves, {float(i): short(name) for i, name in enumerate(layers.pop())}, "layer", **options) + keys


def _attention(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    def of(key: str) -> Read:
        return lambda layer: layer.get("attention", {}).get(key)

    grids = {math.prod(layer["grid"]) for s in subjects for layer in s["layers"] if layer.get("attention")}
    uniform = [(math.log(n), f"uniform over {n} patches") for n in sorted(grids)]
    cards = [
        ("Attention distance", "px", "how far heads look on average; a dot per head", _over_layers(
            subjects, names, {"": of("distance")})),
        ("Entropy", "nats", "how widely attention is spread", _over_layers(
            subjects, names, {"": of("entropy")}, limits=uniform)),
        ("NMI of query and key", "", "0: all queries look at the same places; 1: each at its own", _over_layers(
            subjects, names, {"": of("nmi")})),
        ("Likeness of heads", "mean cosine", "1: all heads do the same", _over_layers(
            subjects, names, {"": of("head_cosine")})),
    ]  # fmt: skip
    if any(max(layer["attention"]["to_prefix"]) > 0 for s in subjects for layer in s["layers"] if "attention" in layer):
        cards.append(("Left out", "share", "attention of patches to class token and registers",
                      _over_layers(subjects, names, {"": of("to_prefix")})))  # fmt: skip
    return cards


def _features(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    def mean(key: str) -> Read:
        return lambda layer: layer["patch_mean"][key]

    return [
        ("RankMe", "", "effective rank of the mean patch over images", _over_layers(
            subjects, names, {"as they are": mean("rankme"), "centred": mean("rankme_centred")})),
        ("alpha-ReQ", "", "how fast the eigenvalues of the mean patch fall; near 1 is reported as best", _over_layers(
            subjects, names, {"as they are": mean("alpha"), "centred": mean("alpha_centred")}, limits=[(1.0, "1")])),
        ("Token cosine", "", "between the patches of an image; 1: all point the same way", _over_layers(
            subjects, names, {"": lambda layer: layer["token_cosine"]})),
        ("Relative residual", "", "what is left of the patches without their mean; 0: all are the same", _over_layers(
            subjects, names, {"": lambda layer: layer["relative_residual"]})),
    ]  # fmt: skip


def _fourier(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    cards = []
    for s, name in zip(subjects, names):
        curves = []
        for i, layer in enumerate(s["layers"]):
            if layer["fourier"]:
                side, colour = min(layer["grid"]), blend(DEPTH, i / max(1, len(s["layers"]) - 1))
                points = [(2 * k / side, value) for k, value in enumerate(layer["fourier"])]
                curves.append(Curve(short(layer["name"]), points, colour))
        if curves:
            shown = curves if len(curves) <= 16 else [curves[round(i * (len(curves) - 1) / 11)] for i in range(12)]
            axis = {0.0: "0", 0.25: "π/4", 0.5: "π/2", 0.75: "3π/4", 1.0: "π"}
            words = "log-amplitude of the token map, minus that of frequency 0; a line per layer"
            cards.append((f"Amplitude, {name}", "", words, plot(curves, axis, "frequency") + legend(shown)))
    at_top = _over_layers(subjects, names, {"": lambda layer: layer["fourier"] and layer["fourier"][-1]})
    if at_top:
        words = "the ends of those lines: low where a layer smooths, high where it keeps detail"
        cards.append(("Amplitude at the highest frequency", "", words, at_top))
    return cards


def _norms(subjects: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    def norm(key: str) -> Read:
        return lambda layer: layer["norms"][key]

    return [
        ("Outliers", "%", "patches whose norm exceeds median + 6 MAD of their layer", _over_layers(
            subjects, names, {"": lambda layer: 100 * layer["norms"]["outliers"]})),
        ("Norms", "", "of patches: the median, and the largest", _over_layers(
            subjects, names, {"median": norm("median"), "largest": norm("max")})),
    ]  # fmt: skip


def _cka(
    found: dict[str, Any], subjects: Sequence[dict[str, Any]], names: Sequence[str]
) -> list[tuple[str, str, str, str]]:
    labels = [[short(layer["name"]) for layer in s["layers"]] for s in subjects]
    cards = [("Linear CKA", "", f"layers of {names[0]} among themselves",
              matrix(found["checkpoint"], labels[0], labels[0], "CKA between layers"))]  # fmt: skip
    if len(subjects) > 1:
        cards.append(("Linear CKA", "", f"layers of {names[1]} among themselves",
                      matrix(found["against"], labels[1], labels[1], "CKA between layers")))  # fmt: skip
        cards.append(("Linear CKA", "", f"rows: {names[0]}; columns: {names[1]}",
                      matrix(found["between"], labels[0], labels[1], "CKA between the checkpoints")))  # fmt: skip
    return cards


def _figure(picture: Picture, names: Sequence[str]) -> str:
    name = names[picture.path.name.startswith("against")] if len(names) > 1 else ""
    words = f"{name}. {picture.words}" if name else picture.words
    data = base64.b64encode(picture.path.read_bytes()).decode()
    image = f"<img alt='{escape(words, quote=True)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"
