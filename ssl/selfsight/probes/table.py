"""`selfsight table`: the probes of a paper's table for one or several checkpoints, from one command.

    checkpoint=[runs/mae,runs/dino] probes=[knn,linear,ep,…] data=… masks.train=… masks.val=… out=<folder>

A row is a probe, or a pooling of `probe=attentive`. The backbone runs once over the images: what all rows ask for is
stored together, and each row reads its part. Every row writes the JSON that `selfsight probe` would; `table.md`,
`table.json` and `layers.svg` say the same side by side. A row that cannot be had says why, and the rest goes on.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from .. import config
from ..analysis.charts import Curve, plot
from ..backbones.tokens import BackboneError
from ..config import ConfigError
from ..data.source import DataError
from . import ProbeError
from .load import choose_data, choose_device, load_backbone
from .run import Together, probe, refuse_unwritable
from .store import remove
from .task import Task

COLOURS = ("#486cd6", "#d64e80", "#2a9d6f", "#ec8e2c", "#9654c8", "#777777")
STYLE_ATTRIBUTES = 'style="background:white" font-family="sans-serif" font-size="11"'
STYLE = ".line{fill:none;stroke-width:2}.rule{stroke:#ddd}"
FAILURES = (
    ProbeError,
    DataError,
    BackboneError,
    ConfigError,
    OSError,
)  # of one row; the others may still have their numbers
SHARED = ("step", "which", "image_size", "batch_size", "num_workers", "seed", "device", "bank")


class Row(NamedTuple):
    """name: as in `probes=`. cfg: of `selfsight probe`, complete but for the checkpoint."""

    name: str
    cfg: Any


class Cell(NamedTuple):
    """What one number of the table is: percent, its spread over seeds (None: no seeds) and its standard error."""

    value: float
    spread: float | None
    error: float | None


class Found(NamedTuple):
    """One row for one checkpoint: what its JSON holds, or why there is none."""

    row: str
    checkpoint: str
    result: dict[str, Any] | None
    failed: str = ""


def table(cfg: Any) -> int:
    """Fill the table of a resolved config (`config.load("table", ...)`); 1 if a row could not be had, else 0."""
    checkpoints, rows = names(cfg.checkpoint), build_rows(cfg)
    out = Path(cfg.out or Path("tables") / "-".join(checkpoints))
    refuse_unwritable(out)
    for checkpoint in checkpoints.values():  # a wrong one is said now, not after the rows of the others
        load_backbone(checkpoint, cfg.which, cfg.image_size, cfg.step)
    found: list[Found] = []
    facts: dict[str, Any] = {"checkpoints": checkpoints, "extraction_seconds": {}}
    said: set[str] = set()
    for name, checkpoint in checkpoints.items():
        together = Together(said, set())
        try:
            facts["extraction_seconds"][name] = _extract(rows, checkpoint, together)
            for row in rows:
                found.append(_one(row, name, checkpoint, out / name / row.name, together))
                _write(out, found, facts)  # after every row, so that what is there survives an interruption
        finally:
            if not cfg.bank.keep:
                remove(together.made)
    print(f"\n{markdown(found, facts)}\n{out}/table.md, table.json", flush=True)
    return int(any(f.failed for f in found))


def build_rows(cfg: Any) -> list[Row]:
    """The probe configs of all rows, checked before anything runs; ConfigError names the key of the row."""
    from ..schema import ALL_POOLINGS

    changes = _changes(cfg)
    rows = []
    for name in cfg.probes:
        kind = ["probe=attentive", f"probe.pooling={name}"] if name in ALL_POOLINGS else [f"probe={name}"]
        words = ["checkpoint=-", *kind]
        own = config.load("probe", words).probe
        for given, key in (("seeds", "seeds"), ("images", "bank"), ("test_images", "test")):
            words += [f"probe.{key}={cfg[given]}"] if cfg[given] is not None and key in own else []
        if name == "segmentation":
            words += _masks(cfg)
        words += [f"probe.{key}={value}" for key, value in changes.get(name, {}).items()]
        try:
            made = config.load("probe", words)
        except ConfigError as error:
            raise ConfigError(f"row {name}: {error}") from None
        if made.data is None:
            made.data = cfg.data
        for key in SHARED:
            made[key] = cfg[key]
        rows.append(Row(name, made))
    return rows


def _changes(cfg: Any) -> dict[str, dict[str, str]]:
    """`set="ep.epochs=90 knn.k=[10,20]"` as {"ep": {"epochs": "90"}, "knn": {"k": "[10,20]"}}."""
    out: dict[str, dict[str, str]] = {}
    for word in (cfg.set or "").split():
        row, dot, rest = word.partition(".")
        key, equals, value = rest.partition("=")
        if not (dot and equals and key and value):
            raise ConfigError(f"set={word}: write <row>.<key>=<value>, for example set='linear.epochs=20 ep.seeds=5'")
        if row not in cfg.probes:
            raise ConfigError(f"set={word}: no row is called {row!r} (rows: {', '.join(cfg.probes)})")
        out.setdefault(row, {})[key] = value
    return out


def _masks(cfg: Any) -> list[str]:
    """Where the row `segmentation` has its images from."""
    if not cfg.masks.train:
        if cfg.masks.val:
            raise ConfigError("masks.val is given without masks.train: a segmentation head needs shards to train on")
        return []
    given = {"train": cfg.masks.train, "val": cfg.masks.val}
    given = {k: v if isinstance(v, str) else f"[{','.join(v)}]" for k, v in given.items() if v}
    return ["data=shards", *(f"data.{key}={value}" for key, value in given.items())]


def names(checkpoint: Any) -> dict[str, str]:
    """Short, distinct names of the checkpoints; ConfigError without any."""
    given = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint or ())
    if not given:
        raise ConfigError("a table needs checkpoint=<run folder, export folder or timm model>, or several in [ ]")
    out: dict[str, str] = {}
    for one in given:
        path = Path(one).expanduser()
        if str(one) in out.values():
            raise ConfigError(f"checkpoint={one} is given twice")
        short = path.resolve().name if path.exists() else str(one).replace("/", "-")
        if short in out:
            short = f"{path.resolve().parent.name}-{short}"
        if short in out:
            raise ConfigError(f"checkpoint={one}: another one is called {short}, too; rename a folder")
        out[short] = str(one)
    return out


def _extract(rows: list[Row], checkpoint: str, together: Together) -> float | None:
    """One pass over the images for all rows that see whole images; its seconds. None: the rows come one by one."""
    began = time.monotonic()
    first = rows[0].cfg
    alike = [row for row in rows if row.cfg.data == first.data
             and all(row.cfg.probe[key] == first.probe[key] for key in ("bank", "test"))]  # fmt: skip
    modules = [(row, importlib.import_module(f".{row.cfg.probe.name}", __package__)) for row in alike]
    modules = [(row, module) for row, module in modules if hasattr(module, "wants")]
    if not modules:
        return None
    try:
        task, wanted = _task(modules[0][0], checkpoint, together), {}
        task.check_labels()  # all of these rows need them
        for row, module in modules:
            try:
                asked = module.wants(task, row.cfg.probe)
                task.shapes(*asked)
            except FAILURES:  # this row asks for what the backbone has not, and will say so itself
                continue
            wanted |= dict.fromkeys(asked)
        task.store(wanted)
    except FAILURES as error:  # all together are too much, or there are no data
        print(f"no pass for all rows together: {error}", flush=True)
        return None
    together.made.update(task.made)
    return round(time.monotonic() - began, 2)


def _task(row: Row, checkpoint: str, together: Together) -> Task:
    cfg = OmegaConf.merge(row.cfg, {"checkpoint": checkpoint})
    loaded = load_backbone(checkpoint, cfg.which, cfg.image_size, cfg.step)
    cfg.data = choose_data(cfg, loaded)
    device = choose_device(cfg.device)
    loaded.model.to(device)
    return Task(cfg, loaded, device, together.said)


def _one(row: Row, name: str, checkpoint: str, out: Path, together: Together) -> Found:
    print(f"\n== {name}: {row.name}", flush=True)
    cfg = OmegaConf.merge(row.cfg, {"checkpoint": checkpoint, "out": str(out)})
    try:
        return Found(row.name, name, probe(cfg, together))
    except FAILURES as error:
        print(f"no number: {error}", flush=True)
        return Found(row.name, name, None, str(error))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        why = "out of GPU memory: lower batch_size, or set probe.batch_size or probe.max_batch of the row"
        print(f"no number: {why}", flush=True)
        return Found(row.name, name, None, why)


# --- the table -------------------------------------------------------------------------------------------------------


def lines(found: Found) -> Iterator[tuple[str, Cell, int | None, float | None]]:
    """(label, number, parameters, seconds) of what one row gives: several for low-shot and layers."""
    result = found.result
    if result is None:
        return
    if found.row == "lowshot":
        for part in result["rows"]:
            label = f"lowshot, {part['size']}, {part['classifier']}"
            yield label, Cell(part["top1"], part["top1_std"], None), None, None
        return
    metric = "miou" if "miou" in result else "top1"
    label = f"{found.row}, mIoU" if metric == "miou" else found.row
    cell = Cell(result[metric], result.get(f"{metric}_std"), result.get("standard_error"))
    yield label, cell, result["parameters"], result["seconds"]
    if len(result.get("layers", ())) > 1:
        for part in result["layers"]:
            yield f"{found.row}, {part['layer']}", Cell(part["top1"], part.get("top1_std"), None), None, None


def markdown(found: list[Found], facts: dict[str, Any]) -> str:
    """The table as text: a line per number, for every checkpoint its number and seconds."""
    checkpoints = list(dict.fromkeys(f.checkpoint for f in found))
    cells: dict[str, dict[str, tuple[Cell, float | None]]] = {}
    sizes: dict[str, list[int]] = {}
    for one in found:
        for label, cell, parameters, seconds in lines(one):
            cells.setdefault(label, {})[one.checkpoint] = (cell, seconds)
            if parameters is not None and parameters not in sizes.setdefault(label, []):
                sizes[label].append(parameters)
    head = ["probe", "parameters", *(word for c in checkpoints for word in (f"{c}, %", "s"))]
    body = [
        [label, " / ".join(f"{n:,}" for n in sizes.get(label, [])),
         *(word for c in checkpoints for word in _words(own.get(c)))]
        for label, own in cells.items()
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return (
            "| " + " | ".join(w.ljust(n) if i == 0 else w.rjust(n) for i, (w, n) in enumerate(zip(row, widths))) + " |"
        )

    rule = "|" + "|".join("-" * (n + 2) if i == 0 else "-" * (n + 1) + ":" for i, n in enumerate(widths)) + "|"
    notes = ["± is the standard deviation over seeds (low-shot: draws), (SE) the standard error of the test split."]
    for name, seconds in facts["extraction_seconds"].items():
        if seconds is not None:
            notes.append(f"{name}: one pass of the backbone over all images, {seconds:,.1f} s, not in the column s.")
    notes += [f"{f.checkpoint}, {f.row}: no number, {f.failed}" for f in found if f.failed]
    said = [f"{f.checkpoint}: {warning}" for f in found if f.result for warning in f.result["warnings"]]
    notes += [f"warning, {sentence}" for sentence in dict.fromkeys(said)]
    return "\n".join([line(head), rule, *map(line, body), "", *(f"- {note}" for note in notes), ""])


def _words(own: tuple[Cell, float | None] | None) -> tuple[str, str]:
    if own is None:
        return "-", ""
    cell, seconds = own
    spread = "" if cell.spread is None else f" ± {cell.spread:.2f}"
    error = "" if cell.error is None else f" ({cell.error:.2f})"
    return f"{cell.value:.2f}{spread}{error}", "" if seconds is None else f"{seconds:,.1f}"


def layer_curves(found: list[Found]) -> str:
    """Accuracy over blocks or stages as an SVG, a line per checkpoint; empty without a row that has layers."""
    curves, ticks = [], {}
    for one in found:
        parts = (one.result or {}).get("layers", ())
        if len(parts) < 2:
            continue
        points = [(float(i), part["top1"]) for i, part in enumerate(parts)]
        ticks |= {float(i): part["layer"].removeprefix("layer ") for i, part in enumerate(parts)}
        curves.append(Curve(f"{one.checkpoint}, {one.row}", points, COLOURS[len(curves) % len(COLOURS)]))
    if not curves:
        return ""
    names = " ".join(f'<tspan fill="{c.colour}" dx="8">{escape(c.name)}</tspan>' for c in curves)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="780" {STYLE_ATTRIBUTES}'
    svg = plot(curves, ticks, "block or stage, top-1 in %").replace("<svg", head, 1)
    return svg.replace(">", f"><style>{STYLE}</style>", 1).replace(
        "</svg>", f"<text x='64' y='12'>{names}</text></svg>"
    )


def _write(out: Path, found: list[Found], facts: dict[str, Any]) -> None:
    alike: dict[tuple[str, str], list[str]] = {}
    for f in found:
        if f.result:
            alike.setdefault((f.row, f.result["protocol"]), []).append(f.checkpoint)
    protocols = [f"- {row} ({', '.join(those)}): {words}" for (row, words), those in alike.items()]
    text = markdown(found, facts) + "\n".join(["", "Protocols", "", *protocols, ""])
    numbers = facts | {"rows": [f._asdict() for f in found]}
    files = {"table.md": text, "table.json": json.dumps(numbers, indent=1) + "\n"}
    if svg := layer_curves(found):
        files["layers.svg"] = svg + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        tmp = out / f".{name}-{os.getpid()}"
        tmp.write_text(content)
        tmp.replace(out / name)
