"""Numbers of probes as they lie in run folders: the JSON of one probe, and the evaluations of a training by step.

    <run>/evals/<name>-<step>/<probe>.json   what the probe wrote
                              failed.json    instead of it: {"why", "log"}
    <run>/evals/<name>-<step>.log            what it said
    <run>/evals/<name>.csv                   one row per step, made of these JSONs

Nothing here imports torch.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

METRICS = {"top1": "top-1", "miou": "mIoU"}  # in percent
COLUMNS = ("step", "images", "top1", "miou", "standard_error", "top1_std", "miou_std", "top5", "seconds")


class Result(NamedTuple):
    """One number of a probe: metric ("top1" or "miou"), value and standard error in percent, and the whole JSON."""

    metric: str
    value: float
    error: float | None
    facts: dict[str, Any]

    @property
    def words(self) -> str:
        error = "" if self.error is None else f" (± {self.error:.2f})"
        return f"{METRICS[self.metric]} {self.value:.2f} %{error}"


def read_result(path: Path) -> Result | None:
    """The JSON that a probe wrote; None if there is none, or if it is something else."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    metric = next((m for m in METRICS if isinstance(facts, dict) and isinstance(facts.get(m), (int, float))), None)
    return Result(metric, float(facts[metric]), facts.get("standard_error"), facts) if metric else None


def out_folder(cfg: Any) -> Path:
    """Where results go: as given, else <run>/probes (/<step>) (/masks-<which>), else ./probes."""
    if cfg.out:
        return Path(cfg.out)
    run = Path(cfg.checkpoint).expanduser()
    folder = run / "probes" if (run / "config.yaml").is_file() else Path("probes")
    if cfg.step != "last":
        folder = folder / str(cfg.step)
    masks = cfg.probe.get("masks") or "none"
    return folder if masks == "none" else folder / f"masks-{masks}"  # the number without masks is worth as much


def result_path(cfg: Any) -> Path:
    """Where the JSON of a probe goes: `<out>/<probe>.json`, with what makes it another measurement in its name, so
    that none overwrites another: pooling, head, protocol, layer, norm, gallery, for example attentive-ep-raw.json."""
    p = cfg.probe
    words = [p.name, p.get("pooling"), None if p.get("head") == "linear" else p.get("head"), p.get("protocol")]
    words += [f"layer{p.layer}"] if p.get("layer") is not None else []
    if "norm" in p and p.norm == (p.name == "layerwise"):  # not as usual
        words.append("norm" if p.norm else "raw")
    words += ["test"] if p.get("gallery") == "test" else []
    return out_folder(cfg) / f"{'-'.join(str(word) for word in words if word)}.json"


# --- the evaluations of a training ---------------------------------------------------------------------------------


def eval_folder(run: Path, name: str, step: int) -> Path:
    """Where one evaluation writes."""
    return run / "evals" / f"{name}-{step:07d}"


def eval_log(run: Path, name: str, step: int) -> Path:
    """What one evaluation says while it works."""
    return run / "evals" / f"{name}-{step:07d}.log"


def eval_result(folder: Path) -> Result | None:
    """What an evaluation found, if it is through."""
    return next((found for path in sorted(folder.glob("*.json")) if (found := read_result(path))), None)


def eval_steps(run: Path, name: str) -> list[int]:
    """Steps of an entry that have a folder, finished or not."""
    pattern = re.compile(re.escape(name) + r"-(\d{7,})")
    found = (pattern.fullmatch(p.name) for p in (run / "evals").glob(f"{name}-*") if p.is_dir())
    return sorted(int(match[1]) for match in found if match)


def eval_results(run: Path, name: str) -> dict[int, Result]:
    """step -> what was found, in order."""
    every = {step: eval_result(eval_folder(run, name, step)) for step in eval_steps(run, name)}
    return {step: found for step, found in every.items() if found}


def eval_names(run: Path) -> list[str]:
    """Entries with at least one number."""
    return sorted(path.stem for path in (run / "evals").glob("*.csv"))


def write_csv(run: Path, name: str, results: dict[int, Result], batch_size: int) -> None:
    """`<run>/evals/<name>.csv`, whole, with those of `COLUMNS` that the results have."""
    rows = [{**r.facts, "step": step, "images": step * batch_size} for step, r in sorted(results.items())]
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    path = run / "evals" / f"{name}.csv"
    tmp = path.with_suffix(".tmp")
    with tmp.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    tmp.replace(path)
