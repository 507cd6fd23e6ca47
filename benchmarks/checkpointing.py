"""What `trainer.checkpointing=true` saves and costs: peak memory and time of a training step of DINO, on a CPU.

python benchmarks/checkpointing.py --out benchmarks/results/checkpointing.json

Memory: the most bytes in use at once in forward and backward above those before them (torch's profiler), so gradients
count and weights, moments and the teacher do not. Time: processor time of the process, the median of the repeats, in
which both ways take turns. The loss and the gradients must be the same to the bit, or the script stops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import save
from page import show
from torch.profiler import ProfilerActivity, profile

from selfsight import config
from selfsight.data import open_source
from selfsight.data.loader import Samples
from selfsight.data.order import Order
from selfsight.objectives import build_objective
from selfsight.views.photo import prepare

PAGE = Path(__file__).resolve().parents[1] / "docs/large.md"
MODELS = {"vit_ti": 224, "convnext_tiny": 224, "convnextv2_atto": 224, "shvit_s1": 256}


def peak_bytes(call: Any) -> int:
    """The most bytes in use at once during a call, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    used = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    return most


def compare(name: str, size: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One model, both ways."""
    cfg = config.load("train", [
        "objective=dino", f"backbone={name}", f"image_size={size}", "views.local.n=0", f"batch_size={batch_size}",
        "data.num_train=40", "data.num_val=8", "objective.num_prototypes=1024", "objective.head_hidden=256",
    ])  # fmt: skip
    steps, found = [], []
    for again in (False, True):
        torch.manual_seed(0)
        objective = build_objective(cfg, total_steps=10, steps_per_epoch=5).train()
        if again:
            objective.checkpoint_blocks()
        source, views = open_source(cfg.data, "train"), objective.views()
        batch = Samples(source, Order(0, source.lengths), views, seed=0)[range(batch_size)]
        batch.pop("events")
        batch = objective.draw(prepare(batch, views, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3)), 0)

        def step(objective=objective, batch=batch) -> None:
            objective.zero_grad()
            objective.loss(batch, 0)[0].backward()

        step()
        found.append({n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None})
        objective.zero_grad()
        steps.append(step)
    if any(not torch.equal(found[0][k], found[1][k]) for k in found[0]):
        raise SystemExit(f"{name}: the gradients differ")
    memory, times = [peak_bytes(step) for step in steps], ([], [])
    for _ in range(repeats):
        for step, spent in zip(steps, times):
            start = time.process_time()
            step()
            spent.append(time.process_time() - start)
    kept, again = (statistics.median(t) for t in times)
    return {
        "image_size": size, "batch_size": batch_size, "mib_kept": memory[0] / 2**20, "mib_again": memory[1] / 2**20,
        "memory_ratio": memory[1] / memory[0], "seconds_kept": kept, "seconds_again": again, "time_ratio": again / kept,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    rows = ["| DINO, two views, float32, CPU | images | peak, kept | peak, recomputed | memory | time |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in results["models"].items():
        kept, again = (f"{r[key]:.0f} MiB" for key in ("mib_kept", "mib_again"))
        ratios = f"x {r['memory_ratio']:.2f} | x {r['time_ratio']:.2f}"
        rows.append(f"| {name}, {r['image_size']} px | {r['batch_size']} | {kept} | {again} | {ratios} |")
    machine = results["machine"]
    rows += [
        "",
        f"Measured {machine['date']} by `benchmarks/checkpointing.py`, torch {machine['torch']}: activations and",
        "gradients of forward and backward; processor time of a step.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {}
    for name in args.models:
        models[name] = compare(name, MODELS[name], args.batch, args.repeats)
        print(name, json.dumps(models[name]), flush=True)
    save(args.out, "checkpointing.py", {"models": models})
    if args.out is not None:
        show(PAGE, "checkpointing", table(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
