"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

    loss = mean over pairs of different views of  H( softmax((teacher - centre) / temp), softmax(student / 0.1) )

The teacher sees the two global views, the student all of them. Centring (or Sinkhorn) against a low temperature keeps
the distributions from collapsing. Only the pooled feature is used, so every family trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.tokens import Needs
from ..nn.losses import cross_view, other_views
from ..nn.targets import Center
from ..views.spec import Batch, Views
from . import distill
from .distill import Distillation, Pace
from .objective import Logs


class DINO(Distillation):
    """student / teacher: {"backbone", "head"}; center: of the teacher's logits."""

    needs = Needs()

    def __init__(self, student: nn.ModuleDict, views: Views, pace: Pace, **kwargs: Any):
        super().__init__(student, views, pace, **kwargs)
        self.center = Center(student["head"].num_prototypes)

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> DINO:
        kwargs, pace = distill.settings(cfg), Pace.of(cfg, total_steps, steps_per_epoch)
        backbone = distill.multicrop_backbone(cfg, cls.needs)
        student = nn.ModuleDict({"backbone": backbone, "head": distill.prototype_head(cfg, backbone.embed_dim)})
        return cls(student, distill.multicrop(cfg), pace, **kwargs)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images, drop, rows = batch["images"], batch["drop"], batch["images"]["global"].shape[1]
        with torch.no_grad():
            logits = self.teacher["head"](self.encode(self.teacher, images["global"]).pooled)
            target = self.targets(logits.unflatten(0, (2, rows)), self.center, step)  # [2, B, K]
        pooled = torch.cat([self.encode(self.student, v, drop_path=drop[k]).pooled for k, v in images.items()])
        logits = self.student["head"](pooled).unflatten(0, (-1, rows))  # [2 + V, B, K]
        loss = other_views(cross_view(target, logits, self.student_temp)).mean()
        logs = {"loss": loss.detach()} | distill.health(target, loss)
        if self.koleo:
            spread = self.spread(pooled, rows)
            loss = loss + self.koleo * spread
            logs |= {"loss": loss.detach(), "koleo": spread.detach()}
        return loss, logs

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return distill.view_pictures(self, batch)
