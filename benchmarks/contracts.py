"""Measure every contract of every objective on every family, and put the table into docs/contracts.md.

python benchmarks/contracts.py              # all cells, in four processes
python benchmarks/contracts.py --only "mae ViT" "glare SHViT"   # these again, the others as they were measured
python benchmarks/contracts.py --table      # write the page from the results that are there
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from page import show

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/contracts.json", ROOT / "docs/contracts.md"


def table(measured: dict[str, Any]) -> str:
    """The table of the page: a row for each cell, what was found for each contract."""
    cells = measured["cells"]
    contracts = list(next(iter(cells.values())))
    rows = [f"| cell | {' | '.join(contracts)} |", "|---|" + "---|" * len(contracts)]
    for name, found in cells.items():
        rows.append(f"| {name} | {' | '.join(entry(found[c]) for c in contracts)} |")
    variants = measured["variants"]
    rows += ["", "| other ways through them | " + " | ".join(contracts[:3]) + " |", "|---|---|---|---|"]
    rows += [f"| {name} | {' | '.join(entry(found[c]) for c in contracts[:3])} |" for name, found in variants.items()]
    when: dict[str, list[str]] = {}
    for name, date in measured["measured"].items():
        when.setdefault(date, []).append(name)
    most = max(when, key=lambda date: len(when[date]))
    others = "".join(f"; on {date} {', '.join(names)}" for date, names in sorted(when.items()) if date != most)
    return "\n".join([*rows, "", f"Measured on {most}{others}; on a CPU."])


def entry(result: dict[str, Any]) -> str:
    return result["note"] if result["ok"] else f"**broken**: {result['note']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CELL")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        measure(args.only)
    measured = json.loads(RESULTS.read_text())
    show(PAGE, "contracts", table(measured))
    wrong = broken(measured)
    print(f"{PAGE}: {len(measured['cells'])} cells, {len(measured['variants'])} variants, broken: {wrong or 'none'}")
    sys.exit(bool(wrong))


def broken(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """(cell or variant, contract) of what does not hold."""
    every = measured["cells"] | measured["variants"]
    return [(name, c) for name, found in every.items() for c, result in found.items() if not result["ok"]]


def measure(only: list[str] | None) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from machine import describe

    import promises  # after the check of the arguments: this takes a while

    start = time.monotonic()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {
        "command": "python benchmarks/contracts.py", "machine": {}, "minutes": 0, "cells": {}, "variants": {},
        "measured": {},
    }  # fmt: skip
    groups = {"cells": promises.CELLS, "variants": promises.VARIANTS}
    wanted = {kind: [name for name in group if only is None or name in only] for kind, group in groups.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = promises.measure(Path(folder), wanted["cells"], wanted["variants"])
    about = describe()
    now = f"{about['date']} with torch {about['torch']}, timm {about['timm']}, Python {about['python']}"
    groups = {kind: list(group) for kind, group in groups.items()}
    results = merged(known, {name: found[name] for names in wanted.values() for name in names}, groups, now)
    if only is None:
        results |= {"machine": about, "minutes": round((time.monotonic() - start) / 60, 1)}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def merged(known: dict[str, Any], found: dict[str, Any], groups: dict[str, list[str]], now: str) -> dict[str, Any]:
    """What is known with what was found now in it: a cell that was not measured keeps its date, and the whole keeps
    the machine and minutes of the last time that all were measured."""
    for kind, names in groups.items():
        known |= {kind: {n: found.get(n) or known[kind][n] for n in names if n in found or n in known[kind]}}
    kept = {name for kind in groups for name in known[kind]}
    return known | {"measured": {n: d for n, d in (known["measured"] | dict.fromkeys(found, now)).items() if n in kept}}


if __name__ == "__main__":
    main()
