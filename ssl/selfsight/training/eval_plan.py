"""What the entries of `eval` ask for: at which steps, with which words, and whether it can be done at all.

Every process of a run has this, as a checkpoint is written where an evaluation wants one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .. import config
from ..config import ConfigError
from ..data.source import DataError
from ..eval_entries import probe_words, text_of
from ..probes import ProbeError
from ..probes.load import choose_device
from ..probes.masks import need_objects
from ..probes.run import image_size
from ..probes.task import open_splits
from ..results import eval_folder, eval_result, eval_results
from . import checkpoint
from .jobs import held, job_number

NO_LABELS = ("rotation", "segmentation")  # the second needs masks, which reading tells
SAME = ("probe", "data", "which", "image_size", "seed", "bank.precision", "bank.dtype", "bank.channels_last")
NOT_SAME = ("data.max_bad_fraction", "data.index_dir", "data.cache", "data.cache_gb", "data.retries", "data.timeout",
            "probe.protocol")  # fmt: skip


class EvalPlan:
    """Entries by name, and the length of the run."""

    def __init__(self, cfg: Any, total_steps: int):
        self.cfg, self.total_steps, self.run = cfg, total_steps, Path(cfg.run_dir)
        self.entries: dict[str, DictConfig] = {name: cfg.eval[name] for name in cfg.eval}
        self.words = {name: probe_words(entry) for name, entry in self.entries.items()}
        # Plain values, as they are asked for after every step.
        self.inline = {name: entry.how == "inline" for name, entry in self.entries.items()}
        self.every = {name: entry.every_n_steps for name, entry in self.entries.items()}
        self.at = {name: frozenset(entry.at or ()) for name, entry in self.entries.items()}

    # -- when --------------------------------------------------------------------------------------------------------

    def due(self, name: str, step: int) -> bool:
        """Whether an entry is measured at a step (1 = after the first)."""
        every, at, last = self.every[name], self.at[name], step == self.total_steps
        if every is None:
            return step in at or (last and not at)
        return step in at or last or (step > 0 and step % every == 0)

    def steps(self, name: str, until: int) -> list[int]:
        """All steps up to `until` at which an entry is measured."""
        every = self.every[name] or self.total_steps
        some = {*range(every, until + 1, every), *self.at[name], self.total_steps}
        return sorted(step for step in some if step <= until and self.due(name, step))

    def state(self, name: str, step: int, start: int) -> str:
        """What the files say about an evaluation that is due: done | failed | running | submitted (to Slurm) | waiting
        (for a process) | here (a run that stands at this step measures it itself) | missed (no checkpoint is there)."""
        folder = eval_folder(self.run, name, step)
        if eval_result(folder):
            return "done"
        if (folder / "failed.json").exists():
            return "failed"
        if held(folder / "lock"):
            return "running"
        if job_number(folder / "job"):
            return "submitted"
        if self.inline[name]:
            return "here" if step == start else "missed"
        return "waiting" if checkpoint.at_step(self.run / "checkpoints", step) else "missed"

    def left(self, start: int) -> bool:
        """Whether a run that stands at `start` has evaluations to do."""
        to_do = ("running", "waiting", "here")
        return any(self.state(name, step, start) in to_do for name in self.entries for step in self.steps(name, start))

    def inline_at(self, step: int) -> list[str]:
        """Entries that training waits for at this step."""
        return [name for name, inline in self.inline.items() if inline and self.due(name, step)]

    def saved_at(self, step: int) -> list[str]:
        """Entries that want the checkpoint of this step."""
        return [name for name, inline in self.inline.items() if not inline and self.due(name, step)]

    def describe(self) -> str:
        """One line per entry for the first screen."""
        lines = []
        for name, entry in self.entries.items():
            every = f"every {entry.every_n_steps:,} steps" if entry.every_n_steps else ""
            at = f"at {', '.join(f'{s:,}' for s in entry.at)}" if entry.at else ""
            when = " and ".join(filter(None, (every, at))) or "at the end"
            where = {"inline": "training waits", "process": "beside the training", "slurm": "as a Slurm job"}[entry.how]
            lines.append(f"  eval        {name}: {entry.probe.name} {when}, {where}")
        return "\n".join(lines)

    # -- how ---------------------------------------------------------------------------------------------------------

    def probe_words(self, name: str, step: int) -> list[str]:
        """What to type after `selfsight probe` for one evaluation."""
        entry, run = self.entries[name], self.run.absolute()
        words = [f"checkpoint={text_of(str(run))}", f"step={step}", f"out={text_of(str(eval_folder(run, name, step)))}"]
        device = entry.device or ("cpu" if entry.how == "process" else None)  # a job goes by the GPUs that it has
        words += [*self.words[name], *([f"device={device}"] if device else [])]
        if entry.how == "process" and entry.num_workers is None:
            words.append(f"num_workers={self.threads(name)}")
        folder = self.bank_folder(name, step)
        return words + ([f"bank.folder={text_of(str(folder))}"] if folder else [])

    def bank_folder(self, name: str, step: int) -> Path | None:
        """A place for the features of this evaluation alone, or what the entry says; None: as for any probe."""
        bank = self.entries[name].bank
        if bank.keep:
            return Path(bank.folder).expanduser() if bank.folder else None
        root = Path(bank.folder).expanduser() if bank.folder else self.run / "evals" / ".banks"
        return root.absolute() / eval_folder(self.run, name, step).name

    def threads(self, name: str) -> int:
        return self.entries[name].threads or max(1, (os.cpu_count() or 1) // 4)

    def probe_config(self, name: str, step: int) -> DictConfig:
        """The config of one evaluation, with its data."""
        cfg = config.load("probe", self.probe_words(name, step))
        cfg.data = self.cfg.data if cfg.data is None else cfg.data
        return cfg

    # -- whether -----------------------------------------------------------------------------------------------------

    def check(self, exports: Sequence[str]) -> None:
        """ConfigError, naming the entry, where an evaluation could never work. exports: what `which` may be."""
        for name in self.entries:
            try:
                self._check(name, exports)
            except (ConfigError, ProbeError, DataError) as error:
                raise ConfigError(f"eval.{name}: {error}") from None

    def _check(self, name: str, exports: Sequence[str]) -> None:
        entry, cfg = self.entries[name], self.probe_config(name, self.total_steps)
        if late := [step for step in entry.at or () if step > self.total_steps]:
            raise ConfigError(f"at={late}: the run has {self.total_steps} steps")
        if entry.which and entry.which not in exports:
            raise ConfigError(f"which={entry.which}: {self.cfg.objective.name} has {' and '.join(exports)}")
        if entry.how == "slurm" and not shutil.which("sbatch"):
            raise ConfigError("how=slurm needs sbatch, which is not on the path here: use how=process")
        if entry.how == "process":
            choose_device(cfg.device)
        splits = open_splits(cfg, image_size(cfg) or self.cfg.image_size)
        for source, _ in splits[:2]:
            if cfg.probe.name not in NO_LABELS and not source.labelled:
                raise ProbeError(f"probe={cfg.probe.name} needs labels, and {source.describe} has none: use "
                                 "probe=rotation, or data with labels")  # fmt: skip
        if (masks := cfg.probe.get("masks") or "none") != "none":
            need_objects(masks, splits.train[0], splits.test[0])
        self._refuse_other_results(name, cfg)

    def _refuse_other_results(self, name: str, cfg: DictConfig) -> None:
        """One curve, one way to measure: numbers that stand must come from the same settings."""
        mine = _settings(OmegaConf.to_container(cfg, resolve=True))
        for step, result in eval_results(self.run, name).items():
            other = _settings(result.facts.get("settings") or {})
            different = [f"{k}: {other[k]} -> {mine[k]}" for k in mine if k in other and other[k] != mine[k]]
            if different:
                raise ConfigError(
                    f"the number of step {step} was measured in another way ({'; '.join(different)}): give the entry "
                    f"another name, or remove {self.run / 'evals' / name}-*"
                )


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what is measured, by their dotted keys."""
    flat = dict(config._flatten(tree))
    return {k: v for k, v in flat.items() if k not in NOT_SAME and any(k == s or k.startswith(f"{s}.") for s in SAME)}
