"""Reference implementations' I-JEPA and DMT-JEPA states, put into our objectives through the checkpoint layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import official
from golden_cases import assert_close, part
from selfsight.interop.layouts import recognise, split
from selfsight.interop.networks import jepa_networks
from selfsight.nn.predictor import Predictor
from selfsight.objectives.ijepa import IJEPA
from selfsight.views.blocks import Blocks

NEAR = {"atol": 1e-5}  # of the goldens, which are float32 runs; gradients: a share of 1e-4 of the largest entry
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def build(cls: type[IJEPA], config: dict, add: Callable[[int, int], dict[str, nn.Module]] | None = None, **kwargs):
    """The objective of a golden's sizes; `add` gives the student's further parts from width and heads."""
    backbone = official.vit(config, cls.needs)
    size, heads = config["img_size"], config["num_heads"]
    predictor = Predictor(
        config["embed_dim"], backbone.grid(size), width=config["pred_emb_dim"], depth=config["pred_depth"], heads=heads
    )
    student = nn.ModuleDict({"backbone": backbone} | (add(config["embed_dim"], heads) if add else {}))
    return cls(
        student, predictor, Blocks(backbone.cells(size)), lambda step: config["ema_momentum"], image_size=size, **kwargs
    ).train()


def load(objective: IJEPA, state: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """States as the official file has them: nothing may be missing or left over."""
    nets = {
        "": state,
        "target_": target if "encoder.norm.weight" in target else {f"encoder.{k}": v for k, v in target.items()},
    }
    checkpoint: dict[str, dict] = {}
    for prefix, tensors in nets.items():
        for key, value in tensors.items():
            network, name = key.split(".", 1)
            checkpoint.setdefault(prefix + network, {})[f"module.{name}"] = value
    for which, flat in jepa_networks(checkpoint).items():
        assert recognise(flat) == ["ijepa"]
        parts, net = split(flat, "ijepa"), getattr(objective, which)
        assert not parts["left"] and not parts["mask_token"]
        net["backbone"].timm.load_state_dict(parts["backbone"])
        nn.ModuleDict({k: m for k, m in net.items() if k != "backbone"}).load_state_dict(parts["heads"])
        if which == "student":
            objective.predictor.load_state_dict(parts["decoder"])
    objective.to(next(iter(state.values())).dtype)


def official_name(name: str) -> str:
    """Our parameter name, below the objective, to the reference's."""
    name = name.removeprefix("student.").removeprefix("teacher.")
    name = name.replace("backbone.timm.", "encoder.").replace("aggregate.", "local_agg_head.")
    return name if name == "predictor.mask_token" else name.replace("predictor.", "predictor.predictor_")


def batches(t: dict, prefix: str, dtype: torch.dtype) -> list[dict]:
    """One batch per context mask, as a golden's `<prefix>images` and `<prefix>masks_*` say."""
    images = t[f"{prefix}images"].to(dtype)
    masks = {kind: part(t, f"{prefix}masks_{kind}.") for kind in ("enc", "pred")}
    target = torch.stack([masks["pred"][str(i)] for i in range(len(masks["pred"]))], 1)
    contexts = [masks["enc"][str(i)] for i in range(len(masks["enc"]))]
    return [{"images": {"image": images[None]}, "context": context, "target": target} for context in contexts]


def in_loss_order(per_context: list[torch.Tensor]) -> torch.Tensor:
    """[B, m, Kt, D] for each context -> the reference's rows: (block, context, image)."""
    return torch.stack(per_context, 1).permute(2, 1, 0, 3, 4).flatten(0, 2)


def assert_step(objective: IJEPA, t: dict, given: list[dict], parts_of_ema: str) -> None:
    """Loss, predictions, gradients of every recorded parameter, and the teacher after its step."""
    images = given[0]["images"]["image"][0]
    assert_close(in_loss_order([objective.predict(images, b) for b in given]), t["output.pred"], "pred", **NEAR)
    loss = sum(objective.loss(b, 0)[0] for b in given) / len(given)
    assert_close(loss, t["output.loss"], "loss", **NEAR)
    loss.backward()
    grads = {official_name(n): p.grad for n, p in objective.named_parameters() if p.grad is not None}
    for name, grad in part(t, "output.grad.").items():
        assert_close(grads[name], grad, name, atol=0, of_largest=1e-4)
    objective.after_step(0)
    teacher = {official_name(n): p for n, p in objective.teacher.named_parameters()}
    for name, value in part(t, "output.ema.").items():
        assert_close(teacher[parts_of_ema + name], value, f"teacher {name}", atol=1e-6)
