"""One training step with each `adapt` against full training: parameters that train, memory, time, in one run.

    python benchmarks/adapt_step.py --out benchmarks/results/adapt_step.json
    python benchmarks/adapt_step.py --device cuda --precision bf16 --batch 64 --steps 10
    python benchmarks/adapt_step.py --backbone vit_nano --batch 2 --prototypes 64 --repeats 1 views.local.n=2

A step is everything between two batches of prepared crops: draw, forward, loss, backward, clipping, AdamW, centre,
teacher. All variants start from the same weights, hold their own optimizer and take turns in every repeat; ratios to
full training are medians of the ratios inside a repeat. Time is processor time on one thread of a CPU, wall clock on
more, and the GPU's own on CUDA. Before anything is timed, the losses of all variants must be that of full training
(adapters start at zero) and the frozen tensors must have kept their bits over two steps.

Memory, in MiB: `held` is what stays between steps (weights once, teacher's own, moments, crops left out); `saved` is
what the forward keeps for the backward. On CUDA `peak` is the most that a step takes on top of what is held, and
`total` is both; on a CPU `total` is by how much two steps raise the memory of a process of their own at its highest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import distill_step
import machine
import step_options
import torch
from distill_step import WARM_UP, Ours, Timer, Turn
from torch import Tensor

from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError, options
from selfsight.nn.global_batchnorm import GlobalBatchNorm
from selfsight.objectives.distill import Distillation
from selfsight.views.spec import Batch

KINDS = ["none", *(kind for kind in options("adapt") if kind != "none")]


def build(args: argparse.Namespace, kind: str) -> tuple[Distillation, Ours]:
    """The objective with this `adapt`, and what steps it; backbone and heads start alike for every kind."""
    keys = [*distill_step.keys_of(args.objective, args), f"adapt={kind}", "backbone.drop_path=0.0"]
    objective, cfg = distill_step.build(args.objective, keys, args.device)
    return objective, Ours(objective, cfg.optim, args.precision == "bf16")


def check(kind: str, objective: Distillation, stepper: Ours, batch: Batch, expected: float | None) -> float:
    """The loss before any step; asserts that it is full training's, and that two steps leave frozen tensors alone."""
    before = {n: p.detach().clone() for n, p in objective.named_parameters() if not p.requires_grad}
    frozen = [n for n in before if n.startswith("student.")]
    assert frozen or kind == "none", f"adapt={kind} freezes nothing"
    first = stepper.gradients(batch, 0).item()
    assert expected is None or abs(first - expected) <= 1e-3 * abs(expected), f"adapt={kind}: {first}, not {expected}"
    stepper.update(0)
    stepper.gradients(batch, 1)
    stepper.update(1)
    now = dict(objective.named_parameters())
    assert all(torch.equal(now[n], before[n]) for n in frozen), f"adapt={kind} moved a frozen tensor"
    return first


