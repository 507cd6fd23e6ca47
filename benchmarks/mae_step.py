"""One training step of our MAE against a textbook one with the same weights, images and masks.

    python benchmarks/mae_step.py --out benchmarks/results/mae_step.json
    python benchmarks/mae_step.py --device cuda --precision bf16 --compile --batch 256 --models vit_s vit_b vit_l

The textbook step does what the paper's pseudo-code says: embed every patch, shuffle, encode the first ones, append
mask tokens, unshuffle, decode everything, predict every patch, average the error with the mask. Ours embeds only the
visible patches, never puts tokens back in order, and normalises and predicts the hidden ones only. Losses must agree
to 1e-5 and gradients to 1e-4 (float32) before anything is timed.

The optimizers are what each would use: torch's plain AdamW, which loops over parameters on a CPU, and ours, its fused
form. The ratio without the optimizer stands beside the whole one.

`fused` uses the same attention kernel in both; `explicit` gives the textbook step softmax(q k^T) v written out, as in
the reference implementation of the paper. Each repeat runs all of them one after the other; ratios are medians of the
ratios inside a repeat, on CPU of processor time on one thread.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import machine
import torch
from torch import Tensor, nn

from selfsight import config
from selfsight.backbones.tokens import patchify
from selfsight.objectives.mae import MAE

# name -> (config keys, batch on CPU)
MODELS = {
    "vit_nano": (["backbone=vit_nano"], 32),
    "vit_s": (["backbone=vit_s"], 4),
    "vit_b": (["backbone=vit_b"], 2),
    "vit_l": (["backbone=vit_l"], 1),
}


class Textbook(nn.Module):
    """The step as the paper describes it, on copies of our modules."""

    def __init__(self, ours: MAE):
        super().__init__()
        ours = copy.deepcopy(ours)
        self.encoder, self.decoder, self.norm_pixels = ours.student.timm, ours.decoder, ours.norm_pixels
        self.patch = ours.student.cell

    def forward(self, images: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """Mean over hidden patches of the squared error. images [B, 3, H, W], keep [B, K], hidden [B, M]."""
        encoder, decoder = self.encoder, self.decoder
        shuffle = torch.cat([keep, hidden], dim=1)
        restore = shuffle.argsort(dim=1)
        x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        x = decoder.embed(encoder.norm(x))
        masks = decoder.mask_token.to(x.dtype).expand(len(x), hidden.shape[1], -1)
        y = torch.cat([x[:, 1:], masks], dim=1)
        y = y.gather(1, restore[..., None].expand(-1, -1, y.shape[-1]))
        x = torch.cat([x[:, :1], y], dim=1) + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        pred = decoder.pred(decoder.norm(x))[:, 1:].float()
        target = patchify(images, self.patch)
        if self.norm_pixels:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        mask = torch.zeros(shuffle.shape, device=images.device).scatter(1, hidden, 1.0)
        error = ((pred - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum()


def build(keys: list[str]) -> tuple[MAE, Any]:
    """Our objective by config keys."""
    cfg = config.load("bench", ["objective=mae", "data=scenes", "max_steps=10", "batch_size=8", *keys])
    torch.manual_seed(0)
    return MAE.build(cfg, total_steps=10, steps_per_epoch=10), cfg


def step_of(
    loss: Callable[[], Tensor], parameters: list[nn.Parameter], device: str, precision: str, fused: bool
) -> Callable[[], tuple[float, float]]:
    """forward, backward, optimizer step; returns its seconds and those before the optimizer (CPU: processor time)."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=fused or None)
    clock = time.perf_counter if device == "cuda" else time.process_time

    def step() -> tuple[float, float]:
        start = clock()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        model = clock() - start
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start, model

    return step


