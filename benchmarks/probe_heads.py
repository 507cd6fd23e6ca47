"""Probe heads, forward and backward, against the same heads as commonly written, with the same weights and tokens.

    python benchmarks/probe_heads.py --out benchmarks/results/probe_heads.json
    python benchmarks/probe_heads.py --device cuda --steps 20
    python benchmarks/probe_heads.py --width 96 --tokens 16 --classes 10 --batch 4 --repeats 1

A head is pooling, batch norm, linear layer and cross-entropy; the backward pass gives the gradients of all its weights.
As commonly written, every token is projected to a value (efficient probing, EP) or to a key and a value (multi-head
cross-attention with a learned query); ours pool the raw tokens and project what is pooled. "16 x" are 16 heads with
their own weights in one pass over the tokens (`Stack`). Before anything is timed, outputs and gradients of ours must
agree to 1e-5 with the common form, and each stacked head with the same head alone.

Each repeat runs all variants one after the other, in an order that turns; ratios are medians of the ratios inside a
repeat. Time is processor time on one thread of a CPU, wall clock on more, and the GPU's own on CUDA. Optimizer steps
are not part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.nn.pooling import PoolingError
from selfsight.probes import ProbeError
from selfsight.probes.attentive import head_losses
from selfsight.probes.heads import ProbeHead, Stack, build_head

WARM_UP = 2  # repeats that do not count
COUNT = 16  # stacked heads
# (what, slow, fast): ratio = time of slow / time of fast
RATIOS = (
    ("EP12 as commonly written / EP12", "EP12, common", "EP12"),
    ("EP32 as commonly written / EP32", "EP32, common", "EP32"),
    ("12-head cross-attention as commonly written / EP12", "MHCA12, common", "EP12"),
    ("12-head cross-attention as commonly written / EP32", "MHCA12, common", "EP32"),
    ("12-head cross-attention as commonly written / re-associated", "MHCA12, common", "MHCA12"),
    ("16 x EP12 / one EP32 as commonly written", "16 x EP12", "EP32, common"),
    ("16 x EP12 / one EP12", "16 x EP12", "EP12"),
    ("16 x EP12 / one EP32", "16 x EP12", "EP32"),
    ("16 x EP32 / one EP32 as commonly written", "16 x EP32", "EP32, common"),
    ("16 x EP32 / one EP32", "16 x EP32", "EP32"),
)


class CommonEP(nn.Module):
    """EP in the order of its equations, on the weights of ours."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.ours, self.out_dim = ours, ours.out_dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.ours.queries.shape[1]
        attention = (self.ours.queries * x.shape[-1] ** -0.5 @ x.mT).softmax(-1)
        values = self.ours.v(x).unflatten(-1, (queries, -1)).transpose(1, 2)
        return (attention[:, :, None] @ values).flatten(1), attention


class CommonMHCA(nn.Module):
    """Multi-head cross-attention with a learned query: key and value of every token, on the weights of ours (CAPI's
    head, whose projections have biases)."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.ours, self.out_dim = ours, ours.out_dim

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        heads = self.ours.heads
        key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.ours.kv(x).chunk(2, -1))
        query = self.ours.queries.view(1, heads, 1, -1).expand(len(x), -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value).flatten(1), None


def common(head: ProbeHead, form: type[nn.Module]) -> nn.Module:
    """The same head with its pooling as commonly written; weights are shared."""
    return nn.Sequential(
        First(form(head.pooling)), nn.BatchNorm1d(head.pooling.out_dim, 1e-6, affine=False), head.linear
    )


class First(nn.Module):
    """A pooling without its attention."""

    def __init__(self, pooling: nn.Module):
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        return self.pooling(x)[0]


class Variant:
    """A head, or a stack of heads, with what its loss is differentiated by."""

    def __init__(self, module: nn.Module, x: Tensor, labels: Tensor):
        self.module, self.x, self.labels = module.train(), x, labels
        self.params = [p for p in module.parameters() if p.requires_grad]

    def loss(self) -> Tensor:
        logits = self.module(self.x)
        return F.cross_entropy(logits, self.labels) if logits.ndim == 2 else head_losses(logits, self.labels).sum()

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward; the gradients."""
        return torch.autograd.grad(self.loss(), self.params, materialize_grads=True)


