"""iBOT: image and masked-patch self-distillation (Zhou et al., ICLR 2022, arXiv 2111.07832), with DINOv2's switches.

    loss = DINO's loss on the pooled features + mean over hidden patches of  H(teacher's patch, student's patch)

The student sees global views with cells replaced by a mask token and predicts the teacher's distribution for what is
hidden; the teacher sees everything. DINOv2 (Oquab et al., 2023): centering=sinkhorn, koleo=0.1, patch_head=separate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone, Needs, Replace, Tokens, need_cells, pick
from ..config import ConfigError, duration
from ..data.rng import fold, step_key
from ..nn.heads import PrototypeHead
from ..nn.losses import cross_entropy, cross_view, full_precision, other_views, upcast
from ..nn.targets import Center
from ..views.masks import block_mask, independent_counts, random_mask, slots, stratified_counts
from ..views.spec import Batch, Views
from . import distill
from .distill import Distillation, Pace
from .objective import Logs

OWN = ("patch_center", "center_mean", "pooled_loss", "patch_loss")  # keys beside those of `distill.settings`


class Masking:
    """Which cells of the global views are hidden: counts dealt over the global batch, shapes from each sample's key."""

    def __init__(
        self,
        grid: tuple[int, int],
        batch_size: int,
        *,
        seed: int = 0,
        ratio: tuple[float, float] = (0.1, 0.5),
        share: float = 0.5,
        rule: str = "stratified",
        shape: str = "block",
        start: int = 0,
    ):
        self.grid, self.batch_size, self.seed, self.start = grid, batch_size, seed, start
        self.ratio, self.share, self.rule, self.shape = tuple(ratio), share, rule, shape
        self.cells = math.prod(grid)
        self.most = max(1, int(self.cells * self.ratio[1] + 1e-4))  # slots per view

    def __call__(self, key: Tensor, position: Tensor, step: int, views: int = 2) -> Tensor:
        """Keys and global positions, int64 [B] -> bool [views, B, C], True = hidden."""
        if self.rule == "stratified":
            row = position % self.batch_size
            rows = torch.stack([row + v * self.batch_size for v in range(views)])
            deal = step_key(self.seed, step), rows, views * self.batch_size
            counts = stratified_counts(*deal, self.cells, self.share, self.ratio)
        else:
            counts = independent_counts(key, views, self.cells, self.share, self.ratio)
        counts = counts * (step >= self.start)
        keys = [fold(key, f"mask/{v}") for v in range(views)]
        if self.shape == "random":
            return torch.stack([random_mask(k, self.cells, c) for k, c in zip(keys, counts)])
        return torch.stack([block_mask(k, self.grid, c) for k, c in zip(keys, counts)])


