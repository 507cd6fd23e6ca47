"""Reference implementations' self-distillation states, put into our objectives through the checkpoint layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from golden_cases import part
from selfsight.backbones.tokens import Needs
from selfsight.backbones.vit import ViT
from selfsight.interop.layouts import recognise, split
from selfsight.nn.heads import PrototypeHead
from selfsight.objectives.distill import Distillation, Pace
from selfsight.training.optim import build_adamw, clip_per_tensor, param_groups
from selfsight.training.schedules import stairs, warmup_cosine
from selfsight.views.spec import Crop, Views

NO_VIEWS = Views((Crop("global", 2, 32, (0.4, 1.0)),))


def vit(config: dict, needs: Needs, **kwargs) -> ViT:
    """A ViT of a golden's size with the reference's rule for positions at other sizes."""
    size = config["img_size"][0] if isinstance(config["img_size"], list) else config["img_size"]
    return ViT(
        "vit_base_patch16_224", needs=needs, image_sizes=(size,), patch_size=config["patch_size"],
        embed_dim=config["embed_dim"], depth=config["depth"], num_heads=config["num_heads"], pos_resize="official",
        **kwargs,
    )  # fmt: skip


def head(config: dict, dim: int, **kwargs) -> PrototypeHead:
    return PrototypeHead(
        dim, config["out_dim"], hidden=config["hidden_dim"], bottleneck=config["bottleneck_dim"],
        learn_scale=not config["norm_last_layer"], **kwargs,
    )  # fmt: skip


def load(net: nn.ModuleDict, state: dict[str, torch.Tensor]) -> None:
    """One network's official state into ours; nothing may be missing or left over."""
    layout = recognise(state)[0]
    assert layout in ("dino", "ibot", "selfpatch", "dinov2", "odis")
    parts = split(state, layout)
    assert not parts["left"]
    assert not parts["decoder"]
    net["backbone"].timm.load_state_dict(parts["backbone"])
    rest = nn.ModuleDict({k: m for k, m in net.items() if k != "backbone"})
    # A shared head is stored twice by iBOT: as the layers of class tokens and of patches.
    unshared = "head" in rest and getattr(rest["head"], "last_layer2", None) is not None
    rest.load_state_dict({k: v for k, v in parts["heads"].items() if unshared or "last_layer2" not in k})
    if parts["mask_token"]:
        with torch.no_grad():
            net["backbone"].mask_token.copy_(parts["mask_token"]["mask_token"])


def official_name(name: str) -> str:
    """Our parameter name, below student or teacher, to the reference's."""
    name = name.removeprefix("student.").removeprefix("teacher.")
    return name.replace("backbone.timm.", "backbone.").replace("backbone.mask_token", "backbone.masked_embed")


def views_of(crops: list[torch.Tensor]) -> dict:
    """Crops in the reference's order, grouped by size: the first two are global."""
    images = {"global": torch.stack(crops[:2])}
    if len(crops) > 2:
        images["local"] = torch.stack(crops[2:])
    return {"images": images, "drop": dict.fromkeys(images)}


def trace(objective: Distillation, config: dict, t: dict) -> Iterator[tuple[int, torch.Tensor, dict]]:
    """The official training loop from a golden's states over its crops; step, loss and logs after each step.

    Schedules of rate, decay and momentum, per-tensor clipping, frozen prototypes, centres, teacher.
    """
    per_epoch, total = config["iters_per_epoch"], config["epochs"] * config["iters_per_epoch"]
    load(objective.student, part(t, "state.", torch.float64))
    load(objective.teacher, part(t, "state.", torch.float64))
    groups = param_groups(objective, config["weight_decay"], rule="official")
    optimizer = build_adamw(groups, config["lr"], (0.9, 0.999), 1e-8)
    peak = config["lr"] * config["batch"] / 256
    lr = warmup_cosine(peak, total, config["warmup_epochs"] * per_epoch, config["min_lr"], inclusive=True)
    decay = warmup_cosine(config["weight_decay"], total, 0, config["weight_decay_end"])
    for step in range(total):
        used = {"lr": lr(step), "wd": decay(step), "momentum": objective.pace.momentum(step)}
        for name, value in used.items():
            if f"output.schedule_{name}" in t:
                assert value == pytest.approx(t[f"output.schedule_{name}"][step].item(), abs=1e-12), (name, step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = used["lr"], used["wd"] if group["decayed"] else 0.0
        crops = [t[f"input.iter{step % per_epoch}.crop{i}"].double() for i in range(2 + config["n_local"])]
        loss, logs = objective.loss(views_of(crops), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        objective.after_backward(step)
        clip_per_tensor(objective.student.parameters(), config["clip_grad"])
        optimizer.step()
        objective.after_step(step)
        yield step, loss.detach(), logs


def pace(config: dict, per_epoch: int = 1) -> Pace:
    temp = stairs(
        config["warmup_teacher_temp"], config["teacher_temp"], config["warmup_teacher_temp_epochs"], per_epoch
    )
    total = config["epochs"] * per_epoch
    momentum = warmup_cosine(config.get("momentum_teacher", 0.996), total, 0, 1.0)
    return Pace(momentum, temp, config.get("freeze_last_layer", 0) * per_epoch)


def without_key_bias(name: str, value: torch.Tensor) -> torch.Tensor:
    """The key third of a qkv bias has a true gradient of zero, whose rounding AdamW turns into steps."""
    if not name.endswith("attn.qkv.bias"):
        return value
    width = len(value) // 3
    return torch.cat([value[:width], value[2 * width :]])
