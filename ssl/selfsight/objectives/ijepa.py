"""I-JEPA: predicting features of hidden blocks (Assran et al., CVPR 2023, arXiv 2301.08243).

    loss = mean over blocks, their patches and dimensions of  smooth_l1( predictor(encoder(context), block), target )

A student encodes the visible context of an image, a teacher (its moving average) the whole image; a narrow predictor
says from the context what the teacher sees in each of four blocks. No colour augmentation, no pixels, no pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.tokens import Backbone, Drop, Needs, need_cells, pick
from ..nn.losses import upcast
from ..nn.predictor import Predictor
from ..training.pictures import pca_rgb
from ..training.schedules import Schedule, linear_then_constant
from ..training.teacher import Ema, make_teacher, set_mode
from ..views.blocks import Blocks
from ..views.masks import drop_table
from ..views.spec import Batch, Crop, Views
from .distill import sized_backbone
from .objective import Logs, Objective


class IJEPA(Objective):
    """student / teacher: {"backbone"}; predictor: from context tokens to the teacher's features of a block."""

    needs = Needs(hide=Drop, stride=16, class_token=False, pooled=False, init="jepa")
    pictures_show = "blocks"

    def __init__(
        self,
        student: nn.ModuleDict,
        predictor: Predictor,
        blocks: Blocks,
        momentum: Schedule,
        *,
        image_size: int = 224,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        flip: float = 0.0,
    ):
        super().__init__()
        self.student, self.predictor, self.blocks, self.momentum = student, predictor, blocks, momentum
        self.image_size, self.crop_scale, self.flip = image_size, tuple(crop_scale), flip
        student["backbone"].train_final_norm()
        self.teacher = make_teacher(student)
        self.ema = Ema(self.teacher, student)

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> IJEPA:
        backbone = jepa_backbone(cfg, cls.needs)
        return cls(
            nn.ModuleDict({"backbone": backbone}),
            *parts(cfg, backbone, total_steps, backbone.embed_dim),
            **settings(cfg),
        )

    def train(self, mode: bool = True) -> IJEPA:
        super().train(mode)
        set_mode(self.teacher, mode)
        return self

    def views(self) -> Views:
        crop = Crop("image", 1, self.image_size, self.crop_scale, interpolation="bilinear", flip_p=self.flip)
        return Views((crop,))

    def draw(self, batch: Batch, step: int) -> Batch:
        context, target = self.blocks(batch["key"], step)
        backbone: Backbone = self.student["backbone"]
        drop = drop_table(batch["key"], "image", 1, backbone.depth, backbone.drop_path_rate)
        return batch | {"context": context, "target": target, "drop": drop}

    def tokens(self, cells: Tensor) -> Tensor:
        """Ids of cells [B, *] to ids of the tokens inside them, [B, *]."""
        ids = self.student["backbone"].to_tokens(cells.flatten(1), self.image_size)
        return ids.unflatten(1, (*cells.shape[1:-1], -1))

    def seen_by_teacher(self, images: Tensor) -> Tensor:
        """The teacher's features of whole images, standardised over the channels: [B, N, D]."""
        patches = self.teacher["backbone"](images).patches
        return F.layer_norm(upcast(patches), patches.shape[-1:])

    def targets(self, features: Tensor, ids: Tensor, step: float = math.inf) -> Tensor:
        """What is to be predicted at tokens ids int64 [B, M]: [B, M, D]; features: of all tokens, [B, N, D]."""
        return pick(features, ids)

    def encode(self, images: Tensor, context: Tensor, drop: Tensor | None = None) -> Tensor:
        """The student's tokens of the context, cells int64 [B, K] -> [B, Kt, D]; drop: of its residual branches."""
        return self.student["backbone"](images, Drop(context), drop_path=drop).patches

    def predict(self, images: Tensor, batch: Batch) -> Tensor:
        """Features of the target blocks from the context: [B, m, Kt, D]."""
        patches = self.encode(images, batch["context"], batch.get("drop"))
        return self.predictor(patches, self.tokens(batch["context"]), self.tokens(batch["target"]))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images, ids = batch["images"]["image"][0], self.tokens(batch["target"])
        with torch.no_grad():
            features = self.seen_by_teacher(images)
            target = self.targets(features, ids.flatten(1), step)
        prediction = self.predict(images, batch)
        loss = F.smooth_l1_loss(upcast(prediction), target.unflatten(1, ids.shape[1:]))
        return loss, {"loss": loss.detach()} | self.health(features, target, ids.flatten(1), batch["context"].shape[1])

    def health(self, features: Tensor, target: Tensor, ids: Tensor, context: int) -> Logs:
        """Deviation of a target's dimensions over the batch (0: collapsed) and the number of cells in the context."""
        deviation = target.flatten(0, 1).std(0).mean()
        return {"target_std": deviation, "context": torch.full_like(deviation, context)}

    def after_step(self, step: int) -> None:
        self.ema.update_(self.momentum(step))

    def exports(self) -> dict[str, Backbone]:
        return {"teacher": self.teacher["backbone"], "student": self.student["backbone"]}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Context and outlined target blocks; principal components of the targets, and of what is predicted of them."""
        images, backbone = batch["images"]["image"][0], self.student["backbone"]
        features = self.seen_by_teacher(images)
        everything = torch.arange(features.shape[1], device=images.device).expand(len(images), -1)
        target = self.targets(features, everything)
        ids = self.tokens(batch["target"]).flatten(1)
        predicted = upcast(self.predict(images, batch | {"drop": None})).flatten(1, 2)
        index = ids[..., None].expand_as(predicted)
        mixed = target.scatter_reduce(1, index, predicted.to(target), "mean", include_self=False)
        grid, low, high = backbone.grid(self.image_size), images.amin(), images.amax()
        colours = pca_rgb(torch.cat([target, mixed]), grid, self.image_size).to(images)  # one PCA for both
        theirs, mine = torch.lerp(low, high, colours).chunk(2)

        def lit(ids: Tensor) -> Tensor:
            on = torch.zeros(target.shape[:2], device=images.device, dtype=images.dtype).scatter(1, ids, 1.0)
            return F.interpolate(on.unflatten(1, grid)[:, None], size=images.shape[-2:])

        context, asked = lit(self.tokens(batch["context"])), lit(ids)
        edge = torch.stack([outline(lit(self.tokens(block))) for block in batch["target"].unbind(1)]).amax(0)
        return {
            "image": images, "context": torch.lerp(low, images, context),
            "targets": torch.lerp(torch.lerp(low, images, asked), high, edge),
            "teacher": theirs, "predicted": torch.lerp(low, mine, asked),
        }  # fmt: skip


def outline(shape: Tensor) -> Tensor:
    """The outermost pixels of ones among zeros, [B, 1, H, W]: blocks that overlap stay apart."""
    return shape + F.max_pool2d(-F.pad(shape, (1, 1, 1, 1)), 3, 1)


# --- building ------------------------------------------------------------------------------------------------------


def jepa_backbone(cfg: Any, needs: Needs) -> Backbone:
    """The backbone, with enough cells for blocks; BackboneError names what would do."""
    if cfg.objective.init_depth_rescale:
        needs = needs._replace(init="jepa_rescaled")
    backbone = sized_backbone(cfg, needs, {"image_size": cfg.image_size})
    need_cells(backbone, cfg.image_size, f"image_size={cfg.image_size}")
    return backbone


def parts(cfg: Any, backbone: Backbone, total_steps: int, dim: int) -> tuple[Predictor, Blocks, Schedule]:
    """The predictor of features of this width, the blocks and the teacher's momentum that the config describes."""
    o = cfg.objective
    blocks = Blocks(
        backbone.cells(cfg.image_size), rule=o.masking, seed=cfg.seed, targets=o.targets, min_keep=o.min_keep,
        context_ratio=o.context_ratio, target_scale=o.target_scale, target_aspect=o.target_aspect,
        context_scale=o.context_scale, random_share=o.random_share,
    )  # fmt: skip
    predictor = Predictor.on(
        backbone, cfg.image_size, dim=dim, width=o.predictor_dim, depth=o.predictor_depth, heads=o.predictor_heads
    )
    return predictor, blocks, linear_then_constant(o.momentum, o.momentum_end, total_steps * cfg.optim.ipe_scale)


def settings(cfg: Any) -> dict[str, Any]:
    o = cfg.objective
    return {"image_size": cfg.image_size, "crop_scale": o.crop_scale, "flip": o.flip}
