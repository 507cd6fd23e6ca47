"""One training step of our DINO and SelfPatch against textbook ones with the same weights, crops and random choices.

    python benchmarks/distill_step.py --out benchmarks/results/distill_step.json
    python benchmarks/distill_step.py --device cuda --precision bf16 --batch 64 --steps 10
    python benchmarks/distill_step.py --backbone vit_nano --batch 2 --prototypes 64 --repeats 1 views.local.n=2

A step is everything between two batches of prepared crops: draw, forward, loss, backward, clipping of each gradient,
AdamW, centre, teacher. `textbook_distill.py` says what the textbook does differently; it is timed with a forward per
crop and with a forward per size of crops. Before anything is timed the losses must agree to 1e-4 of their value and
the gradients to 1e-4 of the largest (float32, the whole batch). The recipe's settings hold unless keys change them;
prototypes are not frozen, as after the first epoch.

Each repeat runs all variants one after the other; ratios are medians of the ratios inside a repeat, for the whole step
and for its part until the gradients are there (without clipping, AdamW, centre and teacher; our AdamW is fused, the
textbook's plain). Time is processor time on one thread of a CPU, wall clock on more, and the GPU's own on CUDA. Peak
memory (CUDA only) is what a step takes on top of what stays allocated between steps, which is alike for all: weights,
moments, teacher, crops.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import machine
import step_options
import textbook_distill
import torch
from torch import Tensor

from selfsight import config
from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError
from selfsight.data.rng import key_of
from selfsight.objectives import build_objective
from selfsight.objectives.distill import Distillation
from selfsight.training.optim import build_adamw, clip_per_tensor, param_groups
from selfsight.views.spec import Batch

TEXTBOOK = {"dino": textbook_distill.DINO, "selfpatch": textbook_distill.SelfPatch}
STEPS = 1000  # of the run whose schedules are used
WARM_UP = 2  # repeats that do not count


class Ours:
    """Our objective with its optimizer, stepped as `training.module` does: `gradients`, then `update`."""

    def __init__(self, objective: Distillation, optim: Any, bf16: bool = False):
        self.objective, self.clip, self.bf16 = objective, optim.clip, bf16
        groups = param_groups(objective, optim.weight_decay, optim.decay_rule)
        self.optimizer = build_adamw(groups, optim.lr, optim.betas, optim.eps, fused=True)

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Draw, forward, loss, backward of prepared views and keys; the loss."""
        with torch.autocast(batch["key"].device.type, torch.bfloat16, enabled=self.bf16):
            loss, _ = self.objective(batch, step)
        loss.backward()
        return loss.detach()

    def update(self, step: int) -> None:
        """Clipping, AdamW, centres, teacher."""
        self.objective.after_backward(step)
        clip_per_tensor([p for p in self.objective.parameters() if p.grad is not None], self.clip)
        self.optimizer.step()
        self.objective.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)


def build(name: str, keys: list[str], device: str = "cpu") -> tuple[Distillation, Any]:
    """Our objective by config keys, prototypes not frozen; ConfigError or BackboneError for keys that do not fit."""
    # Not data=scenes, which brings the quick recipe.
    fixed = ["data=folder", "data.root=unused", f"max_steps={STEPS}", "objective.freeze_last_layer=0"]
    plain = ["objective.centering=center", "objective.koleo=0.0"]  # what the textbook has
    cfg = config.load("bench", [f"objective={name}", *fixed, *plain, *keys])
    torch.manual_seed(0)
    return build_objective(cfg, total_steps=STEPS, steps_per_epoch=STEPS).to(device).train(), cfg


def crops(objective: Distillation, images: int) -> Batch:
    """A batch as `prepare` leaves it: keys, and noise for pictures."""
    parameter = next(objective.student.parameters())
    generator = torch.Generator().manual_seed(1)
    key = torch.from_numpy(key_of(0, torch.arange(images).numpy())).to(parameter.device)
    views = {
        c.name: torch.randn(c.count, images, 3, c.size, c.size, generator=generator) for c in objective.views().crops
    }
    return {"key": key, "images": {kind: view.to(parameter) for kind, view in views.items()}}


def check(ours: Distillation, textbook: textbook_distill.DINO, batch: Batch) -> tuple[float, float]:
    """Our loss, and the largest difference of a gradient in shares of the largest; asserts that both are the same."""
    drawn = ours.draw(batch, 0)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    mine = ours.loss(drawn, 0)[0]
    mine.backward()  # before the other's loss, so that one graph at a time is in memory
    theirs = textbook.loss(drawn, 0)
    theirs.backward()
    torch.backends.cudnn.allow_tf32 = tf32
    for center in ours.centers():
        center.pending.zero_()  # this was no step
    assert abs(mine.item() - theirs.item()) <= 1e-4 * abs(theirs.item()), (
        f"losses differ: {mine.item()} {theirs.item()}"
    )
    pairs = list(zip(ours.student.parameters(), textbook.student.parameters(), strict=True))
    assert all((a.grad is None) == (b.grad is None) for a, b in pairs), "other parameters got a gradient"
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    scale = max(b.abs().max().item() for _, b in grads)
    worst = max((a - b).abs().max().item() for a, b in grads) / scale
    assert worst < 1e-4, f"gradients differ by {worst:.1e} of the largest"
    ours.zero_grad(set_to_none=True)
    textbook.student.zero_grad(set_to_none=True)
    return mine.item(), worst


