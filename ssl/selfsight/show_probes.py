"""The second table of `selfsight show`: what probes have found, of runs and of single JSON files.

Numbers of one column that were not measured in the same way (protocol, image size, data) carry letters, and the letters
are explained below the table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import config
from .results import METRICS, Result, eval_names, eval_results, read_result
from .schema import ConfigError
from .training.log import read_metrics

COUNTED = ("name", "protocol", "bank", "test", "seeds")  # said already
PRECISION = ("precision", "dtype", "channels_last")

Cells = dict[str, Result]  # by column


def probes_of(folder: Path) -> Cells:
    """Of a run folder: `probes/**/*.json` by path, and the last number of each evaluation as eval.<name>."""
    found: Cells = {}
    for path in sorted((folder / "probes").rglob("*.json")):
        if result := read_result(path):
            found[path.relative_to(folder / "probes").with_suffix("").as_posix()] = result
    for name in eval_names(folder):
        if results := eval_results(folder, name):
            found[f"eval.{name}"] = results[max(results)]
    return found


def curves_of(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each evaluation with its metric, the (images seen, percent) of every step."""
    out = {}
    for name in eval_names(folder):
        rows = read_metrics(folder / "evals" / f"{name}.csv")
        for metric, words in METRICS.items():
            if points := [(float(row["images"]), float(row[metric])) for row in rows if row.get(metric)]:
                out[f"{name}, {words} %"] = points
    return out


def measured(result: Result) -> str:
    """How a number came about: two numbers may be compared where this is the same."""
    facts, data = result.facts, result.facts.get("data") or {}
    size, bank, queries = (facts.get(k) for k in ("image_size", "n_bank", "n_query"))
    protocol = facts.get("protocol") or "protocol unknown."
    where = f"trained on {bank} images of {data.get('train')}, tested on {queries} of {data.get('test')}"
    return f"{METRICS[result.metric]}. {protocol} {size} px; {where}.{_unusual(facts.get('settings') or {})}"


def _unusual(settings: Mapping[str, Any]) -> str:
    """Settings of a probe that are not as usual: words do not name all of them, and each makes another measurement."""
    probe, bank = settings.get("probe") or {}, settings.get("bank") or {}
    try:
        usual = _usual(str(probe["name"]))
    except (ConfigError, KeyError):  # of another version
        return ""
    usually = usual["probe"]
    odd = [f"{k}={v}" for k, v in probe.items() if k not in COUNTED and usually.get(k, v) != v]
    odd += [f"bank.{key}={bank[key]}" for key in PRECISION if bank.get(key, usual["bank"][key]) != usual["bank"][key]]
    return f" Not as usual: {', '.join(odd)}." if odd else ""


@cache
def _usual(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(config.load("probe", ["checkpoint=-", f"probe={name}"]))


def probe_table(rows: Mapping[str, Cells]) -> str:
    """Aligned text, one line per run (or file) that has a number, and footnotes; empty if nothing was probed."""
    rows = {name: cells for name, cells in rows.items() if cells}
    columns = sorted({column for cells in rows.values() for column in cells}, key=lambda c: (c.startswith("eval."), c))
    notes = _notes(rows, columns)
    lines = [["probe, %", *columns]]
    lines += [[name, *(_cell(cells.get(column), notes.get(column, {})) for column in columns)]
              for name, cells in rows.items()]  # fmt: skip
    if len(lines) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in text), *_footnotes(notes)])


def _notes(rows: Mapping[str, Cells], columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of columns whose numbers were measured in several ways: way -> letter. Equal ways share a letter everywhere."""
    letters: dict[str, str] = {}
    notes = {}
    for column in columns:
        ways = list(dict.fromkeys(measured(cells[column]) for cells in rows.values() if column in cells))
        if len(ways) > 1:
            notes[column] = {way: letters.setdefault(way, _letter(len(letters))) for way in ways}
    return notes


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else f"{chr(ord('a') + i % 26)}{i // 26}"


def _cell(result: Result | None, letters: Mapping[str, str]) -> str:
    if result is None:
        return "-" + "  " * bool(letters)
    error = "" if result.error is None else f" ±{result.error:.1f}"
    step = result.facts.get("step")
    at = f" @{step}" if step is not None else ""
    return f"{result.value:.1f}{error}{at}" + (f" {letters[measured(result)]}" if letters else "")


def _footnotes(notes: Mapping[str, Mapping[str, str]]) -> list[str]:
    if not notes:
        return []
    ways = {letter: way for letters in notes.values() for way, letter in letters.items()}
    lines = ["", f"not comparable across letters, being measured in other ways ({', '.join(notes)}):"]
    for letter, way in sorted(ways.items()):
        lines += textwrap.wrap(way, 118, initial_indent=f"  {letter}  ", subsequent_indent="     ")
    return lines