class IBOT(Distillation):
    """student / teacher: {"backbone", "head"} and "patch_head" where patches have their own."""

    needs = Needs(hide=Replace, stride=16)

    def __init__(
        self,
        student: nn.ModuleDict,
        views: Views,
        pace: Pace,
        masking: Masking,
        *,
        patch_center: str = "all",
        center_mean: str = "exact",
        pooled_loss: float = 1.0,
        patch_loss: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(student, views, pace, **kwargs)
        self.masking, self.patch_center, self.weights = masking, patch_center, (pooled_loss, patch_loss)
        self.center = Center(student["head"].num_prototypes)
        prototypes = self.patch_head(student).num_patch_prototypes
        self.center2 = Center(prototypes, official_mean=center_mean == "official")

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> IBOT:
        kwargs, pace = distill.settings(cfg, *OWN), Pace.of(cfg, total_steps, steps_per_epoch)
        backbone = distill.multicrop_backbone(cfg, cls.needs)
        student = nn.ModuleDict({"backbone": backbone} | patch_heads(cfg, backbone.embed_dim))
        masking = masking_of(cfg, backbone, duration(cfg.objective.mask_start).steps(total_steps, steps_per_epoch))
        return cls(student, distill.multicrop(cfg), pace, masking, **kwargs)

    @staticmethod
    def patch_head(net: nn.ModuleDict) -> PrototypeHead:
        return net["patch_head"] if "patch_head" in net else net["head"]

    def draw(self, batch: Batch, step: int) -> Batch:
        batch = super().draw(batch, step)
        rows = torch.arange(len(batch["key"]), device=batch["key"].device)
        return batch | {"mask": self.masking(batch["key"], batch.get("position", rows), step)}

    def pool(self, net: nn.ModuleDict, tokens: Tokens, focus: Tensor | None) -> Tensor:
        """The feature of the image level, [R, D]."""
        return tokens.pooled

    def pooled_targets(self, pooled: Tensor, rows: int, step: int, seen: Tensor | None) -> Tensor:
        """Teacher's pooled features [2 B, D] -> distributions [2, B, K]; seen [2 + V, B]: rows with 0 do not count."""
        logits = self.teacher["head"](pooled).unflatten(0, (2, rows))
        return self.targets(logits, self.center, step, None if seen is None else seen[:2])

    def patch_targets(self, patches: Tensor, ids: Tensor, weight: Tensor, step: int) -> Tensor:
        """Teacher's patches [2 B, N, D] -> distributions of the hidden ones [2 B, M, K]."""
        head = self.patch_head(self.teacher)
        if self.centering == "sinkhorn" or self.patch_center == "masked":
            return self.targets(head(pick(patches, ids), patch=True), self.center2, step, weight)
        # The last layer is linear: the sum of all patches' logits is the logits of the sum of their vectors.
        z = head.embed(patches)
        with full_precision(z):
            total = head.score(upcast(z).flatten(0, 1).sum(0, keepdim=True), patch=True)[0]
        self.center2.add(total, torch.full_like(total[0], z.shape[0] * z.shape[1]))
        return self.center2.targets(head.score(pick(z, ids), patch=True), self.pace.temp(step))

    def pooled_loss(self, pairs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies of all pairs of views, [2, 2 + V, B] -> scalar."""
        return other_views(pairs).mean()

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images, drop, focus = batch["images"], batch["drop"], batch.get("focus")
        views, (_, rows) = images["global"], images["global"].shape[:2]
        ids, weight = self.hidden(batch["mask"].flatten(0, 1), views.shape[-1])
        with torch.no_grad():
            t = self.encode(self.teacher, views, focus=focus)
            target = self.pooled_targets(self.pool(self.teacher, t, focus), rows, step, batch.get("seen"))
            target_patch = self.patch_targets(t.patches, ids, weight, step)
        hide = Replace(batch["mask"].flatten(0, 1))
        s = self.encode(self.student, views, hide, focus=focus, drop_path=drop["global"])
        pooled = [self.pool(self.student, s, focus)]
        if "local" in images:
            tokens = self.encode(self.student, images["local"], drop_path=drop["local"])
            pooled.append(self.pool(self.student, tokens, None))
        pooled = torch.cat(pooled)
        logits = self.student["head"](pooled).unflatten(0, (-1, rows))
        pooled_loss = self.pooled_loss(cross_view(target, logits, self.student_temp), batch)
        logits = self.patch_head(self.student)(pick(s.patches, ids), patch=True)
        each = cross_entropy(target_patch, logits, self.student_temp)  # [2 B, M]
        # Views without a hidden cell count as zero: that is part of the published balance of the two losses.
        patch_loss = ((each * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()
        loss = self.weights[0] * pooled_loss + self.weights[1] * patch_loss
        logs = {"pooled": pooled_loss.detach(), "patch": patch_loss.detach()} | distill.health(target, pooled_loss)
        if self.koleo:
            spread = self.spread(pooled, rows)
            loss, logs = loss + self.koleo * spread, logs | {"koleo": spread.detach()}
        return loss, {"loss": loss.detach()} | logs

    def hidden(self, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Hidden tokens, padded: bool [R, C] -> ids int64 [R, M], weight float [R, M] (0 = padding)."""
        ids, weight = slots(mask, self.masking.most)
        tokens = self.student["backbone"].to_tokens(ids, size)
        return tokens, weight.repeat_interleave(tokens.shape[1] // ids.shape[1], 1).to(self.center.center.dtype)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        rows = distill.view_pictures(self, batch)
        shown = rows["global 1"]
        grid = self.masking.grid
        mask = batch["mask"][0].unflatten(1, grid)[:, None].to(shown.dtype)
        mask = nn.functional.interpolate(mask, size=shown.shape[-2:])
        return {"global 1": shown, "hidden": shown * (1 - mask)} | rows


# --- building -----------------------------------------------------------------------------------------------------


def patch_heads(cfg: Any, dim: int) -> dict[str, nn.Module]:
    """One head for both levels, one with prototypes of their own for patches (iBOT), or two heads (DINOv2)."""
    o, patch = cfg.objective, cfg.objective.num_patch_prototypes or cfg.objective.num_prototypes
    if o.patch_head == "shared":
        if o.num_patch_prototypes not in (None, o.num_prototypes):
            raise ConfigError(
                f"objective.num_patch_prototypes={o.num_patch_prototypes} is not used by a shared head: leave it out, "
                "or use objective.patch_head=prototypes or separate"
            )
        return {"head": distill.prototype_head(cfg, dim)}
    if o.patch_head == "prototypes":
        return {"head": distill.prototype_head(cfg, dim, patch_prototypes=patch)}
    heads = {"head": distill.prototype_head(cfg, dim)}
    return heads | {"patch_head": distill.prototype_head(cfg, dim, num_prototypes=patch)}


def masking_of(cfg: Any, backbone: Backbone, start: int) -> Masking:
    """The masking that the config describes; BackboneError if the view has too few cells."""
    o, size = cfg.objective, cfg.views["global"].size
    grid = backbone.cells(size)
    need_cells(backbone, size, f"views.global.size={size}")
    return Masking(
        grid, cfg.batch_size, seed=cfg.seed, ratio=o.mask_ratio, share=o.mask_share, rule=o.masking,
        shape=o.mask_shape, start=start,
    )  # fmt: skip