class Turn(NamedTuple):
    """What one variant took in one repeat."""

    seconds: float  # per step
    gradients: float  # the part of it until the gradients are there
    mib: float  # the most that was allocated, on top of what is between steps (0 on a CPU)


class Timer:
    """Takes turns; on CUDA by events, so that the host may run ahead as far as a variant lets it."""

    def __init__(self, args: argparse.Namespace):
        self.steps, self.cuda = args.steps, args.device == "cuda"
        self.clock = time.process_time if not self.cuda and args.threads == 1 else time.perf_counter

    def mark(self) -> Any:
        if not self.cuda:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start

    def turn(self, variant: Any, batch: Batch, first: int) -> Turn:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        marks = [self.mark()]
        for step in range(first, first + self.steps):
            variant.gradients(batch, step)
            marks.append(self.mark())
            variant.update(step)
            marks.append(self.mark())
        peak = 0.0
        if self.cuda:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        gradients = sum(self.between(a, b) for a, b in zip(marks[::2], marks[1::2]))
        return Turn(self.between(marks[0], marks[-1]) / self.steps, gradients / self.steps, peak)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All variants of one objective, taking turns; milliseconds, ratios to ours, memory."""
    objective, cfg = build(name, keys_of(name, args), args.device)
    batch, bf16 = crops(objective, args.batch), args.precision == "bf16"
    variants: dict[str, Any] = {}
    for label, per_crop in (("textbook, a forward per crop", True), ("textbook, a forward per size", False)):
        variants[label] = TEXTBOOK[name](objective, cfg.optim, per_crop, bf16)
    checks = [check(objective, textbook, batch) for textbook in variants.values()]
    variants = {"ours": Ours(objective, cfg.optim, bf16)} | variants
    timer = Timer(args)
    turns: dict[str, list[Turn]] = {label: [] for label in variants}
    for repeat in range(WARM_UP + args.repeats):
        for label, variant in variants.items():
            turns[label].append(timer.turn(variant, batch, repeat * args.steps))
    found = {label: own[WARM_UP:] for label, own in turns.items()}
    return {
        "image_size": cfg.views["global"].size, "local_size": cfg.views.local.size, "crops": [2, cfg.views.local.n],
        "batch": args.batch, "prototypes": objective.center.center.numel(), "loss": round(checks[0][0], 6),
        "gradient_difference": float(f"{max(difference for _, difference in checks):.1e}"),
        "variants": {label: summary(own, found["ours"]) for label, own in found.items()},
    }  # fmt: skip


def keys_of(name: str, args: argparse.Namespace) -> list[str]:
    """The options as config keys; those that are given as such come last and win."""
    keys = [f"backbone={args.backbone}", f"batch_size={args.batch}"]
    if args.image_size:
        keys.append(f"image_size={args.image_size}")
    if args.prototypes:
        keys.append(f"objective.num_prototypes={args.prototypes}")
        if name == "selfpatch":  # the recipe's proportion
            keys.append(f"objective.num_patch_prototypes={max(1, args.prototypes // 16)}")
    return [*keys, *args.keys]


def summary(own: list[Turn], ours: list[Turn]) -> dict[str, float]:
    """Median time, and the median and range of own / ours inside a repeat; memory where it was measured."""
    ratios = [mine.seconds / base.seconds for mine, base in zip(own, ours, strict=True)]
    gradients = [mine.gradients / base.gradients for mine, base in zip(own, ours, strict=True)]
    found = {
        "milliseconds": round(1000 * statistics.median(turn.seconds for turn in own), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
        "milliseconds_until_gradients": round(1000 * statistics.median(turn.gradients for turn in own), 2),
        "ratio_until_gradients": round(statistics.median(gradients), 3),
    }
    peak = max(turn.mib for turn in own)
    return found | ({"peak_mib": round(peak, 1)} if peak else {})


def report(name: str, found: dict[str, Any]) -> None:
    views = f"{found['crops'][0]} x {found['image_size']} + {found['crops'][1]} x {found['local_size']} px"
    print(f"{name}, {views}, batch {found['batch']}, {found['prototypes']} prototypes: same loss {found['loss']}, "
          f"gradients to {found['gradient_difference']:.0e}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for label, t in found["variants"].items():
        spread = f"({t['ratio_lowest']:.2f} .. {t['ratio_highest']:.2f})"
        part = f"until the gradients {t['ratio_until_gradients']:.2f}"
        memory = f", {t['peak_mib']:,.0f} MiB" if "peak_mib" in t else ""
        print(f"  {label:30} {t['milliseconds']:10,.1f} ms   {t['ratio']:.2f} {spread}, {part}{memory}", flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="config keys, for example views.local.n=2 objective.border=wrap")
    parser.add_argument("--objectives", nargs="+", default=list(TEXTBOOK), choices=list(TEXTBOOK))
    parser.add_argument("--backbone", default="vit_s")
    parser.add_argument("--image-size", type=int, help="side of global crops; default: the backbone's")
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--prototypes", type=int, help="default: the recipe's")
    return step_options.parse(parser, words)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    results = {}
    try:
        for name in args.objectives:
            results[name] = measure(name, args)
            report(name, results[name])
    except (ConfigError, BackboneError) as error:
        print(f"distill_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    machine.save(args.out, "distill_step.py", step_options.settings(args) | {"objectives": results})


if __name__ == "__main__":
    main()
