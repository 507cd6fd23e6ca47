"""One training of a classifier: AdamW with layer-wise rates, warm-up and cosine per step, a checkpoint every epoch.

A run that was killed continues from its last epoch with the same bits: data and draws are functions of (seed, step), so
weights, optimizer and average are all there is to keep.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data.loader import Positions, make_loader
from ..data.source import Source
from ..training import checkpoint
from ..training.layer_decay import layered_groups
from ..training.optim import build_adamw, load_optimizer_state, optimizer_state
from ..training.schedules import warmup_cosine
from . import ProbeError
from .augment import Augmented, Mixer, mixes, seed_of_step, seeded
from .bank import AUTOCAST, Images, batches, frozen, normalise
from .classifier import build_classifier
from .load import choose_workers
from .part import replace_text
from .task import Task

BETAS = (0.9, 0.999)
KEPT = 512 << 20  # bytes of decoded test images that are kept for the next epoch


class Diverged(ProbeError):
    """The loss is not finite any more."""


class Job(NamedTuple):
    """One training. name: of its files. lr: per 256 images. ids: of training samples."""

    name: str
    lr: float
    layer_decay: float
    seed: int
    ids: np.ndarray


class Judge:
    """Accuracy on fixed samples, seen as evaluation sees them; decoded once if that fits into memory."""

    def __init__(self, source: Source, ids: np.ndarray, task: Task):
        self.source, self.ids, self.task = source, ids, task
        self.kept: list[Images] | None = None
        self.bad: list[tuple[int, str]] = []
        loaded = task.loaded
        self.keep = len(ids) * len(loaded.mean) * loaded.image_size**2 <= KEPT

    def __len__(self) -> int:
        return len(self.ids) - len(self.bad)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> tuple[float, float]:
        """Top-1 and top-5 in percent."""
        loaded, device, hits, count = self.task.loaded, self.task.device, torch.zeros(2, dtype=torch.int64), 0
        with frozen(model):
            for part in self._images():
                x = in_layout(normalise(part.pixels, loaded.mean, loaded.std, device), self.task)
                with autocast(self.task):
                    logits = model(x).float()
                order = logits.topk(min(5, logits.shape[1]), dim=-1).indices.cpu() == part.labels[:, None]
                hits += torch.stack([order[:, 0].sum(), order.sum()])
                count += len(part.labels)
        return tuple((100 * hits.double() / max(count, 1)).tolist())

    def _images(self) -> Iterable[Images]:
        return self._decoded() if self.kept is None else self.kept

    def _decoded(self) -> Iterator[Images]:
        cfg, loaded, found = self.task.cfg, self.task.loaded, []
        options = (loaded.image_size, loaded.crop_pct, cfg.batch_size, choose_workers(cfg.num_workers))
        self.bad = []
        for part in batches(self.source, self.ids, *options, len(loaded.mean)):
            self.bad += part.bad
            if len(self.bad) > (limit := max(8, len(self.ids) // 100)):
                raise ProbeError(f"{len(self.bad)} of {len(self.ids):,} images to score on cannot be decoded (limit "
                                 f"{limit}), e.g. {self.bad[-1][1]}")  # fmt: skip
            if len(part.labels):
                found += [part] if self.keep else []
                yield part
        self.kept = found if self.keep else None


def autocast(task: Task) -> contextlib.AbstractContextManager:
    """By `bank.precision`."""
    dtype = AUTOCAST.get(task.cfg.bank.precision)
    return torch.autocast(task.device.type, dtype) if dtype else contextlib.nullcontext()


def in_layout(x: Tensor, task: Task) -> Tensor:
    """Channels last in memory where `bank.channels_last` asks for it."""
    return x.contiguous(memory_format=torch.channels_last) if task.cfg.bank.channels_last else x


class Training:
    """The state of one job: model, optimizer, average, and how many epochs are done.

    batch: images per step, `probe.batch_size` or what there is. ends: the step at which every epoch ends.
    """

    def __init__(self, task: Task, job: Job, folder: Path):
        p, self.task, self.job, self.folder = task.settings, task, job, folder
        self.batch = batch_size(p, len(job.ids))
        self.ends = [max(1, round((e + 1) * len(job.ids) / self.batch)) for e in range(p.epochs)]
        self.model = build_classifier(
            task.loaded,
            task.classes,
            pool=p.pool,
            drop_path=p.drop_path,
            seed=seed_of_step(job.seed, -1),
            adapt=task.cfg.get("adapt"),
        ).to(task.device)
        if task.cfg.bank.channels_last:
            self.model.to(memory_format=torch.channels_last)
        groups = layered_groups(self.model, p.weight_decay, job.layer_decay, p.grouping)
        peak = job.lr * self.batch / 256
        self.optimizer = build_adamw(groups, peak, BETAS, 1e-8)
        warmup = min(round(p.warmup_epochs * len(job.ids) / self.batch), self.ends[-1])
        self.rate = warmup_cosine(peak, self.ends[-1], warmup, final=min(p.min_lr, peak), start=peak * p.warmup_start)
        self.average = ModelEmaV3(self.model, p.ema, use_warmup=True) if p.ema else None
        self.mixer = Mixer(p, task.classes, task.loaded.mean, task.loaded.std, task.device)
        self.curve: list[dict[str, float]] = []
        self.bad: dict[int, str] = {}
        self._continue()

    @property
    def judged(self) -> nn.Module:
        """The model that counts: the average where there is one."""
        return self.average.module if self.average else self.model

    def run(self, judge: Judge) -> None:
        """All epochs that are left; each is judged, noted in `curve`, and saved."""
        p, first = self.task.settings, len(self.curve)
        if first == p.epochs:
            return
        if first:
            print(f"finetune {self.job.name}: continuing after epoch {first}", flush=True)
        loaded, workers = self.task.loaded, choose_workers(self.task.cfg.num_workers)
        source, size = self.task.splits.train[0], loaded.image_size
        data = Augmented(source, self.job.ids, p, self.job.seed, size, loaded.mean)
        steps = Positions(self.ends[first - 1] if first else 0, self.ends[-1], self.batch, 1, 0, 1)
        loader = iter(make_loader(data, steps, workers, self.task.device.type == "cuda"))
        for epoch in range(first, p.epochs):
            row = self._epoch(loader, epoch)
            if epoch + 1 == p.epochs or (p.curve and (epoch + 1) % p.curve == 0):
                row["top1"], row["top5"] = judge(self.judged)
                print(f"finetune {self.job.name}: top-1 {row['top1']:.2f} % after epoch {epoch + 1}", flush=True)
            self.curve.append(row)
            self._save()

    def _epoch(self, loader: Iterator[dict[str, Any]], epoch: int) -> dict[str, float]:
        """The steps of one epoch; its row of the curve. Diverged if the loss is not finite."""
        began, begin = time.monotonic(), self.ends[epoch - 1] if epoch else 0
        losses = [self._step(next(loader), step) for step in range(begin, self.ends[epoch])]
        loss = torch.stack(losses).mean().item()
        if not math.isfinite(loss):
            raise Diverged(f"fine-tuning diverged in epoch {epoch + 1} (loss {loss}) at a rate of {self.job.lr:g} per "
                           "256 images; use smaller probe.lrs")  # fmt: skip
        speed = self.batch * len(losses) / (time.monotonic() - began)
        print(f"finetune {self.job.name}: epoch {epoch + 1}/{self.task.settings.epochs}, loss {loss:.4f}, "
              f"{speed:,.0f} images/s", flush=True)  # fmt: skip
        return {"epoch": epoch + 1, "loss": loss, "lr": self.rate(self.ends[epoch] - 1)}

    def _step(self, batch: dict[str, Any], step: int) -> Tensor:
        """One optimizer step; the loss of its batch, detached."""
        task, p = self.task, self.task.settings
        self._note(batch["bad"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * group["lr_scale"]
        self.model.train()
        total = torch.zeros((), device=task.device)
        with seeded(key := seed_of_step(self.job.seed, step)):
            if task.device.type == "cuda":
                torch.cuda.manual_seed_all(key)
            x, target = self.mixer(batch["pixels"], batch["label"])
            size = p.max_batch or len(x)
            for part, wanted in zip(x.split(size), target.split(size)):
                with autocast(task):
                    logits = self.model(in_layout(part, task))
                loss = F.cross_entropy(logits.float(), wanted, reduction="sum") / len(x)
                loss.backward()
                total += loss.detach()
        if p.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), p.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.model, step=step + 1)
        return total

    def _note(self, bad: list[tuple[int, str]]) -> None:
        """Undecodable samples, for which others stood in."""
        self.bad |= dict(bad)
        if len(self.bad) > (limit := max(8, len(self.job.ids) // 100)):
            raise ProbeError(f"{len(self.bad)} of {len(self.job.ids):,} training samples cannot be decoded (limit "
                             f"{limit}), e.g. {next(iter(self.bad.values()))}")  # fmt: skip

    # ---- what is kept ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        files = {"model": self.model.state_dict(), "optim": optimizer_state(self.optimizer)}
        if self.average:
            files["average"] = self.average.module.state_dict()
        meta = {"curve": self.curve, "bad": list(self.bad.items())}
        checkpoint.save(self.folder, self.ends[len(self.curve) - 1], files, meta, keep_last=1)

    def _continue(self) -> None:
        checkpoint.clean(self.folder)
        path = checkpoint.newest(self.folder) if self.folder.is_dir() else None
        checkpoint.set_aside(self.folder, int(path.name.split("-")[1]) if path else -1)
        if path is None:
            return
        state, meta = checkpoint.load(path)
        self.model.load_state_dict(state)
        load_optimizer_state(self.optimizer, checkpoint.load(path, "optim")[0])
        if self.average:
            self.average.module.load_state_dict(checkpoint.load(path, "average")[0])
        self.curve, self.bad = meta["curve"], dict(meta["bad"])


def batch_size(settings: Any, samples: int) -> int:
    """Images per step: as asked, at most all of them, and an even number where they are mixed in pairs."""
    size = min(settings.batch_size, samples)
    return max(2, size - size % 2) if mixes(settings) else size


def result(task: Task, job: Job, judge: Judge, folder: Path, keep: bool = False) -> dict[str, Any]:
    """What a job came to: read where it is done, else trained. keep: leave its last checkpoint."""
    note = folder / f"{job.name}.json"
    if note.is_file():
        return json.loads(note.read_text())
    training = Training(task, job, folder / job.name)
    training.run(judge)
    found = {"curve": training.curve, "bad": list(training.bad.items()), "judged": len(judge),
             "judge_bad": [list(b) for b in judge.bad], "batch": training.batch,
             "steps": training.ends[-1]} | {k: training.curve[-1][k] for k in ("top1", "top5")}  # fmt: skip
    replace_text(note, json.dumps(found))
    if not keep:
        shutil.rmtree(folder / job.name, ignore_errors=True)
    return found
