"""GLARE: continual self-distillation for dense features (Ebouky et al., 2025, arXiv 2509.17816), meant for `adapt=`.

    loss = DINO's loss on the pooled features
         + H(teacher, student) of regions, each with what it sees of its own view
         + half of H of patches that only the student sees altered, and half of H of patches matched across the views

A region lies where the teacher's pooled token looks; where it and its patches lie in the other view follows from the
crops' boxes. No official code exists, and the inner details are not in the public text: docs/glare.md lists what is
derived.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, Needs, Replace, Tokens, need_cells, pick
from ..config import ConfigError, duration
from ..data.rng import fold, uniform
from ..nn.losses import cross_entropy, cross_view, global_mean, other_views
from ..nn.region_attention import CrossAttention, SampledAttention
from ..nn.targets import Center
from ..views import patches
from ..views.correspond import Match, correspond, regions, sample, scattered
from ..views.masks import random_mask, slots
from ..views.place import overlapping
from ..views.spec import Batch, Views
from . import distill
from .distill import Distillation, Pace
from .objective import Logs

OWN = ("patch_aug", "patch_ratio", "regions", "num_regions", "random_regions", "points", "weights")


class GLARE(Distillation):
    """student / teacher: {"backbone", "head", "ca"}: one head for all three levels, the attention of regions.

    window: side of a region, patches. points: patches matched across the views, a square number. head_warmup: steps in
    which a head that starts at random learns alone, so that its first gradients do not spoil the backbone.
    """

    needs = Needs(stride=16)

    def __init__(
        self,
        student: nn.ModuleDict,
        views: Views,
        pace: Pace,
        *,
        patch_aug: str = "blur",
        patch_ratio: float = 0.3,
        regions: str = "attention",
        num_regions: int = 8,
        random_regions: float = 0.25,
        window: int = 3,
        points: int = 64,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        head_warmup: int = 0,
        **kwargs: Any,
    ):
        super().__init__(student, views, pace, **kwargs)
        self.patch_aug, self.patch_ratio, self.window = patch_aug, patch_ratio, window
        self.regions, self.num_regions, self.head_warmup = regions, num_regions, head_warmup
        self.at_random = round(random_regions * num_regions) if regions == "attention" else 0
        self.points, self.weights = math.isqrt(points), tuple(weights)
        prototypes = student["head"].num_prototypes
        self.center, self.region_center, self.local_center = (Center(prototypes) for _ in range(3))

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> GLARE:
        o = cfg.objective
        kwargs, pace = distill.settings(cfg, *OWN), Pace.of(cfg, total_steps, steps_per_epoch)
        needs = cls.needs._replace(hide=Replace if o.patch_aug == "mask" else None)
        backbone = distill.multicrop_backbone(cfg, needs)
        window = window_of(cfg, backbone)
        ca = SampledAttention(backbone.embed_dim, backbone.num_heads or 1) if o.region_attention == "srs" else None
        student = {
            "backbone": backbone,
            "head": distill.prototype_head(cfg, backbone.embed_dim),
            "ca": ca or CrossAttention(backbone.embed_dim),
        }
        warmup = duration(o.head_warmup).steps(total_steps, steps_per_epoch)
        views = distill.multicrop(cfg, overlapping)
        return cls(nn.ModuleDict(student), views, pace, window=window, head_warmup=warmup, **kwargs)

    @property
    def backbone(self) -> Backbone:
        return self.student["backbone"]

    @property
    def attends(self) -> bool:
        """Whether regions follow the attention of the teacher's pooled token."""
        return self.backbone.can_attend and self.regions == "attention" and self.at_random < self.num_regions

    def compared(self) -> dict[str, str]:
        return super().compared() | {"means over regions and matched patches": "global"}

    # --- what is drawn ---

    def draw(self, batch: Batch, step: int) -> Batch:
        """Adds what the student sees of the global views, which of its patches are altered, bool [2 B, N], where every
        patch of a view lies in the other one (`across`), and draws for regions and points."""
        batch = super().draw(batch, step)
        key, views, boxes = batch["key"], batch["images"]["global"], batch["boxes"]["global"]
        size = views.shape[-1]
        grid = self.backbone.grid(size)
        across = correspond(boxes, boxes.flip(0), grid)
        keys = [fold(key, f"patches/{v}") for v in range(2)]
        draws = torch.cat([uniform(k, "regions", max(1, self.at_random) * math.prod(grid)) for k in keys])
        points = torch.cat([uniform(k, "points", 2 * self.points**2) for k in keys])
        return batch | self.altered(batch, keys) | {
            "across": Match(across.at.flatten(0, 1), across.valid.flatten(0, 1)),
            "region_draws": draws.unflatten(1, (-1, math.prod(grid)))[:, : self.at_random],
            "points": scattered(points, grid, self.points),
        }  # fmt: skip

    def altered(self, batch: Batch, keys: list[Tensor]) -> dict[str, Any]:
        """The student's global views: exactly `patch_ratio` of the patches of each altered (or hidden: `hide`)."""
        views, backbone = batch["images"]["global"], self.backbone
        grid = backbone.grid(views.shape[-1])
        hides = self.patch_aug == "mask"
        cells = backbone.cells(views.shape[-1]) if hides else grid
        count = torch.full_like(batch["key"], self.number(math.prod(cells)))
        mask = torch.stack([random_mask(k, math.prod(cells), count, "altered") for k in keys])  # [2, B, C]
        if not hides:
            where = mask.unflatten(2, cells), batch["key"], backbone.stride
            seen = patches.alter(self.patch_aug, views, *where, batch["mean"], batch["std"])
            return {"altered": seen, "hide": None, "mask": mask.flatten(0, 1)}
        mask = mask.flatten(0, 1)
        ids = backbone.to_tokens(slots(mask, self.number(math.prod(cells)))[0], views.shape[-1])
        tokens = mask.new_zeros(len(mask), math.prod(grid)).scatter(1, ids, True)
        return {"altered": views, "hide": mask, "mask": tokens}

    def number(self, cells: int) -> int:
        """Of the cells of a view that are altered, a constant."""
        return max(1, round(self.patch_ratio * cells))

    # --- the loss ---

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images, drop, rows = batch["images"], batch["drop"], batch["images"]["global"].shape[1]
        grid, hide = self.backbone.grid(images["global"].shape[-1]), batch["hide"]
        with torch.no_grad():
            t = self.encode(self.teacher, images["global"], attention=self.attends)
            target = self.teacher["head"](t.pooled).unflatten(0, (2, rows))
            target = self.targets(target, self.center, step)
        hide = None if hide is None else Replace(hide)
        s = self.encode(self.student, batch["altered"], hide, drop_path=drop["global"])
        pooled = [s.pooled]
        if "local" in images:
            pooled.append(self.encode(self.student, images["local"], drop_path=drop["local"]).pooled)
        pooled = torch.cat(pooled)
        logits = self.student["head"](pooled).unflatten(0, (-1, rows))
        image = other_views(cross_view(target, logits, self.student_temp)).mean()
        regional = self.regional(t, s, batch, grid, step)
        altered, matched = self.local(t, s, batch, grid, step)
        w = self.weights
        loss = w[0] * image + w[1] * regional + w[2] * 0.5 * (altered + matched)
        parts = {"pooled": image, "regional": regional, "altered": altered, "matched": matched}
        logs = {name: part.detach() for name, part in parts.items()} | distill.health(target, image)
        logs["shared"] = batch["across"].valid.to(loss.dtype).mean()  # share of the patches that both views show
        if self.koleo:
            spread = self.spread(pooled, rows)
            loss, logs = loss + self.koleo * spread, logs | {"koleo": spread.detach()}
        return loss, {"loss": loss.detach()} | logs

    def regional(self, t: Tokens, s: Tokens, batch: Batch, grid: tuple[int, int], step: int) -> Tensor:
        """Regions of each view, seen by the student there and by the teacher in the other view."""
        with torch.no_grad():
            member, weight = self.choose(t, batch, grid)
            share = member.to(t.patches.dtype)
            share = share / share.sum(2, keepdim=True).clamp(min=1)
            other = self.teacher["ca"].normed(self.swap(t.patches))
            theirs = share @ sample(other, batch["across"], grid).to(share.dtype)
            target = self.region_targets(other, theirs, weight, step)
        own = self.student["ca"].normed(s.patches)
        return self.region_loss(own, share @ own, target, weight)

    def region_targets(self, tokens: Tensor, means: Tensor, weight: Tensor, step: int) -> Tensor:
        """Teacher's patches [R, N, D] and means over its regions [R, M, D] -> distributions [R, M, K]."""
        return self.targets(self.teacher["head"](self.teacher["ca"](tokens, means)), self.region_center, step, weight)

    def region_loss(self, tokens: Tensor, means: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Student's patches and means over its regions; mean over the regions with weight, of all processes."""
        logits = self.student["head"](self.student["ca"](tokens, means))
        return global_mean(cross_entropy(target, logits, self.student_temp).flatten(), weight.flatten())

    def choose(self, t: Tokens, batch: Batch, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Regions of the global views, of patches that both views show: bool [2 B, M, N], weight [2 B, M]."""
        valid, draws = batch["across"].valid, batch["region_draws"]
        if self.regions == "grid":
            scores = lattice(grid, self.num_regions, t.patches).expand(len(valid), -1, -1)
        else:
            scores = look(t)
        return regions(scores, valid, grid, self.num_regions, self.window, draws)

    def local(self, t: Tokens, s: Tokens, batch: Batch, grid: tuple[int, int], step: int) -> tuple[Tensor, Tensor]:
        """Patches that the student sees altered, at their place; scattered patches, in the other view."""
        unit = (self.backbone.cell // self.backbone.stride) ** 2 if self.patch_aug == "mask" else 1
        ids, weight = slots(batch["mask"], unit * self.number(batch["mask"].shape[1] // unit))
        points, across = batch["points"], batch["across"]
        with torch.no_grad():
            there = Match(pick(across.at, points), across.valid.gather(1, points))
            theirs = torch.cat([pick(t.patches, ids), sample(self.swap(t.patches), there, grid).to(t.patches.dtype)], 1)
            both = torch.cat([weight, there.valid.to(weight.dtype)], 1)  # float32: counts that half precision rounds
            target = self.targets(self.teacher["head"](theirs), self.local_center, step, both)
        mine = torch.cat([pick(s.patches, ids), pick(s.patches, points)], 1)
        each = cross_entropy(target, self.student["head"](mine), self.student_temp)
        cut = [ids.shape[1], points.shape[1]]
        (altered, matched), (first, second) = each.split(cut, 1), both.split(cut, 1)
        return altered_mean(altered, first), global_mean(matched.flatten(), second.flatten())

    @staticmethod
    def swap(x: Tensor) -> Tensor:
        """Rows of both global views [2 B, ...] -> those of the other view."""
        return x.unflatten(0, (2, -1)).flip(0).flatten(0, 1)

    # --- the step ---

    def after_backward(self, step: int) -> None:
        super().after_backward(step)
        if step < self.head_warmup:
            for name in ("backbone", "ca"):
                self.student[name].zero_grad(set_to_none=True)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Both views, the first as the student sees it, and regions of it (lit) with where they lie in the second."""
        views, seen = batch["images"]["global"], batch["altered"]
        grid, rows = self.backbone.grid(views.shape[-1]), views.shape[1]
        t = self.encode(self.teacher, views, attention=self.attends)
        member, _ = self.choose(t, batch, grid)
        at = batch["across"].at
        if batch["hide"] is not None:
            hidden = patches.pixels(batch["mask"].unflatten(1, grid)[:rows], self.backbone.stride, views.shape[-1])
            seen = seen[:1] * ~hidden
        shown = {"global 1": views[0], "global 2": views[1], "student's 1": seen[0]}
        for r in range(min(3, self.num_regions)):
            own = member[:rows, r].to(views.dtype)
            shown[f"region {r + 1}"] = lit(views[0], own.unflatten(1, grid)[:, None])
            shown[f"region {r + 1} in 2"] = lit(views[1], splat(own, at[:rows], grid))
        return shown


def window_of(cfg: Any, backbone: Backbone) -> int:
    """Side of a region in patches; BackboneError or ConfigError where views or options do not fit the backbone."""
    o, size = cfg.objective, cfg.views["global"].size
    if o.patch_aug == "mask":
        need_cells(backbone, size, f"views.global.size={size}")
    if size % backbone.stride:
        low = size // backbone.stride * backbone.stride
        raise BackboneError(
            f"views.global.size={size} is not a multiple of the {backbone.stride} px of a patch of "
            f"{backbone.architecture}, so patches of two views do not match; use {low} or {low + backbone.stride}"
        )
    if math.isqrt(o.points) ** 2 != o.points:
        raise ConfigError(
            f"objective.points={o.points} is not a square number: patches are drawn from as many equal parts of "
            "the view; use 16, 25, 36, 49 or 64"
        )
    rows, columns = backbone.grid(size)
    window = min(3, -(-min(rows, columns) // 5)) if o.window is None else o.window
    if window > min(rows, columns):
        raise ConfigError(f"objective.window={window} is wider than the grid of {rows} x {columns} patches")
    return window


def look(t: Tokens) -> Tensor:
    """Where the pooled token looks, [R, heads, N]; without attention: how alike each patch is to it (one head)."""
    if t.attention is not None:
        return t.attention
    return F.cosine_similarity(t.patches, t.pooled[:, None], dim=-1)[:, None]


def lattice(grid: tuple[int, int], count: int, like: Tensor) -> Tensor:
    """Scores [1, count, N] whose maxima are spread over a grid, one for each region: rows of (nearly) as many each."""
    rows = round(count**0.5)
    lengths = [count * (r + 1) // rows - count * r // rows for r in range(rows)]
    places = [((r + 0.5) / rows, (i + 0.5) / n) for r, n in enumerate(lengths) for i in range(n)]
    at = torch.tensor(places, device=like.device) * torch.tensor(grid, device=like.device)
    y, x = torch.meshgrid(*(torch.arange(n, device=like.device) + 0.5 for n in grid), indexing="ij")
    far = (torch.stack([y, x], -1).flatten(0, 1) - at[:, None]).square().sum(-1)  # [count, N]
    return -far[None]


def altered_mean(each: Tensor, weight: Tensor) -> Tensor:
    """Mean over a view's patches with weight, then over views; [R, M] twice."""
    return ((each * weight).sum(1) / weight.sum(1).clamp(min=1)).mean()


def lit(view: Tensor, mask: Tensor) -> Tensor:
    """A view [B, 3, s, s], dark but where the mask [B, 1, h, w] is."""
    mask = F.interpolate(mask, size=view.shape[-2:]).clamp(0, 1)
    return torch.lerp(view.amin((1, 2, 3), keepdim=True), view, 0.2 + 0.8 * mask)


def splat(member: Tensor, at: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [B, N] to where they lie in the other view, [B, 1, h, w]: the nearest patch of each."""
    size = torch.tensor([grid[1], grid[0]], device=at.device)
    cell = ((at + 1) / 2 * size).long().clamp(min=0).minimum(size - 1)
    ids = cell[..., 1] * grid[1] + cell[..., 0]
    return torch.zeros_like(member).scatter_reduce(1, ids, member, "amax").unflatten(1, grid)[:, None]
