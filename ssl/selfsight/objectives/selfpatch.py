"""SelfPatch: DINO and a loss on patches (Yun et al., CVPR 2022, arXiv 2206.07990).

    loss = DINO's loss on a class-attention token + 0.1 * mean over patches of H(teacher's neighbourhood, student's)

For each patch the teacher picks the most similar ones around it and aggregates them by the class attention that pools
the image; the student's own patch, of the same view, must predict that. Every view, also the local ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.tokens import Needs
from ..nn.class_attention import ClassAttention
from ..nn.losses import cross_entropy, cross_view, other_views
from ..nn.neighbours import top_neighbours
from ..nn.targets import Center
from ..views.spec import Batch, Views
from . import distill
from .distill import Distillation, Pace
from .objective import Logs


class SelfPatch(Distillation):
    """student / teacher: {"backbone", "ca_head", "c_head", "p_head"}: pooling, image and patch prototypes."""

    needs = Needs(stride=16, class_token=False, pooled=False)

    def __init__(
        self,
        student: nn.ModuleDict,
        views: Views,
        pace: Pace,
        *,
        neighbours: int = 4,
        border: str = "clip",
        patch_loss: float = 0.1,
        patch_crops: str = "all",
        **kwargs: Any,
    ):
        super().__init__(student, views, pace, **kwargs)
        self.neighbours, self.border, self.patch_loss, self.patch_crops = neighbours, border, patch_loss, patch_crops
        self.center = Center(student["c_head"].num_prototypes)
        self.patch_center = Center(student["p_head"].num_prototypes)

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> SelfPatch:
        o = cfg.objective
        kwargs = distill.settings(cfg, "neighbours", "border", "patch_loss", "patch_crops")
        backbone = distill.multicrop_backbone(cfg, cls.needs)
        backbone.train_final_norm()
        student = {
            "backbone": backbone,
            "ca_head": ClassAttention.on(backbone, norm=backbone.final_norm()),
            "c_head": distill.prototype_head(cfg, backbone.embed_dim),
            "p_head": distill.prototype_head(cfg, backbone.embed_dim, num_prototypes=o.num_patch_prototypes),
        }
        pace = Pace.of(cfg, total_steps, steps_per_epoch)
        return cls(nn.ModuleDict(student), distill.multicrop(cfg), pace, **kwargs)

    def grid(self, views: Tensor) -> tuple[int, int]:
        return self.student["backbone"].grid(views.shape[-1])

    def student_view(self, views: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Views [n, B, 3, s, s] -> pooled [n B, D] and patches [n B, N, D], which bypass the class attention."""
        pool: ClassAttention = self.student["ca_head"]
        tokens = self.encode(self.student, views, norm=False, drop_path=drop).patches
        return pool.normed(pool.pool(pool.project(tokens))), pool.normed(tokens)

    def teacher_view(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Views -> pooled [n B, D] and, for every patch, what its most similar neighbours add up to [n B, N, D]."""
        pool: ClassAttention = self.teacher["ca_head"]
        tokens = self.encode(self.teacher, views, norm=False).patches
        projected = pool.project(tokens)
        ids, valid = top_neighbours(tokens, self.grid(views), self.neighbours, border=self.border)
        patches = pool.aggregate(projected, ids, valid if self.border == "clip" else None)
        return pool.normed(pool.pool(projected)), pool.normed(patches)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images, drop, rows = batch["images"], batch["drop"], batch["images"]["global"].shape[1]
        seen = images if self.patch_crops == "all" else {"global": images["global"]}
        pooled, means, pooled_targets, patch_losses = [], [], [], []
        for kind, views in images.items():
            mine, patches = self.student_view(views, drop[kind])
            pooled.append(mine)
            means.append(patches.mean(1))
            if kind not in seen:
                continue
            with torch.no_grad():
                theirs, aggregated = self.teacher_view(views)
                pooled_targets.append(theirs)
                target = self.targets(self.teacher["p_head"](aggregated), self.patch_center, step)
            each = cross_entropy(target, self.student["p_head"](patches), self.student_temp)
            patch_losses.append(each.mean(1))
        with torch.no_grad():  # all views count in the centre, the global ones are targets
            logits = self.teacher["c_head"](torch.cat(pooled_targets)).unflatten(0, (-1, rows))
            target = self.targets(logits, self.center, step)[:2]
        logits = self.student["c_head"](torch.cat(pooled)).unflatten(0, (-1, rows))
        image_loss = other_views(cross_view(target, logits, self.student_temp)).mean()
        patch_loss = torch.cat(patch_losses).mean()  # every view has the same weight, whatever its number of patches
        loss = image_loss + self.patch_loss * patch_loss
        logs = {"pooled": image_loss.detach(), "patch": patch_loss.detach()}
        if self.koleo:
            spread = self.spread(means[0], rows)  # of what is exported: the mean of the patches
            loss, logs = loss + self.koleo * spread, logs | {"koleo": spread.detach()}
        return loss, {"loss": loss.detach()} | logs | distill.health(target, image_loss)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The first global view; per row one of its patches (red) and the neighbours that the teacher matches to it."""
        view = batch["images"]["global"][0]
        tokens = self.encode(self.teacher, view[None], norm=False).patches
        rows, columns = self.grid(view)
        ids, valid = top_neighbours(tokens, (rows, columns), self.neighbours, border=self.border)
        low, high = view.amin((1, 2, 3), keepdim=True), view.amax((1, 2, 3), keepdim=True)
        red = torch.cat([high, low, low], 1).expand_as(view)

        def enlarge(x: Tensor) -> Tensor:
            return nn.functional.interpolate(x.unflatten(1, (rows, columns))[:, None], size=view.shape[-2:])

        shown = {"global 1": view}
        for r, c in ((rows // 4, columns // 4), (rows // 2, columns // 2), (3 * rows // 4, columns // 4)):
            own = torch.zeros(tokens.shape[:2], device=tokens.device)
            own[:, r * columns + c] = 1
            light = (0.25 + own).scatter_reduce(1, ids[:, r * columns + c], valid[:, r * columns + c].to(own), "amax")
            lit = torch.lerp(low, view, enlarge(light.clamp(max=1)))
            shown[f"patch {r}, {c}"] = torch.lerp(lit, red, 0.5 * enlarge(own))
        return shown
