"""One training step of our I-JEPA and DMT-JEPA against textbook ones with the same weights, images and blocks.

    python benchmarks/feature_step.py --out benchmarks/results/feature_step.json
    python benchmarks/feature_step.py --device cuda --precision bf16 --batch 128 --steps 10 --backbone vit_b
    python benchmarks/feature_step.py --backbone vit_nano --batch 2 --repeats 1

A step is everything between two batches of prepared images: draw, forward, loss, backward, AdamW, teacher. The textbook
does what pseudo-code says: the student embeds every patch and then gathers the context; the predictor runs once per
block, through all blocks for all tokens; DMT-JEPA gathers the 8 neighbours of every patch of the image, [B, N, 8, D],
and projects keys and values of every copy; the teacher's average goes over the parameters one by one, and AdamW is
PyTorch's plain one. Before anything is timed the losses must agree to 1e-4 of their value and the gradients to 1e-4 of
the largest (float32). How turns are taken and what is measured: `distill_step.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import Any

import distill_step
import machine
import step_options
import torch
import torch.nn.functional as F
from distill_step import STEPS, WARM_UP, Timer, Turn, crops, summary
from textbook_distill import window
from torch import Tensor, nn

from selfsight import config
from selfsight.backbones.tokens import BackboneError
from selfsight.backbones.vit import ViT
from selfsight.config import ConfigError
from selfsight.nn.losses import upcast
from selfsight.objectives import build_objective
from selfsight.objectives.ijepa import IJEPA
from selfsight.views.spec import Batch


class Ours(distill_step.Ours):
    """Our objective with its optimizer; nothing is clipped."""

    def update(self, step: int) -> None:
        """AdamW, teacher."""
        self.optimizer.step()
        self.objective.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)


class Textbook:
    """I-JEPA's networks and optimizer on copies of our weights; a step is `gradients`, then `update`."""

    def __init__(self, ours: IJEPA, optim: Any, bf16: bool = False):
        if not isinstance(ours.student["backbone"], ViT) or optim.clip or optim.decay_rule != "default":
            raise ConfigError(
                "the textbook has a ViT, no clipping and optim.decay_rule=default: use such a backbone and leave these "
                "keys as they are"
            )
        self.ours, self.bf16 = ours, bf16
        self.nets = copy.deepcopy(nn.ModuleDict({"student": ours.student, "predictor": ours.predictor}))
        self.teacher = copy.deepcopy(ours.teacher).requires_grad_(False)
        self.encoder, self.predictor = self.nets["student"]["backbone"].timm, self.nets["predictor"]
        named = [(n, p) for n, p in self.nets.named_parameters() if p.requires_grad]
        exempt = {n for n, p in named if p.ndim <= 1 or n.endswith(("bias", "_token"))}
        groups = [
            {"params": [p for n, p in named if n not in exempt]},
            {"params": [p for n, p in named if n in exempt], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
        )

    def targets(self, features: Tensor) -> Tensor:
        """Targets of all patches, [B, N, D]."""
        return features

    def context(self, tokens: Tensor) -> Tensor:
        return tokens

    def loss(self, batch: Batch, step: int) -> Tensor:
        images, predictor = batch["images"]["image"][0], self.predictor
        pos = predictor.pos_embed[0]
        with torch.no_grad():
            features = self.teacher["backbone"].timm.forward_features(images)
            target = self.targets(F.layer_norm(upcast(features), features.shape[-1:]))
        tokens = self.encoder.patch_embed(images) + self.encoder.pos_embed
        tokens = gather(tokens, batch["context"])
        for block in self.encoder.blocks:
            tokens = block(tokens)
        tokens, terms = self.context(self.encoder.norm(tokens)), []
        for ids in batch["target"].unbind(1):
            seen = predictor.embed(tokens) + pos[batch["context"]]
            x = torch.cat([seen, (predictor.mask_token + pos[ids]).to(seen.dtype)], 1)
            for block in predictor.blocks:
                x = block(x)
            prediction = predictor.proj(predictor.norm(x))[:, seen.shape[1] :]
            terms.append(F.smooth_l1_loss(upcast(prediction), upcast(gather(target, ids))))
        return torch.stack(terms).mean()

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Draw, forward, loss, backward of prepared images and keys; the loss."""
        batch = self.ours.draw(batch, step)
        with torch.autocast(batch["key"].device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch, step)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """AdamW, teacher."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = self.ours.momentum(step)
        for t, s in zip(self.teacher.parameters(), self.nets["student"].parameters(), strict=True):
            if s.requires_grad:
                t.mul_(momentum).add_((1 - momentum) * s)


class TextbookDMT(Textbook):
    """DMT-JEPA: the head over the copies of all patches' neighbours, and over the context."""

    def __init__(self, ours: IJEPA, optim: Any, bf16: bool = False):
        super().__init__(ours, optim, bf16)
        plain = (ours.query, ours.context_attn, ours.window) == ("same_image", "cross-attn", 3)
        if not plain or ours.include_self or ours.target_final_ln or ours.plain_steps:
            raise ConfigError("the textbook has DMT-JEPA's defaults and objective.border= alone: leave the others out")
        around, inside = window(*ours.student["backbone"].grid(ours.image_size), ours.border)
        device = ours.predictor.mask_token.device
        self.around, self.inside = around.to(device), None if inside is None else inside.to(device)

    def layer(self, block: nn.Module, query: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """What queries [M, 1, D] attend to among themselves and tokens [M, S, D], of which `valid` [M, S] count."""
        attn, u = block.attn, block.norm1(torch.cat([query, tokens], 1))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.q(u[:, :1]), attn.k(u), attn.v(u)))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if valid is not None:
            scores = scores.masked_fill(~F.pad(valid, (1, 0), value=True)[:, None, None], float("-inf"))
        return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def targets(self, features: Tensor) -> Tensor:
        head, copies = self.teacher["aggregate"], features[:, self.around]  # [B, N, 8, D]
        similarity = F.cosine_similarity(features[:, :, None], copies, dim=-1)
        if self.inside is not None:
            similarity = similarity.masked_fill(~self.inside, float("-inf"))
        best = similarity.topk(self.ours.neighbours, dim=-1).indices
        chosen = copies.gather(2, best[..., None].expand(*best.shape, features.shape[-1])).flatten(0, 1)
        valid = None
        if self.inside is not None:
            valid = self.inside.expand_as(similarity).gather(2, best).flatten(0, 1)
        query = features.mean(1, keepdim=True).expand_as(features).reshape(-1, 1, features.shape[-1])
        for block in head.cls_blocks:
            query = query + self.layer(block, query, chosen, valid)
            query = query + block.mlp(block.norm2(query))
        return head.norm(query).view_as(features)

    def context(self, tokens: Tensor) -> Tensor:
        head = self.nets["student"]["aggregate"]
        for block in head.cls_blocks:
            tokens = tokens + self.layer(block, tokens.mean(1, keepdim=True), tokens)
            tokens = tokens + block.mlp(block.norm2(tokens))
        return head.norm(tokens)


