"""`selfsight bench`: images per second of the model alone, of the data alone, and of both; what binds, what would help.

One process is measured, with its share of the batch and the loader workers it would have. The model and both together
run through the module and trainer of a training run; nothing is written. Rates are medians of consecutive windows
after a warm-up (compilation, caches, the loader's queue).
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, IterableDataset

from .config import ConfigError
from .data import open_source
from .data.loader import Positions, Samples, make_loader
from .data.order import Order
from .data.source import DataError, Source
from .objectives import build_objective
from .objectives.objective import Objective
from .training.flops import peak_flops, step_flops_per_image
from .training.lightning import make_trainer, precision_of
from .training.log import count, duration
from .training.module import Module, micro_batches
from .training.run import workers_for

WINDOWS = 5
WARM_UP = 3  # steps; fewer when they take longer than PATIENCE times the time asked for
PATIENCE = 4
FOREVER = 1 << 40  # steps that no benchmark reaches
CLOSE = 1.1  # two rates within this factor are called balanced


class Rate(NamedTuple):
    """Images per second of one part: median, slowest and fastest window; share of the time spent on waiting."""

    median: float
    low: float
    high: float
    waited: float = 0.0


class Setting(NamedTuple):
    """What decides the speed: of one process."""

    processes: int
    local_batch: int  # images per optimizer step
    micro_batches: int
    workers: int
    cores: int  # of this machine, shared by its processes
    local_processes: int
    device: torch.device
    precision: str
    compiled: bool


def bench(cfg: Any) -> dict:
    """Measure by a resolved config (`config.load("bench", ...)`), print the table, return its numbers.

    Keys: model, data, end_to_end (images/s of one process), data_wait, binds (model | data | cores | balanced), advice,
    flops_per_image, mfu_model, mfu_end_to_end (None where the peak is not known), projected_seconds of the configured
    run, and the setting. Raises ConfigError when a batch does not fit into memory, DataError for unusable data.
    """
    source, single, setting = _source(cfg), _one_process(cfg), _setting(cfg)
    total_steps = _total_steps(cfg, len(source))
    objective = build_objective(cfg, total_steps=total_steps, steps_per_epoch=len(source) / cfg.batch_size)
    flops = step_flops_per_image(objective)
    _print_setting(cfg, source, setting)
    if setting.compiled:
        objective.compile(fullgraph=True, dynamic=False)
    if cfg.trainer.checkpointing:
        objective.checkpoint_blocks()
    samples, module = _assemble(cfg, source, objective)
    try:
        model = measure_model(single, module, samples, setting)
        _print_rate("model alone", model)
        data, side = measure_data(single, samples, setting)
        _print_rate("data alone", data)
        both = measure_both(single, module, samples, setting)
        _print_rate("both", both, f"   waiting for data {both.waited:.0%}")
    except torch.OutOfMemoryError:
        micro = setting.local_batch // setting.micro_batches
        raise ConfigError(
            f"a batch of {micro} images does not fit into the memory of {setting.device}: "
            f"set trainer.max_batch_per_device={max(1, micro // 2)} or less"
        ) from None
    numbers = _numbers_of(cfg, setting, model, data, both, flops, total_steps)
    numbers["advice"] = advise(numbers, setting, shorter_side=side, image_size=cfg.image_size)
    _print_conclusion(numbers, total_steps, cfg.batch_size)
    return numbers


def _assemble(cfg: Any, source: Source, objective: Objective) -> tuple[Samples, Module]:
    order = Order(cfg.seed, source.lengths, cfg.data.chunk, cfg.data.window)
    samples = Samples(source, order, objective.views(), cfg.seed, cfg.data.channels)
    # Speed does not depend on the statistics of the pixels, so `auto` is not measured.
    mean, std = (
        (0.5,) * cfg.data.channels if value == "auto" else tuple(value) for value in (cfg.data.mean, cfg.data.std)
    )
    return samples, Module(objective, cfg.optim, lambda step: cfg.optim.lr, mean=mean, std=std)


# ---- what to measure -----------------------------------------------------------------------------------------


def _source(cfg: Any) -> Source:
    source = open_source(cfg.data, "train")
    if not isinstance(source, Source):
        raise DataError("data.mode=stream has no samples by number to measure; use data.mode=exact on plain tars")
    if len(source) == 0:
        raise DataError(f"{source.describe} has no samples to measure with")
    return source


def _setting(cfg: Any) -> Setting:
    t = cfg.trainer
    on_gpu = t.accelerator == "gpu" or (t.accelerator == "auto" and torch.cuda.is_available())
    local = t.devices if t.devices != "auto" else torch.cuda.device_count() if on_gpu else 1
    world = local * t.num_nodes
    micro = micro_batches(cfg.batch_size, world, t.max_batch_per_device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compiled = t.compile in (True, "true") or (t.compile == "auto" and on_gpu and not _sharded(cfg, world))
    return Setting(
        world, cfg.batch_size // world, micro, workers_for(cfg.num_workers, local, on_gpu), cores, local,
        torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        precision_of(t.precision, on_gpu), compiled,
    )  # fmt: skip


def _sharded(cfg: Any, processes: int) -> bool:
    """Whether the run keeps shards, of which one process shows nothing."""
    return cfg.trainer.strategy == "fsdp" and processes > 1


def _one_process(cfg: Any) -> Any:
    """The same config on a single process: gradients are exchanged with nobody."""
    single = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    single.trainer.devices, single.trainer.num_nodes, single.trainer.strategy = 1, 1, "auto"
    return single


def _total_steps(cfg: Any, num_samples: int) -> int:
    if cfg.max_steps is not None:
        return cfg.max_steps
    images = cfg.max_images if cfg.max_images is not None else cfg.max_epochs * num_samples
    return max(1, round(images / cfg.batch_size))


# ---- measuring -----------------------------------------------------------------------------------------------


class Windows:
    """Rates of consecutive windows. `tick` after each batch; True when enough has been seen.

    unit: batches that belong together (an optimizer step; a round of the workers). A window is a whole number of units
    and takes about a WINDOWS-th of `seconds`. The first `warm_up` batches and a short trial window do not count.
    """

    def __init__(self, seconds: float, images: int, unit: int, warm_up: int, wait_for_device: Callable[[], Any]):
        self.seconds, self.images, self.unit, self.warm_up = seconds, images, unit, warm_up
        self.wait_for_device = wait_for_device
        self.created, self.since, self.spent, self.waited = time.perf_counter(), None, 0.0, 0.0
        self.batches, self.length, self.trial, self.rates = 0, unit, True, []

    def tick(self) -> bool:
        self.batches += 1
        if self.since is None:
            patient = time.perf_counter() - self.created < PATIENCE * self.seconds
            if self.batches % self.unit or (self.batches < self.warm_up and patient):
                return False
            self._open()
            return False
        if self.batches < self.length:
            return False
        self.wait_for_device()
        spent = time.perf_counter() - self.since
        target = self.seconds / WINDOWS
        if self.trial and spent < target:
            self.length = self.unit * max(1, round(target / max(spent, 1e-9)))
        else:
            self.spent += spent
            self.rates.append(self.batches * self.images / spent)
        self.trial = False
        if len(self.rates) >= WINDOWS or self.spent >= self.seconds:
            return True
        self._open()
        return False

    def _open(self) -> None:
        self.wait_for_device()
        if not self.rates:
            self.waited = 0.0
        self.batches, self.since = 0, time.perf_counter()

    def rate(self) -> Rate:
        waited = min(1.0, self.waited / self.spent)
        return Rate(statistics.median(self.rates), min(self.rates), max(self.rates), waited)


class _Stopwatch(pl.Callback):
    """Ticks after every batch of a fit and ends it; counts the time between batches as waiting for data."""

    def __init__(self, windows: Windows):
        self.windows, self.ended = windows, time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.windows.waited += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.windows.tick():
            trainer.should_stop = True
        self.ended = time.perf_counter()


class _Same(IterableDataset):
    """One batch again and again."""

    def __init__(self, batch: dict):
        self.batch = batch

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield self.batch


def _wait_for(device: torch.device) -> Callable[[], Any]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _fit(cfg: Any, module: Module, loader: Any, setting: Setting, warm_up: int) -> Rate:
    images = setting.local_batch // setting.micro_batches
    windows = Windows(cfg.seconds, images, setting.micro_batches, warm_up, _wait_for(setting.device))
    trainer = make_trainer(cfg, [_Stopwatch(windows)])
    trainer.accumulate_grad_batches = setting.micro_batches
    trainer.fit(module, loader)
    return windows.rate()


def measure_model(cfg: Any, module: Module, samples: Samples, setting: Setting) -> Rate:
    """One batch that lies on the device: flips and normalisation, masks, forward, backward, optimizer step."""
    batch = samples[range(setting.local_batch // setting.micro_batches)]
    batch.pop("events")
    batch = torch.utils._pytree.tree_map(lambda t: t.to(setting.device), batch)
    loader = DataLoader(_Same(batch), batch_size=None, collate_fn=lambda b: dict(b))
    return _fit(cfg, module, loader, setting, WARM_UP * setting.micro_batches)


def _loader(samples: Samples, setting: Setting) -> DataLoader:
    positions = Positions(0, FOREVER, setting.local_batch, setting.micro_batches, 0, 1)
    return make_loader(samples, positions, setting.workers, pin_memory=setting.device.type == "cuda")


def measure_data(cfg: Any, samples: Samples, setting: Setting) -> tuple[Rate, float]:
    """The loader alone, its uint8 batches thrown away; also the median shorter side of the images, pixels."""
    unit = max(1, setting.workers)
    images = setting.local_batch // setting.micro_batches
    windows = Windows(cfg.seconds, images, unit, WARM_UP * unit, lambda: None)
    sides: list[torch.Tensor] = []
    for batch in _loader(samples, setting):
        if len(sides) < 8:
            sides.append(batch["sizes"].min(dim=1).values)
        if windows.tick():
            break
    return windows.rate(), float(torch.cat(sides).median())


def measure_both(cfg: Any, module: Module, samples: Samples, setting: Setting) -> Rate:
    """The loader feeding the model. The queue that fills while the first step compiles is used up before counting."""
    loader = _loader(samples, setting)
    queue = setting.workers * (loader.prefetch_factor or 0)
    return _fit(cfg, module, loader, setting, queue + WARM_UP * setting.micro_batches)


# ---- concluding ----------------------------------------------------------------------------------------------


def _numbers_of(
    cfg: Any, setting: Setting, model: Rate, data: Rate, both: Rate, flops: float, total_steps: int
) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(setting.device), setting.precision) if on_gpu else None
    return {
        "model": model.median,
        "data": data.median,
        "end_to_end": both.median,
        "data_wait": both.waited,
        "binds": binds(model.median, data.median, both.median, setting.workers),
        "flops_per_image": flops,
        "mfu_model": model.median * flops / peak if peak else None,
        "mfu_end_to_end": both.median * flops / peak if peak else None,
        "projected_seconds": total_steps * cfg.batch_size / (both.median * setting.processes),
        "memory_share": torch.cuda.max_memory_allocated() / torch.cuda.mem_get_info()[1] if on_gpu else None,
        **setting._replace(device=str(setting.device))._asdict(),
    }


def binds(model: float, data: float, both: float, workers: int) -> str:
    """model | data | balanced, or cores: where the two slow each other down because they share processor cores.

    Without loader workers the two take turns, and the slower one binds.
    """
    if workers and both * CLOSE * CLOSE < min(model, data):
        return "cores"
    if max(model, data) < CLOSE * min(model, data):
        return "balanced"
    return "data" if data < model else "model"


def advise(numbers: dict[str, Any], setting: Setting, *, shorter_side: float, image_size: int) -> list[str]:
    """What would make the run faster, most useful first."""
    advice, on_gpu = [], setting.device.type == "cuda"
    if numbers["binds"] in ("data", "cores"):
        advice += _advise_data(numbers, setting, shorter_side, image_size)
    if numbers["binds"] in ("model", "balanced", "cores") and on_gpu:
        if setting.precision.startswith("32"):
            advice.append("trainer.precision=bf16-mixed computes in half precision")
        if not setting.compiled:
            advice.append("trainer.compile=true fuses the blocks (some minutes at the start)")
        if setting.micro_batches > 1 and (numbers.get("memory_share") or 1) < 0.45:
            micro = setting.local_batch // setting.micro_batches
            advice.append(
                f"trainer.max_batch_per_device={2 * micro}: a micro-batch of {micro} uses "
                f"{numbers['memory_share']:.0%} of the memory"
            )
    if numbers["binds"] == "model" and not on_gpu:
        advice.append("the processor computes the model: a GPU, a smaller backbone or a smaller image_size")
    return advice


def _advise_data(numbers: dict[str, Any], setting: Setting, shorter_side: float, image_size: int) -> list[str]:
    advice = []
    # A random resized crop hardly profits from pixels beyond 8/7 of its size (256 for 224, the field's custom).
    enough = math.ceil(image_size * 8 / 7 / 8) * 8
    if shorter_side > 1.25 * enough:
        advice.append(
            f"`selfsight prepare size={enough}`: the images' shorter side is {shorter_side:.0f} px, which is decoded "
            "for every crop"
        )
    on_gpu = setting.device.type == "cuda"
    spare = setting.cores // setting.local_processes - setting.workers - (1 if on_gpu else 0)
    if numbers["binds"] == "data" and spare > 0:
        need = math.ceil(max(1, setting.workers) * numbers["model"] / numbers["data"])
        advice.append(f"num_workers={min(setting.workers + spare, need)}: {setting.cores} cores are here")
    elif numbers["binds"] == "cores" and not on_gpu:
        advice.append("num_workers=0: beside a loader worker the model's threads wait for each other")
    elif not advice:
        advice.append(
            f"more processor cores: the {setting.cores} here feed {setting.local_processes} "
            f"process{'es' if setting.local_processes > 1 else ''}"
        )
    return advice


# ---- printing ------------------------------------------------------------------------------------------------


def _print_setting(cfg: Any, source: Source, s: Setting) -> None:
    micro = f" in {s.micro_batches} micro-batches" if s.micro_batches > 1 else ""
    of = f" (one process of {s.processes}, without the exchange of gradients)" if s.processes > 1 else ""
    workers = f"{s.workers} loader worker{'s' if s.workers != 1 else ''}"
    compiled = ", compiled" if s.compiled else ""
    whole = (
        "\n  trainer.strategy=fsdp is measured with whole weights: what shards save and cost is not seen"
        if _sharded(cfg, s.processes) else ""
    )  # fmt: skip
    print(
        f"{cfg.objective.name} on {cfg.backbone.name}, {cfg.image_size} px: batches of {s.local_batch}{micro}{of}\n"
        f"  {s.device}, {s.precision}{compiled}, {workers}, {s.cores} cores; {source.describe}\n"
        f"  median of {WINDOWS} windows, {cfg.seconds:g} s each part, warm-up not counted{whole}{_busy(s.cores)}\n\n"
        f"  {'':12}  images/s   slowest .. fastest window",
        flush=True,
    )


def _busy(cores: int) -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return (
        f"\n  other programs keep this machine busy (load {load:.1f}): alone, it is faster" if load > cores + 1 else ""
    )


def _print_rate(name: str, rate: Rate, more: str = "") -> None:
    print(f"  {name:12}  {rate.median:8,.1f}   {rate.low:,.1f} .. {rate.high:,.1f}{more}", flush=True)


def _print_conclusion(n: dict[str, Any], total_steps: int, batch_size: int) -> None:
    words = {
        "model": f"the model binds: the data could feed {n['data'] / n['model']:.1f} times as much",
        "data": f"the data binds: the model could take {n['model'] / n['data']:.1f} times as much",
        "balanced": "model and data are balanced: making only one of them faster gains little",
        "cores": "model and loader share the processor's cores and slow each other down",
    }
    percent = [f"{v:.1%}" if v is not None else "n/a" for v in (n["mfu_model"], n["mfu_end_to_end"])]
    lines = [f"\n  {words[n['binds']]}", *(f"    {text}" for text in n["advice"])]
    lines.append(
        f"  {n['flops_per_image'] / 1e9:.3g} GFLOP per image, both ways; MFU {percent[0]} alone, {percent[1]} with data"
    )
    lines.append(
        f"  the configured run, {total_steps:,} steps = {count(total_steps * batch_size)} images on {n['processes']} "
        f"process{'es' if n['processes'] > 1 else ''}: about {duration(n['projected_seconds'])}, "
        "evaluation and checkpoints not counted"
    )
    print("\n".join(lines), flush=True)
