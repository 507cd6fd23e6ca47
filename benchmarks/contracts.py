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
    machine = measured["machine"]
    return "\n".join([*rows, "", f"Measured {machine['date']} with torch {machine['torch']}, timm {machine['timm']}, "
                      f"Python {machine['python']}, on a CPU."])  # fmt: skip


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
    broken = [(n, c) for n, found in measured["cells"].items() for c, result in found.items() if not result["ok"]]
    print(f"{PAGE}: {len(measured['cells'])} cells, broken: {broken or 'none'}")
    sys.exit(bool(broken))


def measure(only: list[str] | None) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from machine import describe

    import promises  # after the check of the arguments: this takes a while

    start = time.monotonic()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}, "variants": {}}
    groups = {"cells": promises.CELLS, "variants": promises.VARIANTS}
    wanted = {kind: [name for name in group if only is None or name in only] for kind, group in groups.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = promises.measure(Path(folder), wanted["cells"], wanted["variants"])
    results = {
        kind: {name: found.get(name) or known[kind].get(name) for name in group} for kind, group in groups.items()
    }
    RESULTS.write_text(json.dumps({
        "command": "python benchmarks/contracts.py", "machine": describe(),
        "minutes": round((time.monotonic() - start) / 60, 1), **results,
    }, indent=1, ensure_ascii=False) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