def mib(tensors: list[Tensor]) -> float:
    """Bytes of different storages."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 2**20


def held(objective: Distillation, stepper: Ours) -> float:
    slots = [v for state in stepper.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return mib([*objective.parameters(), *objective.buffers(), *slots])


def saved(objective: Distillation, stepper: Ours, batch: Batch) -> float:
    """What a forward keeps for its backward, without the parameters themselves."""
    kept: list[Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stepper.gradients(batch, 2)
    stepper.optimizer.zero_grad(set_to_none=True)
    for center in objective.centers():
        center.pending.zero_()  # this was no step
    return mib(kept)


def raised(args: argparse.Namespace, kind: str) -> float:
    """MiB by which building and two steps raise the highest memory of this process, which has done nothing else."""
    torch.set_num_threads(args.threads)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far, which a new process has of its parent
    before = status("VmRSS")
    objective, stepper = build(args, kind)
    batch = distill_step.crops(objective, args.batch)
    for step in range(2):
        stepper.gradients(batch, step)
        stepper.update(step)
    return (status("VmHWM") - before) / 1024


def status(name: str) -> int:
    """KiB of memory by a line of Linux' /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def raised_alone(args: argparse.Namespace, kind: str) -> float:
    """The same in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return round(pool.apply(raised, (args, kind)), 1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All kinds, taking turns."""
    variants, facts, loss = {}, {}, None
    for kind in args.adapt:
        try:
            objective, stepper = build(args, kind)
        except BackboneError as error:
            print(f"{kind} is left out: {error}")
            continue
        batch = distill_step.crops(objective, args.batch)
        # Frozen batch norms use their running statistics: such a model starts elsewhere than one that trains them.
        comparable = kind != "none" or not any(isinstance(m, GlobalBatchNorm) for m in objective.modules())
        first = check(kind, objective, stepper, batch, loss)
        loss = first if loss is None and comparable else loss
        student = objective.student
        facts[kind] = {
            "trainable_backbone": sum(p.numel() for p in student["backbone"].parameters() if p.requires_grad),
            "trainable": sum(p.numel() for p in objective.parameters() if p.requires_grad),
            "held_mib": round(held(objective, stepper), 1),
            "saved_mib": round(saved(objective, stepper, batch), 1),
        }
        if args.device == "cpu" and sys.platform == "linux":
            facts[kind]["total_mib"] = raised_alone(args, kind)
        variants[kind] = stepper
    timer = Timer(args)
    turns: dict[str, list[Turn]] = {kind: [] for kind in variants}
    for repeat in range(WARM_UP + args.repeats):
        for kind, stepper in variants.items():
            turns[kind].append(timer.turn(stepper, batch, 3 + repeat * args.steps))
    found = {kind: own[WARM_UP:] for kind, own in turns.items()}
    base = found[args.adapt[0]]
    return {kind: facts[kind] | summary(own, base, facts[kind]["held_mib"]) for kind, own in found.items()}


def summary(own: list[Turn], base: list[Turn], held_mib: float) -> dict[str, float]:
    """Median time, and the median and range of own / full training inside a repeat; memory where it was measured."""
    ratios = [mine.seconds / full.seconds for mine, full in zip(own, base, strict=True)]
    found = {
        "milliseconds": round(1000 * statistics.median(turn.seconds for turn in own), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
    }
    peak = max(turn.mib for turn in own)
    return found | ({"peak_mib": round(peak, 1), "total_mib": round(held_mib + peak, 1)} if peak else {})


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(f"{args.objective} on {args.backbone}, batch {args.batch}; load {os.getloadavg()[0]:.1f}")
    for kind, t in found.items():
        spread = f"({t['ratio_lowest']:.2f} .. {t['ratio_highest']:.2f})"
        memory = f"held {t['held_mib']:,.0f}, saved {t['saved_mib']:,.0f} MiB"
        memory += f", total {t['total_mib']:,.0f} MiB" if "total_mib" in t else ""
        print(f"  {kind:12} {t['trainable_backbone']:12,} train   {t['milliseconds']:10,.1f} ms   {t['ratio']:.2f} "
              f"{spread}   {memory}", flush=True)  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="config keys, for example views.local.n=2")
    parser.add_argument("--objective", default="dino", choices=list(distill_step.TEXTBOOK))
    parser.add_argument("--adapt", nargs="+", default=KINDS, choices=KINDS, help="ratios are to the first")
    parser.add_argument("--backbone", default="vit_s")
    parser.add_argument("--image-size", type=int, help="side of global crops; default: the backbone's")
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--prototypes", type=int, help="default: the recipe's")
    return step_options.parse(parser, words)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    try:
        found = measure(args)
    except (ConfigError, BackboneError) as error:
        print(f"adapt_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    report(args, found)
    machine.save(args.out, "adapt_step.py", step_options.settings(args, "objective", "batch") | {"adapt": found})


if __name__ == "__main__":
    main()
