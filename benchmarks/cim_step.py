"""One training step of our CIM against a textbook one with the same weights, exemplars and labels.

    python benchmarks/cim_step.py --out benchmarks/results/cim_step.json
    python benchmarks/cim_step.py --device cuda --precision bf16 --batch 64 --steps 10
    python benchmarks/cim_step.py --backbone vit_nano --batch 2 --repeats 1 objective.decoder_dim=64

A step is everything between two prepared batches: draw (the same in both), forward, loss, backward, AdamW, teacher. The
textbook loops over exemplars as pseudo-code has it: each goes through the student and the decoder on its own, which
projects the context again; both classes of a map are enlarged and cross-entropy takes whole numbers as labels; AdamW
and the teacher's average go over the parameters one by one. Backbone and decoder layers are the same code. Before
anything is timed the losses must agree to 1e-4 of their value and the gradients to 1e-4 of the largest.

Repeats, ratios, clocks and memory are those of `distill_step.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import Any

import machine
import step_options
import torch
import torch.nn.functional as F
from distill_step import STEPS, WARM_UP, Timer, Turn, summary
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight import config
from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError
from selfsight.data.rng import key_of
from selfsight.nn.losses import upcast
from selfsight.objectives import build_objective
from selfsight.objectives.cim import CIM
from selfsight.training.optim import build_adamw, param_groups
from selfsight.views.spec import Batch


class Ours:
    """Our objective with its optimizer, stepped as `training.module` does: `gradients`, then `update`."""

    fused = True

    def __init__(self, objective: CIM, optim: Any, bf16: bool = False):
        self.objective, self.bf16 = objective, bf16
        groups = param_groups(objective, optim.weight_decay, optim.decay_rule)
        self.optimizer = build_adamw(groups, optim.lr, optim.betas, optim.eps, fused=self.fused)
        for group in [] if self.fused else self.optimizer.param_groups:
            group["foreach"] = False

    def loss(self, drawn: Batch) -> Tensor:
        return self.objective.loss(drawn, 0)[0]

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Draw, forward, loss, backward of a prepared batch; the loss."""
        with torch.autocast(batch["key"].device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.objective.draw(batch, step))
        loss.backward()
        return loss.detach()

    def update(self, step: int) -> None:
        """AdamW, teacher."""
        self.optimizer.step()
        self.follow(step)
        self.optimizer.zero_grad(set_to_none=True)

    def follow(self, step: int) -> None:
        self.objective.after_step(step)


class Textbook(Ours):
    """Starts from a copy of our weights; ConfigError where its step would not be ours."""

    fused = False

    def __init__(self, ours: CIM, optim: Any, bf16: bool = False):
        if ours.predictor is not None or any(isinstance(m, _BatchNorm) for m in ours.modules()):
            raise ConfigError(
                "batch norms see other batches where each exemplar has a forward of its own, so the steps cannot "
                "agree: use a backbone without them (vit_s, convnextv2_atto) and objective.sigma_cont=0"
            )
        super().__init__(copy.deepcopy(ours), optim, bf16)

    def loss(self, drawn: Batch) -> Tensor:
        cim, total = self.objective, 0.0
        with torch.no_grad():
            context = cim.teacher["backbone"](drawn["context"]).patches
        for exemplar, label in zip(drawn["exemplars"], drawn["label"]):
            tokens = cim.student["backbone"](exemplar)
            logits = cim.decoder(context, torch.cat([tokens.prefix, tokens.patches], 1))
            logits = F.interpolate(upcast(logits), size=label.shape[-2:], mode="bilinear", align_corners=True)
            total = total + F.cross_entropy(logits, label.long())
        return cim.sigma_corr * total

    @torch.no_grad()
    def follow(self, step: int) -> None:
        keep = self.objective.momentum(step)
        for t, s in zip(self.objective.teacher.parameters(), self.objective.student.parameters(), strict=True):
            if t is not s:
                t.mul_(keep).add_((1 - keep) * s)


def build(keys: list[str], device: str = "cpu") -> tuple[CIM, Any]:
    """Our objective by config keys; ConfigError or BackboneError for keys that do not fit."""
    fixed = ["data=folder", "data.root=unused", f"max_steps={STEPS}"]  # not data=scenes, which brings the quick recipe
    cfg = config.load("bench", ["objective=cim", *fixed, *keys])
    torch.manual_seed(0)
    return build_objective(cfg, total_steps=STEPS, steps_per_epoch=STEPS).to(device).train(), cfg


