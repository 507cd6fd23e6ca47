"""`selfsight train`: assemble a run, say what it will do, do it (or continue it), and leave a usable model behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from .. import config
from ..data import open_source
from ..data.loader import Positions, Samples, StreamBatches, make_loader
from ..data.order import VERSION as ORDER_VERSION
from ..data.order import Order
from ..data.rng import VERSION as RNG_VERSION
from ..data.rng import hash_ints
from ..data.source import DataError, Source
from ..data.statistics import mean_std
from ..data.stream import Stream
from ..faults import fault
from ..objectives import build_objective
from ..objectives.objective import Objective
from . import checkpoint, meet, provenance
from .eval_plan import EvalPlan
from .evals import Evals
from .flops import peak_flops, step_flops_per_image
from .judge import Judge
from .lightning import make_trainer, precision_of, process_rank
from .log import Metrics
from .loop import AfterStep, Plan, RunStopped
from .module import Module, micro_batches
from .schedules import cosine, warmup_cosine
from .screen import closing_table, first_screen, summarise
from .sharded import Whole
from .start import fill, keep, kept, open_start
from .stop import StopFlag
from .trouble import Trouble

LINES, EVALUATIONS = 50, 5  # per run, when log_every_n_steps and knn.every_n_steps are not given
SMOKE = 10  # a run of fewer steps is a try-out: it is judged only when knn.every_n_steps is given
LEFTOVERS = (".tmp-export-*", ".old-export-*", ".config.yaml.*", ".report.html-*")  # of a killed process
FEW_BAD = 8  # bad samples that a run of any size survives


def train(cfg: Any) -> dict:
    """Train by a resolved config (`config.load("train", ...)`); returns what summary.json holds (rank 0).

    Resumes when the run folder has a checkpoint. Raises RunStopped when a signal, bad data or a non-finite loss ends
    the run early.
    """
    flag = StopFlag()
    flag.install()  # before any fork
    run = Run(cfg, flag)
    return run.report_done() if run.done() else run.go()


class Run:
    """One training run on this process."""

    def __init__(self, cfg: Any, flag: StopFlag):
        self.cfg, self.flag, self.dir, self.sink, self.began = cfg, flag, Path(cfg.run_dir), None, None
        self.rank = process_rank()
        self.changes = config.changes(cfg)
        self.start_path = checkpoint.newest(self.dir / "checkpoints", refuse=True)
        self.start = int(self.start_path.name.split("-")[1]) if self.start_path else 0
        with torch.device("meta"):  # an objective or backbone that cannot be built is refused before data is touched
            tried = build_objective(cfg, total_steps=1, steps_per_epoch=1)
        if cfg.trainer.checkpointing:
            tried.checkpoint_blocks()
        self.weights = open_start(cfg.init_from, tried) if self.start_path is None else None
        self.source = self._open()
        self.val = open_source(cfg.data, "val")
        self.streaming = isinstance(self.source, Stream)
        self.num_samples = None if self.streaming else sum(self.source.lengths)
        self.total_steps = self._total_steps()
        self.steps_per_epoch = (self.num_samples or math.inf) / cfg.batch_size
        if self.start > self.total_steps:
            raise config.ConfigError(
                f"{self.dir} is already at step {self.start}, beyond the {self.total_steps} that are asked for: "
                "give a longer duration, or another run_dir"
            )
        self.evals = Evals(EvalPlan(cfg, self.total_steps)) if cfg.eval else None
        if self.evals is not None:
            self.evals.plan.check(list(tried.exports()))
        self.mean, self.std = self._normalisation()

    # -- what the run is -----------------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        if self.changes:
            with (self.dir / "changes.jsonl").open("a") as f:
                f.write(json.dumps({"time": time.strftime("%F %T"), "changes": self.changes}) + "\n")
        checkpoint.clean(self.dir / "checkpoints")
        for sentence in checkpoint.set_aside(self.dir / "checkpoints", self.start):
            print(sentence, flush=True)
        for pattern in LEFTOVERS:
            for path in self.dir.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        config.save(self.cfg, self.dir / "config.yaml")

    def _open(self) -> Source | Stream:
        cfg = self.cfg
        source = open_source(cfg.data, "train")
        if isinstance(source, Stream):
            return source
        n = sum(source.lengths)
        if n < cfg.batch_size:
            fits = f"use batch_size={2 ** int(math.log2(n))} or less" if n else "is anything there?"
            raise DataError(f"{source.describe} has {n:,} samples, fewer than one batch of {cfg.batch_size}; {fits}")
        if not source.has_objects and cfg.objective.get("no_mask") == "error":
            raise DataError(
                f"{source.describe} has no object masks and objective.no_mask=error: add objects.png or boxes.json, or "
                "side-car shards (data.objects=, made by `selfsight proposals`), or use objective.no_mask=full"
            )
        return source

    def _total_steps(self) -> int:
        cfg = self.cfg
        if cfg.max_steps is not None:
            return cfg.max_steps
        if cfg.max_images is None and self.num_samples is None:
            raise config.ConfigError("a stream has no known length: give max_steps= or max_images=, not epochs")
        images = cfg.max_images if cfg.max_images is not None else cfg.max_epochs * self.num_samples
        return max(1, round(images / cfg.batch_size))

    def _normalisation(self) -> tuple[list[float], list[float]]:
        data = self.cfg.data
        if "auto" not in (data.mean, data.std):
            return list(data.mean), list(data.std)
        if self.streaming:
            raise config.ConfigError(
                "data.mean=auto reads samples by number, which a stream does not have: give numbers"
            )
        mean, std = mean_std(self.source, data.channels)
        return (mean if data.mean == "auto" else list(data.mean)), (std if data.std == "auto" else list(data.std))

    def _fingerprint(self) -> dict:
        """What the order and content of the training samples depend on."""
        data = self.cfg.data
        return {
            "data": self.source.describe if self.streaming else self.source.fingerprint,
            "seed": self.cfg.seed, "batch_size": self.cfg.batch_size, "chunk": data.chunk, "window": data.window,
            "order_version": ORDER_VERSION, "rng_version": RNG_VERSION,
        }  # fmt: skip

    def _in_common(self) -> dict:
        """What all processes of the run must have in common. Data are known by what they hold, not by their place."""
        data = [Path(url).name for url in self.source.urls] if self.streaming else self.source.fingerprint
        return config.in_common(self.cfg) | {meet.DATA: data, "the number of steps": self.total_steps}

    def _load(self, objective: Objective) -> tuple[dict[str, Tensor] | None, dict]:
        """Put the newest checkpoint into the objective; returns the optimizer's state and what stands beside it."""
        if self.start_path is None:
            return None, {}
        state, meta = checkpoint.load(self.start_path)
        old, new = meta["fingerprint"], self._fingerprint()
        changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
        if changed and not self.cfg.allow_change:
            raise config.ConfigError(
                f"the data or its order changed since {self.start_path} was written ({'; '.join(changed)}): "
                "restore it, use another run_dir, or continue with allow_change=true"
            )
        checkpoint.load_unique_state(objective, state)
        return checkpoint.load(self.start_path, "optim")[0], meta

    # -- a run that is over --------------------------------------------------------------------------------------

    def done(self) -> bool:
        """Trained, exported and reported; a run that was ended in between does the rest."""
        written = (self.dir / "report.html").exists() and self._summary().get("steps") == self.total_steps
        to_do = self.evals is not None and self.evals.plan.left(self.start)
        return self.start >= self.total_steps and written and not to_do

    def _summary(self) -> dict:
        path = self.dir / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def report_done(self) -> dict:
        summary = self._summary()
        if self.rank == 0:
            summary = self._late(summary)
            print(f"This run is finished ({self.start} steps); choose another run_dir= or seed= to train again.\n")
            print(closing_table(summary, self.dir))
        return summary

    def _late(self, summary: dict) -> dict:
        """Take in what jobs have measured since the run ended."""
        if self.evals is None:
            return summary
        self.evals.take_up(self.start)
        self.evals.collect()
        if self.evals.summary() != summary.get("evals"):
            summary = summary | {"evals": self.evals.summary()}
            checkpoint.prune(self.dir / "checkpoints", self.cfg.checkpoint.keep_last, self.evals.needed())
            self._write(summary)
        return summary

    # -- running -------------------------------------------------------------------------------------------------

    def go(self) -> dict:
        """Train what is left, export and report. The logger is closed however this ends."""
        code = 1
        try:
            summary, code = self._go(), 0
            return summary
        except (RunStopped, SystemExit) as ended:
            code = ended.code
            raise
        finally:
            if self.evals is not None and self.rank == 0:
                self.evals.close()
            if self.sink is not None:
                self.sink.finish(code)

    def _go(self) -> dict:
        cfg = self.cfg
        torch.manual_seed(cfg.seed)  # initial weights; nothing later draws from the global generator
        objective = build_objective(cfg, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)
        optimizer_state, meta = self._load(objective)
        if self.weights is not None:
            self.began, self.weights = fill(objective, self.weights, self.mean, self.std), None
        self.module = self.shown = self._module(objective, optimizer_state, meta.get("scaler"))
        plan = self._plan()
        plan.seconds_before, plan.hang_minutes = meta.get("seconds", 0.0), cfg.trainer.hang_minutes
        plan.means = meta.get("means", {})
        plan.in_common = self._in_common()
        plan.data = self.source.describe + ("" if self.streaming else f" ({self.num_samples:,} samples)")
        after = AfterStep(plan, self.rank, self.flag, self._evaluate)
        after.evals = self.evals
        trouble = Trouble(cfg, self._stands)
        trainer = make_trainer(cfg, [after, trouble])
        world, device = trainer.world_size, trainer.strategy.root_device
        plan.micro_batches = micro_batches(cfg.batch_size, world, cfg.trainer.max_batch_per_device)
        trainer.accumulate_grad_batches = plan.micro_batches
        loader = self._loader(trainer, plan)
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if sharded:
            after.whole = self._whole()
        with trouble.told(trainer, plan.micro_batches, loader.num_workers), after.watching(self.start, world):
            if self.rank == 0:
                self._begin(world, device, plan, loader.num_workers)
                after.sink = self.sink
            if sharded:
                after.whole.rest()  # it was looked at as the run begins
            if (cfg.trainer.compile == "auto" and device.type == "cuda" and not sharded) or cfg.trainer.compile is True:
                objective.compile(fullgraph=True, dynamic=False)
            if cfg.trainer.checkpointing:
                objective.checkpoint_blocks()
            after.started = time.monotonic()
            if self.start < self.total_steps:
                after.meet()
                trainer.fit(self.module, loader)
        if after.stopped is not None:
            raise after.stopped
        if self.rank != 0:
            return {}
        if sharded:  # the shards and moments are still on the device
            self.judge.device = torch.device("cpu")
        return self._finish(world, device, after.seconds())

    def _stands(self) -> str:
        """Where the same command goes on after a run that ended early."""
        path = checkpoint.newest(self.dir / "checkpoints")
        if path is None:
            return "No checkpoint has been written yet: the same command begins again"
        return f"The checkpoint of step {int(path.name.split('-')[1]):,} stands, and the same command continues from it"

    def _module(self, objective: Objective, optimizer_state: dict | None = None, scaler: dict | None = None) -> Module:
        o = self.cfg.optim
        return Module(
            objective, o, self._schedule(), mean=tuple(self.mean), std=tuple(self.std), step=self.start,
            weight_decay=cosine(o.weight_decay, o.weight_decay_end, round(self.total_steps * o.ipe_scale)),
            optimizer_state=optimizer_state, scaler_state=scaler,
        )  # fmt: skip

    def _whole(self) -> Whole:
        """What puts shards together; on rank 0 with a twin of the module, which is what is judged and exported."""
        if self.rank != 0:
            return Whole(self.module, None)
        twin = build_objective(self.cfg, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)
        self.shown = self._module(twin)
        return Whole(self.module, self.shown)

    def _schedule(self):
        o = self.cfg.optim
        warmup = min(config.duration(o.warmup).steps(self.total_steps, self.steps_per_epoch), self.total_steps)
        total, start = round(self.total_steps * o.ipe_scale), o.warmup_start * o.lr
        return warmup_cosine(o.lr, total, warmup, o.min_lr, start, inclusive=o.schedule == "official")

    def _plan(self) -> Plan:
        cfg, c = self.cfg, self.cfg.checkpoint
        knn_every, pictures_every = cfg.knn.every_n_steps, cfg.pictures.every_n_steps
        if knn_every is None and self.total_steps >= SMOKE:
            knn_every = math.ceil(self.total_steps / EVALUATIONS)
        knn_every = knn_every or None
        pictures_every = knn_every if pictures_every is None else pictures_every or None
        log_every = cfg.log_every_n_steps or min(100, math.ceil(self.total_steps / LINES))
        per_epoch = self.num_samples or self.total_steps * cfg.batch_size
        meta = {
            "fingerprint": self._fingerprint(), "versions": provenance.versions(), "mean": self.mean, "std": self.std,
        }  # fmt: skip
        return Plan(
            self.dir, self.total_steps, cfg.batch_size, 1, self.num_samples, log_every, knn_every,
            pictures_every, c.every_n_steps, c.every_n_minutes, c.keep_last, c.keep_best,
            max(FEW_BAD, int(cfg.data.max_bad_fraction * per_epoch)), meta,
        )  # fmt: skip

    def _loader(self, trainer: pl.Trainer, plan: Plan) -> DataLoader:
        cfg, views = self.cfg, self.module.views
        on_gpu = trainer.strategy.root_device.type == "cuda"
        workers = workers_for(cfg.num_workers, trainer.world_size // cfg.trainer.num_nodes, on_gpu)
        channels = cfg.data.channels
        if self.streaming:
            # A continued stream goes on in another order of shards, or its first ones would be seen most.
            self.source.seed = hash_ints(cfg.seed, self.start) if self.start else cfg.seed
            self.source.rank, self.source.world = trainer.global_rank, trainer.world_size
            local = cfg.batch_size // (trainer.world_size * plan.micro_batches)
            batches = StreamBatches(self.source, views, cfg.seed, local, self.start * cfg.batch_size, channels)
            trainer.limit_train_batches = (self.total_steps - self.start) * plan.micro_batches
            self.samples = None
            return make_loader(batches, None, min(workers, len(self.source.urls) // trainer.world_size), on_gpu)
        order = Order(cfg.seed, self.source.lengths, cfg.data.chunk, cfg.data.window)
        self.samples = Samples(self.source, order, views, cfg.seed, channels)
        positions = Positions(
            self.start, self.total_steps, cfg.batch_size, plan.micro_batches, trainer.global_rank, trainer.world_size
        )
        return make_loader(self.samples, positions, workers, on_gpu)

    def _begin(self, world: int, device: torch.device, plan: Plan, workers: int) -> None:
        """Rank 0: claim the folder, say what will happen, judge the backbone as it begins."""
        cfg, objective = self.cfg, self.module.objective
        try:
            self._claim_folder()
        except OSError as error:
            raise config.ConfigError(
                f"run_dir={self.dir} cannot be written ({error.strerror or error}): give one on a disk that has "
                "room and where you may write"
            ) from error
        precision = precision_of(cfg.trainer.precision, device.type == "cuda")
        resuming = f"at step {self.start:,} from {self.start_path}" if self.start else None
        print(
            first_screen(
                cfg, objective, next(iter(objective.exports().values())), num_samples=self.num_samples,
                labelled=self.source.labelled, describe=self.source.describe,
                left_out=getattr(self.source, "left_out", ""), objects=self._objects(), steps=self.total_steps,
                world=world, micro_batches=plan.micro_batches, workers=workers, device=str(device), precision=precision,
                resuming=resuming,
            ),
            flush=True,
        )  # fmt: skip
        if self.began is not None:
            print(self.began.text(), flush=True)
            keep(self.began, self.dir)
        self.sink = self._sink()
        plan.flops_per_image = step_flops_per_image(objective)
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), precision)
            plan.peak_flops = peak * world if peak else None
        self.judge = Judge(
            cfg, self.shown, device, train=None if self.streaming else self.source, val=self.val,
            batch_at=self.samples.__getitem__ if self.samples else None, folder=self.dir, measure=bool(plan.knn_every),
        )  # fmt: skip
        if plan.knn_every:
            print(f"  judged      every {plan.knn_every:,} steps: {self.judge.describe}", flush=True)
        if self.start == 0:
            self._untrained(bool(plan.knn_every), bool(plan.pictures_every))
        if self.evals is not None:
            self._begin_evals()

    def _begin_evals(self) -> None:
        """Say what will be evaluated, and go on where an earlier session stopped."""
        evals = self.evals
        print(evals.plan.describe(), flush=True)
        evals.judge = self.judge
        if self.sink is not None:
            evals.log = self.sink.evaluation
        evals.take_up(self.start)
        evals.inline(self.start)

    def _objects(self) -> str:
        """What an objective that asks for objects does without any."""
        no_mask = self.cfg.objective.get("no_mask")
        if no_mask is None or self.source.has_objects:
            return ""
        found = "known as the stream is read: without any, an" if self.streaming else "none in the data: every"
        does = {"full": "counts as one object, as in iBOT", "skip": "has no pooled loss", "error": "is a bad sample"}
        return f"{found} image {does[no_mask]} (objective.no_mask={no_mask})"

    def _sink(self) -> Any:
        if self.cfg.logger.name != "wandb":
            return None
        from .wandb_sink import WandB

        return WandB(self.cfg, self.dir)

    def _untrained(self, measure: bool, draw: bool) -> None:
        """Numbers and pictures of the backbone as it begins; numbers are row 0 of metrics.csv."""
        numbers = self._evaluate(0, measure, draw) if measure or draw else {}
        if not measure:
            return
        row = {"step": 0, "images": 0, "epoch": 0.0, "lr": self.module.lr(0), **numbers}
        Metrics(self.dir / "metrics.csv", -1).add(row)
        if self.sink is not None:
            self.sink.log(row, 0)
        if "knn" in numbers:
            which = "untrained" if self.began is None else "at the start"
            print(f"{which}: k-NN {numbers['knn']:.1f} %, raw pixels {numbers['knn_raw_pixels']:.1f} %", flush=True)

    def _evaluate(self, step: int, measure: bool, draw: bool) -> dict[str, float]:
        try:
            numbers = self.judge.evaluate(step, measure, draw)
        except torch.OutOfMemoryError as error:
            looks = [name for name, due in (("knn", measure), ("pictures", draw)) if due]
            off = " ".join(f"{name}.every_n_steps=0" for name in looks)
            raise RunStopped(
                f"judging step {step} ({', '.join(looks)}) does not fit into the memory of {self.judge.device} beside "
                f"the training: use {off}, and evaluate the export. {self._stands()}",
                6,
            ) from error
        if draw and self.sink is not None:
            self.sink.pictures(sorted((self.dir / "pictures").glob(f"*-{step:07d}.png")), step)
        return numbers

    def _finish(self, world: int, device: torch.device, seconds: float) -> dict:
        from ..interop.export import export_backbone

        cfg = self.cfg
        images = self.total_steps * cfg.batch_size
        metrics = Metrics(self.dir / "metrics.csv", self.total_steps)
        summary = summarise(metrics, self.total_steps) | {
            "images_seen": images, "steps": self.total_steps,
            "epochs": images / self.num_samples if self.num_samples else None,
            "seconds": seconds, "processes": world, "run_dir": str(self.dir), "objective": cfg.objective.name,
            "backbone": cfg.backbone.name, "provenance": provenance.collect(device),
        } | kept(self.dir)  # fmt: skip
        self.module.eval()
        export_backbone(
            self.judge.backbone(), self.dir / "export", mean=self.mean, std=self.std, image_size=cfg.image_size,
            card=summary | {
                "config": OmegaConf.to_container(cfg, resolve=True), "data": self.source.describe,
                "which": next(iter(self.module.objective.exports())), "image_size": cfg.image_size,
                "batch_size": cfg.batch_size,
            },
        )  # fmt: skip
        fault("summary")
        if self.evals is not None:
            self.evals.wait()
            summary |= {"evals": self.evals.summary()}
        # What was killed between its last checkpoint and the end of its pruning has to be settled as well.
        folder, needed = self.dir / "checkpoints", self.evals.needed() if self.evals else ()
        checkpoint.settle(folder, self.total_steps, metrics.scores() if cfg.checkpoint.keep_best else {})
        checkpoint.prune(folder, cfg.checkpoint.keep_last, needed)
        self._write(summary)
        print("\n" + closing_table(summary, self.dir), flush=True)
        return summary

    def _write(self, summary: dict) -> None:
        """summary.json, and the page that shows it."""
        from .report import write_report

        (self.dir / "report.html").unlink(missing_ok=True)  # it is there only when it shows this summary
        tmp = self.dir / "summary.tmp"
        tmp.write_text(json.dumps(summary, indent=1) + "\n")
        tmp.replace(self.dir / "summary.json")
        write_report(self.dir)


def workers_for(wanted: int | None, local_world: int, on_gpu: bool) -> int:
    """Loader processes per device: what was asked for, else the cores that are left.

    On a CPU the model needs all cores, and a worker beside it makes its threads wait for each other: none.
    """
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // max(1, local_world) - 1)) if on_gpu else 0
