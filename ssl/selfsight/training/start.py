"""The weights that a run begins with (`init_from=`). A run that continues has them in its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..objectives.objective import Objective

if TYPE_CHECKING:
    from ..interop.load import Weights
    from ..interop.report import Report

FILE = "init.json"


def open_start(source: str | None, tried: Objective) -> Weights | None:
    """Open what init_from names and try it on an objective without storage; WeightsError before data is touched."""
    if source is None:
        return None
    from ..interop.initialise import initialise
    from ..interop.load import open_weights

    weights = open_weights(source, next(iter(tried.exports().values())).timm.state_dict())
    initialise(tried, weights)
    return weights


def fill(objective: Objective, weights: Weights, mean: Sequence[float], std: Sequence[float]) -> Report:
    """Put the weights into a fresh objective; mean, std: what this run normalises with."""
    from ..interop.initialise import initialise

    report = initialise(objective, weights)
    if any(abs(a - b) > 1e-3 for a, b in zip((*mean, *std), (*weights.mean, *weights.std), strict=True)):
        report.notes.append(
            f"these weights have seen images with mean {_listed(weights.mean)} and std {_listed(weights.std)}: "
            f"data.mean=[{','.join(map(str, weights.mean))}] data.std=[{','.join(map(str, weights.std))}]"
        )
    if "head" in report.matched and getattr(objective, "head_warmup", 0):
        report.notes.append(
            f"the head came along, and it would learn alone for {objective.head_warmup} steps: "
            "objective.head_warmup=0 trains the rest from the first step"
        )
    return report


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def keep(report: Report, folder: Path) -> None:
    """Write the report into the run folder, replaced as a whole."""
    tmp = folder / f".{FILE}.tmp"
    tmp.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    tmp.replace(folder / FILE)


def kept(folder: Path) -> dict[str, Any]:
    """{"init": the report} of a run that began with weights from elsewhere, else {}."""
    path = folder / FILE
    return {"init": json.loads(path.read_text())} if path.exists() else {}
