"""`selfsight probe`: judge a frozen backbone and write one JSON with every setting.

    checkpoint=<run folder | export folder | timm model>  step=last|best|N  probe=<name>  data=...  out=<folder>

Without data= a run is probed on the data that it was trained on, a timm model on the built-in scenes.
probe=knn probe.masks=largest|first: of each image the features of one object only, by its mask (runs only).

A probe is one file here with `run(task) -> Outcome`, one YAML file in `conf/probe` and one dataclass in the schema, all
of one name; `task.banks(...)` gives it features that are stored on disk. The reported split chooses nothing:
every choice is made on held-out training images. probe=finetune trains the backbone as well.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from omegaconf import OmegaConf

from ..results import result_path
from . import ProbeError
from .knn import standard_error
from .load import Loaded, choose_data, choose_device, choose_workers, load_backbone
from .masks import THRESHOLD, WHICH
from .select import counted
from .store import Bank, remove
from .task import Outcome, Task

__all__ = ["Loaded", "choose_data", "choose_device", "choose_workers", "load_backbone", "probe"]

SEGMENTATION_SIZE = 224  # shorter side and window, whatever size the backbone was trained at


class Together(NamedTuple):
    """What the probes of one table share: warnings that were said, and what was put on disk, which outlives a row."""

    said: set[str]
    made: set[Path]


def probe(cfg: Any, together: Together | None = None) -> dict[str, Any]:
    """Run one probe by a resolved config (`config.load("probe", ...)`); returns what `<out>/<probe>.json` holds."""
    started = time.monotonic()
    _try_out(cfg)
    if cfg.probe.name != "finetune" and cfg.adapt is not None and cfg.adapt.name != "none":
        raise ProbeError(f"adapt={cfg.adapt.name} is for probe=finetune; probe={cfg.probe.name} leaves the backbone as "
                         "it is")  # fmt: skip
    loaded = load_backbone(cfg.checkpoint, cfg.which, image_size(cfg), cfg.step, masks=_masks(cfg))
    cfg.data = choose_data(cfg, loaded)
    return probe_loaded(cfg, loaded, choose_device(cfg.device), started, together)


def image_size(cfg: Any) -> int | None:
    """The size that the config asks for; None: the checkpoint's."""
    return cfg.image_size or (SEGMENTATION_SIZE if cfg.probe.name == "segmentation" else None)


def probe_loaded(
    cfg: Any, loaded: Loaded, device: torch.device, started: float, together: Together | None = None
) -> dict[str, Any]:
    """The same of a backbone that is in memory. cfg: with its data; started: a `time.monotonic()`."""
    loaded.model.to(device)
    task = Task(cfg, loaded, device, together.said if together else None)
    if cfg.step == "best":
        task.warn("step=best is the checkpoint with the best k-NN on the run's own validation images: measured on the "
                  "same images this number is too good; step=last chooses nothing")  # fmt: skip
    try:
        outcome = importlib.import_module(f".{cfg.probe.name}", __package__).run(task)
        result = _result(task, outcome, time.monotonic() - started)
        path = _write(cfg, result)
    finally:
        if together:
            together.made.update(task.made)
        elif (cfg.get("bank") or {}).get("keep") is False:
            remove(task.made)
    if outcome.written:
        outcome.written()
    print(_sentence(result, path), flush=True)
    return result


def _result(task: Task, outcome: Outcome, seconds: float) -> dict[str, Any]:
    cfg, loaded, train, test = task.cfg, task.loaded, task.train, task.test
    numbers, objects, looked = outcome.numbers, *_objects(_masks(cfg), train, test)
    if "top1" in numbers:
        numbers = {"standard_error": standard_error(numbers["top1"], numbers.get("queries", len(test)))} | numbers
    return {
        "probe": cfg.probe.name,
        **numbers,
        "unit": "percent",
        "protocol": f"{outcome.protocol}{looked} {_seen(task)}",
        "seeds": list(task.seeds),
        "parameters": outcome.parameters,
        "n_bank": _used(train),
        "n_query": _used(test),
        **objects,
        "warnings": task.warnings,
        "bad_samples": [why for _, why in train.bad + test.bad],
        "seconds": round(seconds, 2),
        **loaded.facts,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "image_size": loaded.image_size,
        "crop_pct": loaded.crop_pct,
        "data": {"train": train.describe, "test": test.describe},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "settings": OmegaConf.to_container(cfg, resolve=True),
    }


