"""Masked Autoencoders (He et al., CVPR 2022, arXiv 2111.06377) on any family that can hide cells.

    loss = mean over hidden cells of | decoder(encoder(visible cells)) - pixels |^2

A large random share of cells is hidden, the backbone encodes what is visible, a light decoder regresses the
(per-cell standardised) pixels of what is not. On ConvNeXt this is FCMAE (V2) or SparK (V1), on SHViT a SimMIM-like
dense variant of ours; the difference is which decoder stands behind the same signature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import backbone_args, build_backbone
from ..backbones.tokens import Backbone, BackboneError, Drop, Needs, need_cells, patchify, pick, unpatchify
from ..nn.decoders import build_decoder
from ..nn.losses import standardise, upcast
from ..views.masks import random_split
from ..views.spec import Batch, Crop, Views
from .objective import Logs, Objective


class MAE(Objective):
    """student: the backbone; decoder: `nn.decoders`; cells: maskable cells of an image; keep: visible ones."""

    needs = Needs(hide=Drop, pooled=False, init="mae")
    pictures_show = "reconstruction"

    def __init__(
        self,
        backbone: Backbone,
        decoder: nn.Module,
        *,
        image_size: int = 224,
        mask_ratio: float | None = None,
        norm_pixels: bool = True,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
    ):
        super().__init__()
        self.student, self.decoder, self.norm_pixels = backbone, decoder, norm_pixels
        self.image_size, self.crop_scale, self.flip = image_size, tuple(crop_scale), flip
        self.cells = math.prod(backbone.cells(image_size))
        self.mask_ratio = decoder.mask_ratio if mask_ratio is None else mask_ratio
        self.keep = decoder.keep(self.cells, self.mask_ratio)
        need_cells(backbone, image_size, f"image size {image_size}")
        if not 0 < self.keep < self.cells:
            raise BackboneError(
                f"objective.mask_ratio={self.mask_ratio} keeps {self.keep} of {self.cells} cells; "
                "choose a ratio that keeps at least one and hides at least one"
            )

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> MAE:
        o, size = cfg.objective, cfg.image_size
        backbone = build_backbone(needs=cls.needs, image_sizes=(size,), adapt=cfg.adapt, **backbone_args(cfg.backbone))
        if o.mask_unit not in (None, backbone.cell):
            raise BackboneError(
                f"objective.mask_unit={o.mask_unit} is not the {backbone.cell} px that {cfg.backbone.name} can hide; "
                f"leave it out, or change backbone.patch_size"
            )
        decoder = build_decoder(
            backbone, o.decoder, size, width=o.decoder_dim, depth=o.decoder_depth, heads=o.decoder_heads
        )
        return cls(
            backbone, decoder, image_size=size, mask_ratio=o.mask_ratio, norm_pixels=o.norm_pixels,
            crop_scale=o.crop_scale, flip=o.flip,
        )  # fmt: skip

    def views(self) -> Views:
        return Views((Crop("image", 1, self.image_size, self.crop_scale, flip_p=self.flip),))

    def draw(self, batch: Batch, step: int) -> Batch:
        keep, hidden = random_split(batch["key"], self.cells, self.keep)
        return batch | {"keep": keep, "hidden": hidden}

    def predict(self, images: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """Predicted (standardised) pixels of the hidden cells, [B, M, cell * cell * 3]."""
        tokens = self.student(images, Drop(keep), layers=self.decoder.layers)
        return self.decoder(tokens, keep, hidden)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        images = batch["images"]["image"][0]
        target = pick(patchify(images, self.student.cell), batch["hidden"])
        if self.norm_pixels:
            target = standardise(target)
        pred = self.predict(images, batch["keep"], batch["hidden"])
        loss = (upcast(pred) - target).square().mean()  # the count is constant, so this is the mean over hidden cells
        return loss, {"loss": loss.detach()}

    def exports(self) -> dict[str, Backbone]:
        return {"student": self.student}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Rows of original, masked and reconstructed images (normalised units; the caller de-normalises)."""
        images = batch["images"]["image"][0]
        cell, patches = self.student.cell, patchify(images, self.student.cell)
        hidden = batch["hidden"]
        pred = self.predict(images, batch["keep"], hidden)
        pred = upcast(pred)
        if self.norm_pixels:  # predictions are in each cell's own units: undo with the true cell's statistics
            true = upcast(pick(patches, hidden))
            variance, mean = torch.var_mean(true, dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        index = hidden[..., None].expand_as(pred)
        masked = patches.scatter(1, index, torch.zeros_like(pred, dtype=patches.dtype))
        filled = patches.scatter(1, index, pred.to(patches.dtype))
        return {"original": images, "masked": unpatchify(masked, cell), "reconstructed": unpatchify(filled, cell)}
