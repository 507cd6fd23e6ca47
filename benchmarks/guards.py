"""What the guards cost: one training step with and without them, in one run.

    python benchmarks/guards.py --out benchmarks/results/guards.json
    python benchmarks/guards.py --device cuda --precision bf16 --batch 128 --steps 20
    python benchmarks/guards.py --backbone vit_nano --batch 4 --repeats 1

With guards: is the loss finite, is the norm of the gradients finite, a flag by which the optimizer skips its step, the
answer read by the host, the watchdog's thread and its two notes per step. Without: none of these. A step is everything
between two batches as `training.module` has it: prepare, draw, forward, loss, backward, clipping, AdamW. The norm is
that of clipping where there is clipping, and the guard's own where there is none, so both are measured. Both variants
start from the same weights, take turns, and must have the same loss after their last step; ratios are medians of the
ratios inside a repeat. Time is processor time on one thread of a CPU (the watchdog's thread included), wall clock on
more, and the GPU's own on CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import step_options
import torch
from distill_step import WARM_UP, Timer
from torch import Tensor

from selfsight import config
from selfsight.data.rng import key_of
from selfsight.objectives import build_objective
from selfsight.training.module import Module
from selfsight.training.optim import build_adamw, param_groups
from selfsight.training.watchdog import DATA, STEP, Watchdog
from selfsight.views.photo import prepare

STEPS = 1000


class Guarded:
    """A module and its optimizer, stepped as the loop does."""

    module_class = Module

    def __init__(self, cfg: Any, args: argparse.Namespace, watchdog: Watchdog):
        torch.manual_seed(0)
        objective = build_objective(cfg, total_steps=STEPS, steps_per_epoch=STEPS).to(args.device).train()
        self.module = self.module_class(objective, cfg.optim, lambda step: 1e-4, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.module.to(args.device)
        self.module.log = lambda *a, **k: None
        groups = param_groups(objective, cfg.optim.weight_decay, cfg.optim.decay_rule)
        self.optimizer = build_adamw(groups, 1e-4, cfg.optim.betas, cfg.optim.eps, fused=True)
        self.args, self.watchdog, self.loss = args, watchdog, None

    def gradients(self, batch: dict[str, Any], step: int) -> None:
        self.enter(STEP)
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16"):
            self.loss = self.module.training_step(dict(batch), step)
        self.loss.backward()

    def update(self, step: int) -> None:
        self.module.configure_gradient_clipping(self.optimizer)
        self.module.optimizer_step(0, step, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.look()
        self.enter(DATA)

    def enter(self, phase: str) -> None:
        self.watchdog.enter(phase, self.module.step)

    def look(self) -> None:
        """The host reads the answer; on a GPU that of the step before, without waiting."""
        if self.args.device == "cpu":
            assert bool(self.module.finite)


class Unguarded(Guarded):
    """The same without any of it."""

    class module_class(Module):
        """Neither loss nor gradients are looked at."""

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            with torch.no_grad():
                ready = self.objective.draw(prepare(batch, self.views, self.mean, self.std), self.step)
            return self.objective.loss(ready, self.step)[0]

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.objective.after_backward(self.step)
            if self.optim.clip:
                torch.nn.utils.clip_grad_norm_([p for p in self.objective.parameters() if p.grad is not None],
                                               self.optim.clip)  # fmt: skip

    def enter(self, phase: str) -> None:
        pass

    def look(self) -> None:
        pass


def images(module: Module, args: argparse.Namespace) -> dict[str, Any]:
    """A batch as the loader leaves it: uint8 crops and keys."""
    generator = torch.Generator().manual_seed(1)
    crops = {
        c.name: torch.randint(0, 256, (c.count, args.batch, 3, c.size, c.size), generator=generator, dtype=torch.uint8)
        for c in module.views.crops
    }
    key = torch.from_numpy(key_of(0, np.arange(args.batch)))
    return {"key": key.to(args.device), "crops": {name: crop.to(args.device) for name, crop in crops.items()}}


def measure(args: argparse.Namespace, clip: float, watchdog: Watchdog) -> dict[str, float]:
    """Both variants, taking turns; the order changes with every repeat."""
    fixed = ["data=folder", "data.root=unused", f"max_steps={STEPS}", f"backbone={args.backbone}"]
    cfg = config.load("bench", [f"objective={args.objective}", *fixed, f"optim.clip={clip}", *args.keys])
    variants = {"guarded": Guarded(cfg, args, watchdog), "bare": Unguarded(cfg, args, watchdog)}
    batch, timer = images(variants["bare"].module, args), Timer(args)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(WARM_UP + args.repeats):
        for name in sorted(variants, reverse=bool(repeat % 2)):
            seconds[name].append(timer.turn(variants[name], batch, repeat * args.steps).seconds)
    first, second = (v.loss.item() for v in variants.values())
    assert first == second, f"guards changed the loss: {first}, {second}"
    pairs = list(zip(seconds["guarded"][WARM_UP:], seconds["bare"][WARM_UP:], strict=True))
    ratios = [mine / bare for mine, bare in pairs]
    return {
        "milliseconds": round(1000 * statistics.median(bare for _, bare in pairs), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_lowest": round(min(ratios), 4),
        "ratio_highest": round(max(ratios), 4),
    }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="config keys, for example image_size=96")
    parser.add_argument("--objective", default="mae")
    parser.add_argument("--backbone", default="vit_s")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    return step_options.parse(parser, words)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        watchdog = Watchdog(Path(folder), 0, minutes=30)
        watchdog.start(1)
        try:
            found = {name: measure(args, clip, watchdog) for name, clip in (("clipped", 1.0), ("not clipped", 0.0))}
        finally:
            watchdog.stop()
    print(f"{args.objective} on {args.backbone}, batch {args.batch}; load {os.getloadavg()[0]:.1f}")
    for name, t in found.items():
        spread = f"({t['ratio_lowest']:.3f} .. {t['ratio_highest']:.3f})"
        print(f"  {name:12} {t['milliseconds']:10,.1f} ms without guards, with them x {t['ratio']:.4f} {spread}")
    machine.save(args.out, "guards.py", step_options.settings(args, "objective", "batch") | {"guards": found})


if __name__ == "__main__":
    main()
