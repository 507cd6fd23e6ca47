"""ODIS: object-level self-distillation (Hizli et al., 2025, arXiv 2506.05409); iBOT on one object of each image.

    loss = cross-view loss on a token that may look only at the object's patches + iBOT's loss on hidden patches

Crops are laid so that they show the object; the class token of a ViT is the object token and its attention row is
restricted in every block. Families without such a token read the object out of their patches by class attention. No
official code exists: what the paper's public text leaves open is listed in docs/odis.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone, Needs, Replace, Tokens
from ..config import ConfigError, duration
from ..nn.class_attention import ClassAttention
from ..nn.losses import global_mean
from ..views.place import AroundObject
from ..views.spec import Batch, Cells
from . import distill
from .distill import Distillation, Pace
from .ibot import IBOT, OWN, masking_of, patch_heads

LOCALS = {True: "object", False: "random"}


class ODIS(IBOT):
    """As IBOT; "readout" in student and teacher where the backbone has no token whose attention can be restricted.

    no_mask: images without any object are treated as if the object filled them ("full"), or their pooled loss is left
    out ("skip"), or a run refuses data without objects ("error"). A view that lost the object never has a pooled loss.
    exact_mean: divide by the number of valid pairs instead of all (the derivative reference divides by all).
    """

    needs = Needs(hide=Replace, stride=16)  # focus: only where the backbone itself restricts its pooled token

    def __init__(
        self, *args: Any, no_mask: str = "full", restrict: bool = True, exact_mean: bool = True, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.no_mask, self.restrict, self.exact_mean = no_mask, restrict, exact_mean

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> ODIS:
        o = cfg.objective
        refuse_idle(o)
        kwargs, pace = distill.settings(cfg, *OWN), Pace.of(cfg, total_steps, steps_per_epoch)
        backbone, student = object_networks(cfg, cls.needs)
        place = AroundObject(
            min_area=o.min_area, choice=o.object_choice, min_visible=o.min_visible, locals=LOCALS[o.object_locals],
            sampling=o.object_crops, required=o.no_mask == "error",
        )  # fmt: skip
        views = distill.multicrop(
            cfg,
            place,
            (Cells("global", backbone.grid(cfg.views["global"].size), o.object_shape, margin=o.object_margin),),
        )
        masking = masking_of(cfg, backbone, duration(o.mask_start).steps(total_steps, steps_per_epoch))
        return cls(
            student, views, pace, masking, no_mask=o.no_mask, restrict=o.object_pool != "none",
            exact_mean=o.exact_mean, **kwargs,
        )  # fmt: skip

    def draw(self, batch: Batch, step: int) -> Batch:
        """Adds focus, bool [2 B, N] (True = the pooled token may look there), and seen, float [2 + V, B]: views whose
        pooled feature counts. Local views count as showing the object whatever they show, as in the reference."""
        batch = super().draw(batch, step)
        cells, has = batch["cells"]["global"].flatten(2).bool(), batch["has_object"]  # [2, B, N], [B]
        shown = cells.any(2)
        if self.no_mask == "full":
            shown = shown | ~has
        focus = cells | ~(shown & has)[..., None]  # rows that do not count stay whole rather than empty
        locals_ = torch.ones_like(has) if self.no_mask == "full" else has
        count = sum(c.count for c in self._views.crops[1:])
        seen = torch.cat([shown, locals_.expand(count, -1)]).to(self.center.center.dtype)
        return batch | {"focus": focus.flatten(0, 1) if self.restrict else None, "seen": seen}

    def pool(self, net: nn.ModuleDict, tokens: Tokens, focus: Tensor | None) -> Tensor:
        if "readout" not in net:
            return tokens.pooled
        readout: ClassAttention = net["readout"]
        return readout.normed(readout.pool(readout.project(tokens.patches), focus))

    def encode(
        self, net: nn.ModuleDict, views: Tensor, *args: Any, focus: Tensor | None = None, **kwargs: Any
    ) -> Tokens:
        if "readout" in net:
            focus = None  # the read-out looks at the object; the backbone at everything
        return Distillation.encode(net, views, *args, focus=focus, **kwargs)

    def attention(self, net: nn.ModuleDict, images: Tensor, focus: Tensor | None) -> Tensor | None:
        if "readout" not in net:
            return super().attention(net, images, focus)
        readout: ClassAttention = net["readout"]
        return readout.attention(readout.project(net["backbone"](images).patches), focus)

    def judged(self, name: str) -> Backbone:
        """With the read-out, where there is one: under masks it is what was trained to see the object."""
        net = {"teacher": self.teacher, "student": self.student}[name]
        if "readout" in net:
            net["backbone"].readout = net["readout"]
        return net["backbone"]

    def pooled_targets(self, pooled: Tensor, rows: int, step: int, seen: Tensor | None) -> Tensor:
        return super().pooled_targets(pooled, rows, step, seen if self.exact_mean else None)

    def pooled_loss(self, pairs: Tensor, batch: Batch) -> Tensor:
        """Pairs of different views that both show the object, [2, 2 + V, B] -> scalar."""
        g, v, b = pairs.shape
        weight = batch["seen"][:g, None] * batch["seen"][None]
        same = torch.arange(g, device=pairs.device)
        weight = weight.index_put((same, same), weight.new_zeros(()))
        if self.exact_mean:
            return global_mean(pairs.flatten(), weight.flatten())
        return (pairs * weight).sum() / (b * (g * v - g))


def refuse_idle(o: Any) -> None:
    """ConfigError for a key that another one leaves without effect."""
    if o.object_margin and o.object_shape == "exact":
        raise ConfigError(
            f"objective.object_margin={o.object_margin} has no effect with objective.object_shape=exact: leave it out, "
            "or use objective.object_shape=box"
        )
    if o.object_locals and o.object_crops == "none":
        raise ConfigError(
            "objective.object_locals=true has no effect with objective.object_crops=none: leave it out, or use "
            "objective.object_crops=analytic or official"
        )


def object_networks(cfg: Any, needs: Needs) -> tuple[Backbone, nn.ModuleDict]:
    """The backbone and the student's parts. A backbone that can attend restricts its own token; others get a read-out
    (object_pool=attention) or average the object's positions (mean)."""
    pool = cfg.objective.object_pool
    backbone = distill.multicrop_backbone(cfg, needs._replace(focus=pool != "none"))
    if pool == "mean" and backbone.can_attend:
        raise ConfigError(
            f"objective.object_pool=mean is for backbones without a class token, and {cfg.backbone.name} has one: "
            "use objective.object_pool=attention or none"
        )
    parts: dict[str, nn.Module] = {"backbone": backbone} | patch_heads(cfg, backbone.embed_dim)
    if pool == "attention" and not backbone.can_attend:
        parts["readout"] = ClassAttention.on(backbone)
        backbone.freeze_pooled()  # the mean is still what is exported, but no loss sees it
    return backbone, nn.ModuleDict(parts)