def check(ours: MAE, theirs: Textbook, batch: dict, images: Tensor) -> tuple[float, float]:
    """Loss and the largest relative difference of a gradient; asserts that both steps compute the same."""
    mine, _ = ours.loss(batch, 0)
    other = theirs(images, batch["keep"], batch["hidden"])
    mine.backward()
    other.backward()
    assert abs(mine.item() - other.item()) < 1e-5 * max(1.0, abs(other.item())), (mine.item(), other.item())
    pairs = [*zip(ours.student.timm.parameters(), theirs.encoder.parameters(), strict=True)]
    pairs += zip(ours.decoder.parameters(), theirs.decoder.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    scale = max(b.abs().max().item() for _, b in grads)
    worst = max((a - b).abs().max().item() for a, b in grads) / scale
    assert worst < 1e-4, f"gradients differ by {worst:.1e} of the largest"
    for module in (ours, theirs):
        module.zero_grad(set_to_none=True)
    return mine.item(), worst


def explicit(textbook: Textbook) -> Textbook:
    """The same step with attention written out."""
    other = copy.deepcopy(textbook)
    for module in other.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return other


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    keys, batch_size = MODELS[name]
    batch_size = args.batch or batch_size
    ours, cfg = build(keys)
    ours.to(args.device)
    textbook = Textbook(ours)
    size = cfg.image_size
    images = torch.randn(batch_size, 3, size, size, device=args.device)
    raw = {"key": torch.arange(batch_size, device=args.device), "images": {"image": images[None]}}
    batch = ours.draw(raw, 0)
    loss, gradient = check(ours, textbook, batch, images)
    written_out = explicit(textbook)
    if args.compile:
        ours.compile(fullgraph=True, dynamic=False)
        textbook.compile(dynamic=False)
        written_out.compile(dynamic=False)
    losses = {"ours": (ours, lambda: ours.loss(batch, 0)[0])}
    for label, module in (("textbook, fused attention", textbook), ("textbook, explicit attention", written_out)):
        losses[label] = (module, lambda m=module: m(images, batch["keep"], batch["hidden"]))
    steps = {
        label: step_of(
            f, [p for p in m.parameters() if p.requires_grad], args.device, args.precision,
            fused=label == "ours" or args.device == "cuda",
        )
        for label, (m, f) in losses.items()
    }  # fmt: skip
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in steps}
    for repeat in range(args.repeats + 2):
        for label, step in steps.items():
            whole, model = (sum(part) / args.steps for part in zip(*(step() for _ in range(args.steps))))
            if repeat >= 2:
                times[label].append((whole, model))
    result: dict[str, Any] = {
        "image_size": size, "batch": batch_size, "loss": round(loss, 6), "gradient_difference": float(f"{gradient:.1e}")
    }  # fmt: skip
    for label, own in times.items():
        ratios = [t / o for (t, _), (o, _) in zip(own, times["ours"])]
        result[label] = {
            "milliseconds": round(1000 * statistics.median(whole for whole, _ in own), 2),
            "ratio_without_optimizer": round(statistics.median(t / o for (_, t), (_, o) in zip(own, times["ours"])), 3),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_lowest": round(min(ratios), 3),
            "ratio_highest": round(max(ratios), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_nano", "vit_s", "vit_b"], choices=list(MODELS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, help="images per step; default: small ones for a CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat (use more on a GPU)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    results = {}
    for name in args.models:
        results[name] = r = measure(name, args)
        print(f"{name}, {r['image_size']} px, batch {r['batch']}: same loss {r['loss']}, gradients to "
              f"{r['gradient_difference']:.0e}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
        for label in [label for label in r if isinstance(r[label], dict)]:
            t = r[label]
            spread = f"({t['ratio_lowest']:.2f} .. {t['ratio_highest']:.2f})"
            model = f"without the optimizer {t['ratio_without_optimizer']:.2f}"
            print(f"  {label:30} {t['milliseconds']:10,.1f} ms   {t['ratio']:.2f} {spread}, {model}", flush=True)
    settings = {"device": args.device, "precision": args.precision, "compiled": args.compile, "repeats": args.repeats}
    machine.save(args.out, "mae_step.py", settings | {"models": results})


if __name__ == "__main__":
    main()
