"""What the guards cost: the time of their own operations, many times over, as a share of the time of a step.

    python benchmarks/guards.py --out benchmarks/results/guards.json
    python benchmarks/guards.py --backbones vit_nano --batch 4 --rounds 3 --calls 20

A step with guards differs from one without by less than two steps differ from each other, so both are timed apart. The
guards of a step: is the loss finite, the batch kept, is the norm finite and what the processes agree on about it, the
flag by which the optimizer skips, the answer read by the host, two notes for the watchdog, and the sums of signals and
bad samples (`Agreement`). They run through the functions of a training run; with two processes over gloo, on the cores
of one machine, where both collectives are waited for, although a run lets one of them wait for the next step. The norm
of all gradients is clipping's where there is clipping; where there is none it is the guards' own, and is timed by
itself. A step is everything between two batches: prepare, draw, forward, loss, backward, AdamW, teacher.

All of it on one thread of a CPU. Times are medians of rounds: processor time for steps, the norm and one process, wall
clock for two processes, which wait for each other and for whatever else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from selfsight import config
from selfsight.data.rng import key_of
from selfsight.nn.losses import world_size
from selfsight.objectives import build_objective
from selfsight.training.module import Module
from selfsight.training.optim import build_adamw, param_groups
from selfsight.training.stop import Agreement
from selfsight.training.watchdog import DATA, STEP, Watchdog
from selfsight.views.photo import prepare

STEPS = 1000


def build(backbone: str, batch: int) -> tuple[Module, torch.optim.Optimizer, dict[str, Any]]:
    """A module of MAE, its optimizer, and a batch as the loader leaves it."""
    words = ["objective=mae", f"backbone={backbone}", f"batch_size={batch}", "data=folder", "data.root=unused"]
    cfg = config.load("bench", [*words, f"max_steps={STEPS}"])
    torch.manual_seed(0)
    objective = build_objective(cfg, total_steps=STEPS, steps_per_epoch=STEPS).train()
    module = Module(objective, cfg.optim, lambda step: 1e-4, mean=(0.5,) * 3, std=(0.25,) * 3)
    groups = param_groups(objective, cfg.optim.weight_decay, cfg.optim.decay_rule)
    optimizer = build_adamw(groups, 1e-4, cfg.optim.betas, cfg.optim.eps, fused=True)
    crops = {c.name: torch.randint(0, 256, (c.count, batch, 3, c.size, c.size), dtype=torch.uint8)
             for c in module.views.crops}  # fmt: skip
    return module, optimizer, {"key": torch.from_numpy(key_of(0, np.arange(batch))), "crops": crops}


def step_of(module: Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> Callable[[], None]:
    """One training step without guards."""

    def step() -> None:
        with torch.no_grad():
            ready = module.objective.draw(prepare(dict(batch), module.views, module.mean, module.std), module.step)
        optimizer.zero_grad(set_to_none=True)
        module.objective.loss(ready, module.step)[0].backward()
        module.objective.after_backward(module.step)
        optimizer.step()
        module.objective.after_step(module.step)
        module.step += 1

    return step


def norm_of(module: Module) -> Callable[[], Tensor]:
    """The norm of all gradients."""
    gradients = [p.grad for p in module.objective.parameters() if p.grad is not None]
    return lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def guards_of(
    module: Module, optimizer: torch.optim.Optimizer, watchdog: Watchdog, agreement: Agreement, batch: dict[str, Any]
) -> Callable[[], None]:
    """All guards of one step, given its loss and its norm."""
    loss, norm = torch.tensor(1.0), torch.tensor(2.0)
    module.recent = deque(maxlen=3)  # as for one micro-batch per step

    def guards() -> None:
        watchdog.enter(STEP, module.step)
        module.recent.append((module.step, torch.isfinite(loss), batch))
        module._guard(optimizer, norm)
        assert bool(module.finite)
        agreement.later(0, 0, 0)
        watchdog.enter(DATA, module.step)
        module.step += 1

    return guards


def timed(call: Callable[[], Any], rounds: int, calls: int, clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds of a call: median, lowest and highest of the rounds' means."""
    call()
    found = []
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            call()
        found.append(1e6 * (clock() - start) / calls)
    median = statistics.median(found)
    return {"microseconds": round(median, 1), "lowest": round(min(found), 1), "highest": round(max(found), 1)}


def time_guards(rank: int, folder: str, rounds: int, calls: int, clock: Callable[[], float]) -> dict[str, float]:
    """The guards of one process; their cost does not depend on the network, so a small one will do."""
    torch.set_num_threads(1)
    module, optimizer, batch = build("vit_nano", 2)
    watchdog = Watchdog(Path(folder), rank, minutes=30)
    watchdog.start(world_size())
    try:
        agreement = Agreement()
        found = timed(guards_of(module, optimizer, watchdog, agreement, batch), rounds, calls, clock)
        agreement.finish()
    finally:
        watchdog.stop()
    return found


def _one_of_two(rank: int, folder: str, rounds: int, calls: int, answer: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = time_guards(rank, folder, rounds, calls, time.perf_counter)
    value = torch.tensor([1, 0])
    reduced = timed(lambda: dist.all_reduce(value, op=dist.ReduceOp.MIN), rounds, calls, time.perf_counter)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answer.put({"two processes": found, "one collective of theirs": reduced})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps, guards, and the guards' share of each step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        guards = {"one process": time_guards(0, folder, args.rounds, args.calls, time.process_time)}
        answer = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_one_of_two, (folder, args.rounds, args.calls, answer), nprocs=2)
        guards |= answer.get()
    steps = {}
    for name in args.backbones:
        module, optimizer, batch = build(name, args.batch)
        step = timed(step_of(module, optimizer, batch), args.rounds, 1, time.process_time)
        norm = timed(norm_of(module), args.rounds, 5, time.process_time)
        shares = {who: guards[who]["microseconds"] / step["microseconds"] for who in ("one process", "two processes")}
        shares["norm"] = norm["microseconds"] / step["microseconds"]
        parameters = sum(p.numel() for p in module.objective.parameters() if p.requires_grad)
        steps[name] = {"parameters": parameters, "step": step, "norm": norm,
                       "shares": {who: round(share, 5) for who, share in shares.items()}}  # fmt: skip
    return {"objective": "mae", "batch": args.batch, "device": "cpu", "precision": "32", "threads": 1,
            "rounds": args.rounds, "calls": args.calls, "guards": guards, "steps": steps}  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_s", "vit_b"])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=500, help="of the guards, in each round")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    found = measure(args)
    for who, t in found["guards"].items():
        print(f"{who:26} {t['microseconds']:10,.1f} us ({t['lowest']:,.1f} .. {t['highest']:,.1f})")
    for name, s in found["steps"].items():
        shares = ", ".join(f"{who} {share:.3%}" for who, share in s["shares"].items())
        print(f"{name:26} {s['step']['microseconds'] / 1000:10,.1f} ms a step: {shares}")
    machine.save(args.out, "guards.py", found)


if __name__ == "__main__":
    main()