def build(args: argparse.Namespace) -> tuple[dict[str, Variant], float]:
    """All variants, and the largest difference between those that must be the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, args.tokens, args.width, generator=generator).to(args.device)
    labels = (torch.arange(args.batch) % args.classes).to(args.device)
    found: dict[str, nn.Module] = {}
    worst = 0.0
    for queries in (12, 32):
        heads = [build_head("ep", args.width, args.classes, seed=s, num_queries=queries) for s in range(COUNT)]
        heads = [head.to(args.device).train() for head in heads]
        found[f"EP{queries}"] = heads[0]
        found[f"EP{queries}, common"] = common(heads[0], CommonEP)
        found[f"{COUNT} x EP{queries}"] = stack = Stack(heads)
        with torch.no_grad():
            stacked = stack(x)
            worst = max([worst] + [difference(logits, head(x)) for logits, head in zip(stacked, heads)])
    head = build_head("capi", args.width, args.classes, num_heads=12).to(args.device)
    found |= {"MHCA12": head, "MHCA12, common": common(head, CommonMHCA)}
    variants = {name: Variant(module, x, labels) for name, module in found.items()}
    for name in ("EP12", "EP32", "MHCA12"):
        worst = max(worst, check(variants[name], variants[f"{name}, common"]))
    return variants, worst


def difference(mine: Tensor, theirs: Tensor) -> float:
    worst = (mine - theirs).abs().max().item()
    assert worst <= 1e-5, f"outputs differ by {worst:.1e}"
    return worst


def check(ours: Variant, theirs: Variant) -> float:
    """Largest difference of logits and gradients; they must agree to 1e-5."""
    tensors = dict(zip(map(id, theirs.params), theirs.step()))
    pairs = [(g, tensors[id(p)]) for p, g in zip(ours.params, ours.step())]
    return max(difference(a, b) for a, b in [(ours.module(ours.x), theirs.module(theirs.x)), *pairs])


def clock(args: argparse.Namespace) -> Callable[[Variant], float]:
    """Milliseconds of a step."""

    def on_cpu(variant: Variant) -> float:
        now = time.process_time if args.threads == 1 else time.perf_counter
        start = now()
        for _ in range(args.steps):
            variant.step()
        return 1000 * (now() - start) / args.steps

    def on_gpu(variant: Variant) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(args.steps):
            variant.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / args.steps

    return on_gpu if args.device == "cuda" else on_cpu


def measure(args: argparse.Namespace) -> dict[str, Any]:
    variants, worst = build(args)
    times, turn = {name: [] for name in variants}, clock(args)
    for repeat in range(WARM_UP + args.repeats):
        names = list(variants)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(turn(variants[name]))
    kept = {name: own[WARM_UP:] for name, own in times.items()}
    ratios = {}
    for what, slow, fast in RATIOS:
        each = [a / b for a, b in zip(kept[slow], kept[fast], strict=True)]
        ratios[what] = {
            "ratio": round(statistics.median(each), 3), "lowest": round(min(each), 3), "highest": round(max(each), 3)
        }  # fmt: skip
    return {
        "largest_difference": float(f"{worst:.1e}"),
        "milliseconds": {name: round(statistics.median(own), 2) for name, own in kept.items()},
        "ratios": ratios,
    }


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat (use more on a GPU)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args(words)
    for option in ("width", "tokens", "classes", "batch", "threads", "repeats", "steps"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: give 1 or more")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    try:
        found = measure(args)
    except (ProbeError, PoolingError) as error:
        raise SystemExit(f"probe_heads.py: {error}") from None
    print(f"width {args.width}, {args.tokens} tokens, {args.classes} classes, batch {args.batch}: differences up to "
          f"{found['largest_difference']:.0e}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, ms in found["milliseconds"].items():
        print(f"  {name:20} {ms:10,.2f} ms")
    for what, r in found["ratios"].items():
        print(f"  {what:62} {r['ratio']:6.2f} ({r['lowest']:.2f} .. {r['highest']:.2f})")
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if args.device == "cuda" else {}
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    machine.save(args.out, "probe_heads.py", gpu | settings | found)


if __name__ == "__main__":
    main()