TEXTBOOK = {"ijepa": Textbook, "dmt_jepa": TextbookDMT}


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, D] at ids [B, K]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def build(name: str, keys: list[str], device: str = "cpu") -> tuple[IJEPA, Any]:
    """Our objective by config keys; ConfigError or BackboneError for keys that do not fit."""
    fixed = ["data=folder", "data.root=unused", f"max_steps={STEPS}"]  # not data=scenes, which brings the quick recipe
    cfg = config.load("bench", [f"objective={name}", *fixed, *keys])
    torch.manual_seed(0)
    return build_objective(cfg, total_steps=STEPS, steps_per_epoch=STEPS).to(device).train(), cfg


def check(ours: IJEPA, textbook: Textbook, batch: Batch) -> tuple[float, float]:
    """Our loss, and the largest difference of a gradient in shares of the largest; asserts that both are the same."""
    drawn = ours.draw(batch, 0)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    mine, theirs = ours.loss(drawn, 0)[0], textbook.loss(drawn, 0)
    mine.backward()
    theirs.backward()
    torch.backends.cudnn.allow_tf32 = tf32
    assert abs(mine.item() - theirs.item()) <= 1e-4 * theirs.item(), f"losses differ: {mine.item()} {theirs.item()}"
    trained = [*ours.student.parameters(), *ours.predictor.parameters()]
    pairs = list(zip(trained, textbook.nets.parameters(), strict=True))
    assert all((a.grad is None) == (b.grad is None) for a, b in pairs), "other parameters got a gradient"
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    scale = max(b.abs().max().item() for _, b in grads)
    worst = max((a - b).abs().max().item() for a, b in grads) / scale
    assert worst < 1e-4, f"gradients differ by {worst:.1e} of the largest"
    ours.zero_grad(set_to_none=True)
    textbook.nets.zero_grad(set_to_none=True)
    return mine.item(), worst


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both steps of one objective, taking turns; milliseconds, ratios to ours, memory."""
    keys = [f"backbone={args.backbone}", f"batch_size={args.batch}", *args.keys]
    objective, cfg = build(name, keys, args.device)
    batch, bf16 = crops(objective, args.batch), args.precision == "bf16"
    textbook = TEXTBOOK[name](objective, cfg.optim, bf16)
    loss, difference = check(objective, textbook, batch)
    variants = {"ours": Ours(objective, cfg.optim, bf16), "textbook": textbook}
    timer, turns = Timer(args), {label: [] for label in variants}
    for repeat in range(WARM_UP + args.repeats):
        for label, variant in variants.items():
            turns[label].append(timer.turn(variant, batch, repeat * args.steps))
    found: dict[str, list[Turn]] = {label: own[WARM_UP:] for label, own in turns.items()}
    return {
        "image_size": cfg.image_size, "batch": args.batch, "loss": round(loss, 6),
        "gradient_difference": float(f"{difference:.1e}"),
        "variants": {label: summary(own, found["ours"]) for label, own in found.items()},
    }  # fmt: skip


def report(name: str, found: dict[str, Any]) -> None:
    print(f"{name}, {found['image_size']} px, batch {found['batch']}: same loss {found['loss']}, "
          f"gradients to {found['gradient_difference']:.0e}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for label, t in found["variants"].items():
        spread = f"({t['ratio_lowest']:.2f} .. {t['ratio_highest']:.2f})"
        memory = f", {t['peak_mib']:,.0f} MiB" if "peak_mib" in t else ""
        part = f"until the gradients {t['ratio_until_gradients']:.2f}"
        print(f"  {label:10} {t['milliseconds']:10,.1f} ms   {t['ratio']:.2f} {spread}, {part}{memory}", flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="config keys, for example image_size=96 objective.border=wrap")
    parser.add_argument("--objectives", nargs="+", default=list(TEXTBOOK), choices=list(TEXTBOOK))
    parser.add_argument("--backbone", default="vit_s")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
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
        print(f"feature_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    machine.save(args.out, "feature_step.py", step_options.settings(args) | {"objectives": results})


if __name__ == "__main__":
    main()
