"""`selfsight train`: assemble a run, say what it will do, do it (or continue it), and leave a usable model behind."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from .. import config
from ..backbones.tokens import Backbone
from ..data import open_source
from ..data.loader import Positions, Samples, make_loader
from ..data.order import VERSION as ORDER_VERSION
from ..data.order import Order
from ..data.rng import VERSION as RNG_VERSION
from ..data.source import DataError, Source
from ..data.statistics import mean_std
from ..objectives import build_objective
from ..objectives.objective import Objective
from . import checkpoint, provenance
from .flops import peak_flops, step_flops_per_image
from .lightning import make_trainer, precision_of
from .log import Metrics, count, duration
from .loop import AfterStep, Plan
from .module import Module, micro_batches
from .schedules import warmup_cosine
from .stop import StopFlag

EVALUATIONS = 10  # per run, when knn.every_n_steps is not given


def train(cfg: Any) -> dict:
    """Train by a resolved config (`config.load("train", ...)`); returns what summary.json holds.

    Resumes when the run folder has a checkpoint. Raises RunStopped when a signal, bad data or a non-finite loss ends
    the run early.
    """
    flag = StopFlag()
    flag.install()  # before any fork
    run = Run(cfg, flag)
    if run.done():
        return run.report_done()
    return run.go()


class Run:
    """One training run on this process."""

    def __init__(self, cfg: Any, flag: StopFlag):
        self.cfg, self.flag = cfg, flag
        self.dir = Path(cfg.run_dir)
        self.rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))
        self._claim_folder()
        self.source = self._open("train")
        self.val = open_source(cfg.data, "val")
        self.num_samples = sum(self.source.lengths)
        self.steps_per_epoch = self.num_samples / cfg.batch_size
        self.total_steps = self._total_steps()
        self.start_path = checkpoint.newest(self.dir / "checkpoints")
        self.start = int(self.start_path.name.split("-")[1]) if self.start_path else 0
        self.mean, self.std = self._normalisation()

    # -- assembling ----------------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Resume only what is the same run; record a deliberate change."""
        known = self.dir / "config.yaml"
        if known.exists():
            changes = config.diff(config.read(known), self.cfg)
            if changes and not self.cfg.allow_change:
                raise config.ConfigError(
                    f"{self.dir} holds a run with other settings ({'; '.join(changes)}): use another run_dir, or "
                    "allow_change=true to continue it with the new ones"
                )
            if changes and self.rank == 0:
                with (self.dir / "changes.jsonl").open("a") as f:
                    f.write(json.dumps({"time": time.strftime("%F %T"), "changes": changes}) + "\n")
        if self.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self.dir / "checkpoints")
            config.save(self.cfg, known)

    def _open(self, split: str) -> Source:
        source = open_source(self.cfg.data, split)
        if source is None or sum(source.lengths) == 0:
            raise DataError(f"data={self.cfg.data.name} has no {split} samples")
        n = sum(source.lengths)
        if n < self.cfg.batch_size:
            raise DataError(
                f"{source.describe} has {n:,} samples, fewer than one batch of {self.cfg.batch_size}; "
                f"use batch_size={2 ** int(math.log2(n))} or less"
            )
        return source

    def _total_steps(self) -> int:
        cfg = self.cfg
        if cfg.max_steps is not None:
            return cfg.max_steps
        images = cfg.max_images if cfg.max_images is not None else cfg.max_epochs * self.num_samples
        return max(1, round(images / cfg.batch_size))

    def _normalisation(self) -> tuple[list[float], list[float]]:
        data = self.cfg.data
        if data.mean == "auto" or data.std == "auto":
            mean, std = mean_std(self.source, data.channels)
            return (mean if data.mean == "auto" else list(data.mean)), (std if data.std == "auto" else list(data.std))
        return list(data.mean), list(data.std)

    def _fingerprint(self) -> dict:
        """What the order and content of the training stream depend on."""
        data = self.cfg.data
        return {
            "data": self.source.fingerprint, "seed": self.cfg.seed, "batch_size": self.cfg.batch_size,
            "chunk": data.chunk, "window": data.window, "order_version": ORDER_VERSION, "rng_version": RNG_VERSION,
        }  # fmt: skip

    def _objective(self) -> Objective:
        torch.manual_seed(self.cfg.seed)  # initial weights; nothing later draws from the global generator
        return build_objective(self.cfg, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)

    def _load(self, objective: Objective) -> dict[str, torch.Tensor] | None:
        """Put the newest checkpoint into the objective; returns the optimizer's state."""
        if self.start_path is None:
            return None
        state, meta = checkpoint.load(self.start_path)
        old, new = meta["fingerprint"], self._fingerprint()
        changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
        if changed and not self.cfg.allow_change:
            raise config.ConfigError(
                f"the data or its order changed since {self.start_path} was written ({'; '.join(changed)}): "
                "restore it, use another run_dir, or continue with allow_change=true"
            )
        checkpoint.load_unique_state(objective, state)
        return checkpoint.load(self.start_path, "optim")[0]

    # -- a run that is over --------------------------------------------------------------------------------------

    def done(self) -> bool:
        return self.start >= self.total_steps and (self.dir / "summary.json").exists()

    def report_done(self) -> dict:
        summary = json.loads((self.dir / "summary.json").read_text())
        if self.rank == 0:
            print(f"This run is finished ({self.start} steps); choose another run_dir= or seed= to train again.\n")
            print(closing_table(summary, self.dir))
        return summary

    # -- running -------------------------------------------------------------------------------------------------

    def go(self) -> dict:
        cfg = self.cfg
        objective = self._objective()
        optimizer_state = self._load(objective)
        self.sink = self._sink()
        after = AfterStep(self._plan(), self.flag, self.evaluate, self.sink)
        world, trainer = self._trainer(after)
        plan = after.plan
        warmup = config.duration(cfg.optim.warmup).steps(self.total_steps, self.steps_per_epoch)
        lr = warmup_cosine(cfg.optim.lr, self.total_steps, min(warmup, self.total_steps), cfg.optim.min_lr)
        self.module = Module(
            objective, cfg.optim, lr, mean=tuple(self.mean), std=tuple(self.std), seed=cfg.seed, step=self.start,
            optimizer_state=optimizer_state,
        )  # fmt: skip
        views = objective.views()
        self.samples = Samples(
            self.source, Order(cfg.seed, self.source.lengths, cfg.data.chunk, cfg.data.window), views, cfg.seed,
            cfg.data.channels,
        )  # fmt: skip
        on_gpu = trainer.strategy.root_device.type == "cuda"
        workers = workers_for(cfg.num_workers, world // cfg.trainer.num_nodes, on_gpu)
        self.device = trainer.strategy.root_device
        if self.rank == 0:
            self._first_screen(objective, world, plan, workers)
            plan.flops_per_image = step_flops_per_image(objective)
            plan.peak_flops = self._peak(world)
            if self.start == 0:
                self._untrained()
        if cfg.trainer.compile in (True, "true") or (cfg.trainer.compile == "auto" and on_gpu):
            objective.compile(fullgraph=True, dynamic=False)
        positions = Positions(
            self.start, self.total_steps, cfg.batch_size, plan.micro_batches, trainer.global_rank, world
        )
        loader = make_loader(self.samples, positions, workers, pin_memory=on_gpu)
        started = time.monotonic()
        trainer.fit(self.module, loader)
        if after.stopped is not None:
            raise after.stopped
        if self.rank != 0:
            return {}
        return self._finish(world, time.monotonic() - started)

    def _plan(self) -> Plan:
        cfg, c = self.cfg, self.cfg.checkpoint
        knn_every = cfg.knn.every_n_steps
        if knn_every is None:
            knn_every = max(1, math.ceil(self.total_steps / EVALUATIONS))
        fraction = int(cfg.data.max_bad_fraction * self.num_samples)
        return Plan(
            self.dir, self.total_steps, cfg.batch_size, 1, self.num_samples, self.steps_per_epoch,
            cfg.log_every_n_steps, knn_every, c.every_n_steps, c.every_n_minutes, c.keep_last, c.keep_best,
            max(8, fraction),
            {
                "fingerprint": self._fingerprint(), "versions": provenance.versions(),
                "mean": self.mean, "std": self.std,
            },
        )  # fmt: skip

    def _trainer(self, after: AfterStep) -> tuple[int, Any]:
        probe = make_trainer(self.cfg, [])
        world = probe.world_size
        after.plan.micro_batches = micro_batches(self.cfg.batch_size, world, self.cfg.trainer.max_batch_per_device)
        return world, make_trainer(self.cfg, [after], after.plan.micro_batches)

    def _peak(self, world: int) -> float | None:
        if self.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device), precision_of(self.cfg.trainer.precision, True))
        return peak * world if peak else None

    def _sink(self) -> Any:
        if self.cfg.logger.name != "wandb" or self.rank != 0:
            return None
        from .wandb_sink import WandB

        return WandB(self.cfg, self.dir)

    def _first_screen(self, objective: Objective, world: int, plan: Plan, workers: int) -> None:
        cfg, o = self.cfg, self.cfg.optim
        backbone = next(iter(objective.exports().values()))
        millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (objective, backbone)]
        micro = f" in {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
        labels = "with labels" if self.source.labelled else "no labels"
        rule = f" = {o.base_lr:g} x {cfg.batch_size} / 256" if o.base_lr is not None else ""
        images = self.total_steps * cfg.batch_size
        lines = [
            f"{cfg.objective.name} on {cfg.backbone.name} ({backbone.architecture}, {cfg.image_size} px)",
            f"  data        {count(self.num_samples)} images, {labels}: {self.source.describe}",
            f"  batch       {cfg.batch_size} over {world} process{'es' if world > 1 else ''}{micro}, {workers} "
            f"loader worker{'s' if workers != 1 else ''} each",
            f"  length      {self.total_steps:,} steps = {count(images)} images, "
            f"{images / self.num_samples:.4g} epochs",
            f"  parameters  {millions[1]:.2f} M in the backbone, {millions[0]:.2f} M trained or kept in all",
            f"  optimizer   {o.name}, lr {o.lr:.3g}{rule}, weight decay {o.weight_decay:g}, warm-up {o.warmup}",
            f"  device      {self.device}, precision {precision_of(cfg.trainer.precision, self.device.type == 'cuda')}",
            f"  output      {self.dir}",
        ]
        if self.start:
            lines.append(f"  resuming    at step {self.start:,} from {self.start_path}")
        print("\n".join(lines), flush=True)

    # -- evaluating ----------------------------------------------------------------------------------------------

    def _online(self) -> Any:
        if not hasattr(self, "_online_cache"):
            from .online import Online

            self._online_cache = Online(self.cfg, self.source, self.val)
        return self._online_cache

    def ready_backbone(self) -> Backbone:
        """The backbone to judge and export.

        Masked training spoils BatchNorm's running statistics: then it is a copy, re-estimated on clean images of
        fixed positions. The training state is not touched.
        """
        backbone = next(iter(self.module.objective.exports().values()))
        norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in backbone.timm.modules())
        if not norms or self.module.objective.needs.hide is None:
            return backbone
        from ..nn.global_batchnorm import reestimate

        size = min(128, self.cfg.batch_size)
        batches = (self._prepared(range(i * size, (i + 1) * size)) for i in range(max(1, 1024 // size)))
        images = (next(iter(b["images"].values()))[0] for b in batches)
        return reestimate(backbone, lambda m, x: m(x), images)

    @torch.no_grad()
    def _prepared(self, positions: range) -> dict:
        from ..views.photo import prepare

        module, batch = self.module, self.samples[positions]
        batch.pop("events")
        batch = torch.utils._pytree.tree_map(lambda t: t.to(self.device), batch)
        mean, std = module.mean.to(self.device), module.std.to(self.device)
        return prepare(batch, module.views, mean, std)

    def _untrained(self) -> None:
        """Numbers and pictures of the untrained backbone, as row 0 of metrics.csv."""
        self.module.to(self.device)
        numbers = self.evaluate(0)
        if "knn" in numbers:
            numbers["knn_raw_pixels"] = self._online().raw_pixels()
        row = {"step": 0, "images": 0, "epoch": 0.0, "lr": self.module.lr(0), **numbers}
        Metrics(self.dir / "metrics.csv", -1).add(row)
        if "knn" in numbers:
            print(f"untrained: k-NN {numbers['knn']:.1f} %, raw pixels {numbers['knn_raw_pixels']:.1f} %", flush=True)

    def evaluate(self, step: int) -> dict[str, float]:
        """k-NN (with labels), RankMe and feature deviation of the backbone as it is now; pictures beside them."""
        training = self.module.training
        self.module.eval()
        try:
            backbone = self.ready_backbone()
            numbers = self._online().evaluate(backbone, self.mean, self.std, self.device)
            self._pictures(backbone, step)
        finally:
            self.module.train(training)
        return numbers

    def _pictures(self, backbone: Backbone, step: int) -> None:
        every = self.cfg.pictures.every_n_steps
        if every == 0 or (every and step % every and step != self.total_steps):
            return
        from . import pictures

        batch = self._prepared(range(min(8, self.cfg.batch_size)))
        batch = self.module.objective.draw(batch, step)
        paths = pictures.write(
            self.module.objective, backbone, batch, self.dir / "pictures", step, mean=self.mean, std=self.std
        )
        if self.sink is not None:
            self.sink.pictures(paths, step)

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish(self, world: int, seconds: float) -> dict:
        from ..interop.export import export_backbone
        from .report import write_report

        metrics = Metrics(self.dir / "metrics.csv", self.total_steps)
        summary = self._summary(metrics, world, seconds)
        _write_json(self.dir / "summary.json", summary)
        self.module.eval()
        backbone = self.ready_backbone()
        export_backbone(
            backbone, self.dir / "export", mean=self.mean, std=self.std, image_size=self.cfg.image_size,
            card=self._card(summary),
        )  # fmt: skip
        write_report(self.dir)
        if self.sink is not None:
            self.sink.finish()
        print("\n" + closing_table(summary, self.dir), flush=True)
        return summary

    def _card(self, summary: dict) -> dict:
        return summary | {
            "config": OmegaConf.to_container(self.cfg, resolve=True),
            "data": self.source.describe,
            "which": next(iter(self.module.objective.exports())),
            "image_size": self.cfg.image_size,
            "batch_size": self.cfg.batch_size,
        }

    def _summary(self, metrics: Metrics, world: int, seconds: float) -> dict:
        def ends(column: str) -> tuple[float | None, float | None]:
            values = [v for _, v in metrics.numbers(column)]
            return (values[0], values[-1]) if values else (None, None)

        speeds = sorted(v for _, v in metrics.numbers("images_per_second"))
        first, last = ends("loss")
        knn = dict(metrics.numbers("knn"))
        raw = ends("knn_raw_pixels")[0]
        return {
            "loss_first": first,
            "loss_last": last,
            "knn_untrained": knn.get(0),
            "knn_raw_pixels": raw,
            "knn": knn.get(self.total_steps),
            "knn_best": max((v for s, v in knn.items() if s > 0), default=None),
            "rankme": ends("rankme")[1],
            "feature_std": ends("feature_std")[1],
            "images_per_second": speeds[len(speeds) // 2] if speeds else None,
            "images_seen": self.total_steps * self.cfg.batch_size,
            "steps": self.total_steps,
            "epochs": self.total_steps * self.cfg.batch_size / self.num_samples,
            "bad_samples": ends("bad_samples")[1] or 0,
            "seconds": seconds,
            "processes": world,
            "run_dir": str(self.dir),
            "data_args": data_args(self.cfg.data),
            "objective": self.cfg.objective.name,
            "backbone": self.cfg.backbone.name,
            "provenance": provenance.collect(self.device),
        }


def workers_for(wanted: int | None, local_world: int, on_gpu: bool) -> int:
    """Loader processes per device: what was asked for, else the cores that are left (one on a CPU-only machine)."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // max(1, local_world) - 1)) if on_gpu else 1


def data_args(data: Any) -> str:
    """The words that make another command read the same data; nothing for the built-in scenes."""
    if data.name == "scenes":
        return ""
    words = [f"data={data.name}"]
    for key in ("train", "val", "root", "root_val"):
        if data.get(key):
            value = data[key] if isinstance(data[key], str) else f"[{','.join(data[key])}]"
            words.append(f"data.{key}={shlex.quote(value)}")
    return " " + " ".join(words)


def closing_table(summary: dict, run_dir: Path) -> str:
    """What a run achieved, and what to type next."""

    def show(key: str, form: str) -> str:
        value = summary.get(key)
        return "-" if value is None else form.format(value)

    rows = [
        ("loss, start", show("loss_first", "{:.4f}")),
        ("loss, end", show("loss_last", "{:.4f}")),
        ("k-NN, untrained backbone", show("knn_untrained", "{:.1f} %")),
        ("k-NN, raw pixels", show("knn_raw_pixels", "{:.1f} %")),
        ("k-NN, trained backbone", show("knn", "{:.1f} %")),
        ("RankMe", show("rankme", "{:.1f}")),
        ("images seen", show("images_seen", "{:,}")),
        ("images per second", show("images_per_second", "{:,.0f}")),
        ("time", duration(summary.get("seconds") or 0)),
    ]
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"  {name:<{width}}  {value:>12}" for name, value in rows)
    script = "python {}.py" if Path("train.py").exists() else "selfsight {}"
    return (
        f"{table}\n\n  everything is in {run_dir}: report.html, export/ (opens with timm), pictures/, metrics.csv\n\n"
        f"next:\n"
        f"  {script.format('probe')} checkpoint={run_dir} probe=linear{summary.get('data_args', '')}\n"
        f"  {script.format('export')} checkpoint={run_dir} out=my_backbone\n"
        f"  python -c \"import timm; timm.create_model('local-dir:{run_dir}/export', pretrained=True)\""
    )


def _write_json(path: Path, value: dict) -> None:
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(value, indent=1) + "\n")
    tmp.replace(path)