def search(objective: CIM, images: int) -> Batch:
    """A batch as `prepare` leaves it: keys, and noise for pictures."""
    parameter, size = next(objective.student.parameters()), objective.search.size
    key = torch.from_numpy(key_of(0, torch.arange(images).numpy())).to(parameter.device)
    noise = torch.randn(1, images, 3, size, size, generator=torch.Generator().manual_seed(1)).to(parameter)
    mean, std = (torch.full((3,), value, device=parameter.device) for value in (0.5, 0.25))
    return {"key": key, "images": {"search": noise}, "mean": mean, "std": std}


def check(ours: Ours, textbook: Textbook, batch: Batch) -> tuple[float, float]:
    """The loss, and the largest difference of a gradient in shares of the largest; asserts that both are the same."""
    drawn = ours.objective.draw(batch, 0)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    losses = [variant.loss(drawn) for variant in (ours, textbook)]
    for loss in losses:
        loss.backward()
    torch.backends.cudnn.allow_tf32 = tf32
    mine, theirs = (loss.item() for loss in losses)
    assert abs(mine - theirs) <= 1e-4 * abs(theirs), f"losses differ: {mine} {theirs}"
    pairs = list(zip(ours.objective.parameters(), textbook.objective.parameters(), strict=True))
    assert all((a.grad is None) == (b.grad is None) for a, b in pairs), "other parameters got a gradient"
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    worst = max((a - b).abs().max().item() for a, b in grads) / max(b.abs().max().item() for _, b in grads)
    assert worst < 1e-4, f"gradients differ by {worst:.1e} of the largest"
    for variant in (ours, textbook):
        variant.optimizer.zero_grad(set_to_none=True)
    return mine, worst


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both variants, taking turns; milliseconds, ratios to ours, memory."""
    keys = [f"backbone={args.backbone}", f"batch_size={args.batch}", *args.keys]
    objective, cfg = build(keys, args.device)
    batch, bf16 = search(objective, args.batch), args.precision == "bf16"
    textbook = Textbook(objective, cfg.optim, bf16)
    variants = {"ours": Ours(objective, cfg.optim, bf16), "textbook, a loop over exemplars": textbook}
    loss, difference = check(variants["ours"], textbook, batch)
    timer, turns = Timer(args), {label: [] for label in variants}
    for repeat in range(WARM_UP + args.repeats):
        for label, variant in variants.items():
            turns[label].append(timer.turn(variant, batch, repeat * args.steps))
    found: dict[str, list[Turn]] = {label: own[WARM_UP:] for label, own in turns.items()}
    o = cfg.objective
    return {
        "image_size": cfg.image_size, "context_size": o.context_size, "exemplar_size": o.exemplar_size,
        "exemplars": o.exemplars, "batch": args.batch, "loss": round(loss, 6),
        "gradient_difference": float(f"{difference:.1e}"),
        "variants": {label: summary(own, found["ours"]) for label, own in found.items()},
    }  # fmt: skip


def report(found: dict[str, Any]) -> None:
    sizes = f"{found['exemplars']} exemplars of {found['exemplar_size']} px in {found['context_size']} px"
    print(f"cim, {sizes}, batch {found['batch']}: same loss {found['loss']}, gradients to "
          f"{found['gradient_difference']:.0e}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for label, t in found["variants"].items():
        spread = f"({t['ratio_lowest']:.2f} .. {t['ratio_highest']:.2f})"
        memory = f", {t['peak_mib']:,.0f} MiB" if "peak_mib" in t else ""
        print(f"  {label:32} {t['milliseconds']:10,.1f} ms   {t['ratio']:.2f} {spread}{memory}", flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="config keys, for example objective.exemplars=4")
    parser.add_argument("--backbone", default="vit_s")
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    return step_options.parse(parser, words)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    try:
        found = measure(args)
    except (ConfigError, BackboneError) as error:
        print(f"cim_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    report(found)
    machine.save(args.out, "cim_step.py", step_options.settings(args) | found)


if __name__ == "__main__":
    main()