def _masks(cfg: Any) -> str:
    """probe.masks, which only k-NN has."""
    return cfg.probe.get("masks") or "none"


def _objects(masks: str, bank: Bank, queries: Bank) -> tuple[dict[str, Any], str]:
    """How many images were seen through a mask: numbers for the result and a sentence; nothing without masks."""
    if masks == "none":
        return {}, ""
    seen = {"bank": int(bank.shown.sum()), "query": int(queries.shown.sum())}
    left = {"bank": len(bank.ids) - seen["bank"], "query": len(queries.ids) - seen["query"]}
    words = (f" Of each image one object, {WHICH[masks]}: the pooled feature looks only at patches that its mask "
             f"covers by {THRESHOLD:.0%} or more; {left['bank']:,} of {len(bank.ids):,} bank and {left['query']:,} of "
             f"{len(queries.ids):,} query images show no object and are looked at whole.")  # fmt: skip
    return {"masked": seen, "without_object": left}, words


def _used(bank: Bank) -> int:
    """Samples of a split; one that fine-tuning could not decode is in its bank and among the bad ones."""
    return len(np.setdiff1d(bank.ids, [id for id, _ in bank.bad]))


def _seen(task: Task) -> str:
    """How images were seen; segmentation says it itself."""
    size, share, split = task.loaded.image_size, task.loaded.crop_pct, task.splits.words
    if task.cfg.step == "best":
        split += ", and the checkpoint chosen by k-NN on the validation images of its run"
    if task.cfg.probe.name == "segmentation":
        return f"Backbone in eval mode; tested on {split}."
    square = f"images {size} px, centre square of {share:.3g} of the shorter side"
    mode = "Tested in eval mode" if task.cfg.probe.name == "finetune" else "Backbone in eval mode"
    return f"{mode}; {square}; tested on {split}."


def _try_out(cfg: Any) -> None:
    """ProbeError where the result could not be written: said now, not after the work."""
    refuse_unwritable(result_path(cfg).parent)


def refuse_unwritable(folder: Path) -> None:
    """ProbeError where a folder cannot be made or written to. Only looked at: a probe that fails leaves nothing
    behind, and another one may be making the same folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is no folder" if not there.is_dir() else "cannot be written to"
        raise ProbeError(f"{folder} cannot hold the result: {there} {what}; use out=<a folder that can be written>")


def _write(cfg: Any, result: dict[str, Any]) -> Path:
    """`result_path`, complete or not at all."""
    path = result_path(cfg)
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(json.dumps(result, indent=1) + "\n")
        tmp.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise ProbeError(f"{path} cannot be written ({error.strerror}); free some space or use out=<another folder>, "
                         f"the number was: {_sentence(result, path)}") from error  # fmt: skip
    return path


def _sentence(result: dict[str, Any], path: Path) -> str:
    left = len(result["bad_samples"])
    bad = f", {counted(left, 'unreadable sample')} left out" if left else ""
    if "masked" in result:
        bad += f", {sum(result['without_object'].values()):,} images without an object"
    name = "miou" if "miou" in result else "top1"
    std = result.get(f"{name}_std")
    spread = "" if std is None else f", ± {std:.2f} over {len(result['seeds'])} seeds"
    top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
    word = {"miou": "mIoU", "top1": "top-1"}[name]
    number = f"{word} {result[name]:.2f} % (± {result['standard_error']:.2f}{spread}){top5}"
    counts = f"bank {result['n_bank']:,}, queries {result['n_query']:,}{bad}"
    return f"{result['probe']} {number}, {counts}, {result['seconds']:.0f} s -> {path}"
