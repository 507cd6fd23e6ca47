"""timm's ConvNeXt V1 and V2: sparse convolution emulated by masking (SparK, FCMAE), or a mask token after the stem.

SparK: Tian et al., ICLR 2023 (arXiv 2301.03580). FCMAE and GRN: Woo et al., CVPR 2023 (arXiv 2301.00808).
Everything after a block's 7x7 convolution is pointwise and every down-sampling is non-overlapping, so multiplying by
the visibility map after the stem, each down-sampling and each block is exactly a submanifold sparse convolution.
(Dilated stages, timm's output_stride, do look at neighbours when they change stage; those are zero where hidden.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import timm
import torch
from timm.layers import DropPath, GlobalResponseNormMlp, Mlp
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ..nn.fuse import StageFusion, enlarge, flat, focus_weight, pooled_mean, stages_for, visibility
from .adapters import Taps, added, added_map
from .tokens import Backbone, BackboneError, Drop, Needs, Replace, Tokens, pick


def respond(grn: GlobalResponseNorm, x: Tensor, visible: Tensor | None) -> Tensor:
    """Global response normalisation (ConvNeXt V2, eq. 1-3) with the norm over each image's *visible* sites.

    x: [B, h, w, C] or [B, C, h, w], visible broadcastable to it. The released sparse code takes the norm over the
    whole batch; per image is what the paper, fine-tuning and timm do.
    """
    seen = x if visible is None else x * visible
    wide = torch.promote_types(x.dtype, torch.float32)
    # vector_norm has a zero gradient at all-zero channels, where sqrt(sum of squares) would give NaN.
    norm = torch.linalg.vector_norm(seen, dim=grn.spatial_dim, keepdim=True, dtype=wide)
    relative = (norm / (norm.mean(dim=grn.channel_dim, keepdim=True) + grn.eps)).to(x.dtype)
    return x + torch.addcmul(grn.bias.view(grn.wb_shape), grn.weight.view(grn.wb_shape), x * relative)


def run_block(
    block: ConvNeXtBlock,
    x: Tensor,
    visible: Tensor | None = None,
    drop: Tensor | None = None,
    adapt: nn.ModuleDict | None = None,
) -> Tensor:
    """One block, x [B, C, h, w], zero at hidden sites before and after.

    visible: float [B, 1, h, w], 1 = visible, None = all. drop: [B] factor of the residual branch. adapt: adapters by
    tap: parallel_mlp reads what the MLP's norm reads, after_attn (there is none) the stream after the block.
    """
    y, seen, add = block.conv_dw(x), visible, added_map
    mixed = y
    if not block.use_conv_mlp:
        y, add = y.permute(0, 2, 3, 1), added
        seen = None if visible is None else visible.permute(0, 2, 3, 1)
    mlp, y = block.mlp, block.norm(y)
    y = mlp.act(add(mlp.fc1(y), adapt, "fc1", y))
    if isinstance(mlp, GlobalResponseNormMlp):
        y = respond(mlp.grn, y, seen)
    y = add(mlp.fc2(y), adapt, "fc2", y)
    if not block.use_conv_mlp:
        y = y.permute(0, 3, 1, 2)
    if block.gamma is not None:
        y = y * block.gamma.view(1, -1, 1, 1)
    if drop is not None:
        y = y * drop.view(-1, 1, 1, 1).to(y.dtype)
    y = added_map(y, adapt, "parallel_mlp", mixed)
    x = x + (y if visible is None else y * visible)
    if adapt is None:
        return x
    x = added_map(x, adapt, "after_attn", x)  # its biases speak at hidden sites, too
    return x if visible is None else x * visible


class AdaptedBlock(ConvNeXtBlock):
    """timm's block with bottleneck adapters in it, for models that leave this package."""

    adapter: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        drop = None
        if self.training and isinstance(self.drop_path, DropPath):
            drop = self.drop_path(x.new_ones(len(x), 1, 1, 1)).view(-1)
        return run_block(self, x, drop=drop, adapt=self.adapter)


class ConvNeXt(Backbone):
    """A timm ConvNeXt (V1 or V2). cell = total stride; maskable sizes are its multiples.

    The total stride is 32 px with a stem (patch_size) of 4 or 2, since timm adds a down-sampling after a stem of 2, and
    8 px with a stem of 1. For small images output_stride=16 or 8 gives finer cells at a fraction of the cost of that.

    pooled: timm's own head without the classifier (mean over visible positions, then head.norm). patches: head.norm
    of the last map's positions; where `needs.stride` is finer than that, the fused stages instead (their LayerNorm in
    place of head.norm). maps under Drop are dense and zero at hidden sites. depth = blocks; a block has one residual
    branch, so row 2i of a drop-path table belongs to block i and row 2i + 1 is not used.
    """

    adapted_block = AdaptedBlock

    def __init__(
        self, architecture: str, *, needs: Needs, image_sizes: Sequence[int], drop_path: float = 0.0, **model_args
    ):
        super().__init__()
        self.architecture, self.model_args = architecture, model_args
        self.timm = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
        self._refuse_other_kinds(needs)
        responsive = isinstance(self.timm.stages[0].blocks[0].mlp, GlobalResponseNormMlp)
        self.family = "convnextv2" if responsive else "convnext"
        self.widths = tuple(info["num_chs"] for info in self.timm.feature_info)
        self.reductions = tuple(info["reduction"] for info in self.timm.feature_info)
        self.embed_dim, self.depth = self.timm.num_features, sum(len(stage.blocks) for stage in self.timm.stages)
        self.cell, self.drop_path_rate, self.block_fn = self.reductions[-1], drop_path, run_block
        self.fused, self.fuse = plan_fusion(self, needs)
        self.stride = self.reductions[self.fused[0]] if self.fused else self.cell
        self._check_sizes(image_sizes, needs)
        self.mask_token = nn.Parameter(torch.zeros(1, self.widths[0], 1, 1)) if needs.hide is Replace else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def _refuse_other_kinds(self, needs: Needs) -> None:
        model, works = self.timm, "convnext_atto|tiny|small|base|large and convnextv2_atto|nano|tiny|base|large work"
        blocks = [b for stage in model.stages for b in stage.blocks] if isinstance(model, TimmConvNeXt) else []
        if not blocks or any(
            type(b) is not ConvNeXtBlock
            or type(b.mlp) not in (Mlp, GlobalResponseNormMlp)
            or not isinstance(b.shortcut, nn.Identity)
            or not isinstance(getattr(b.mlp, "norm", nn.Identity()), nn.Identity)
            or b.mlp.drop1.p
            for b in blocks
        ):
            raise BackboneError(f"{self.architecture} is not made of timm's plain ConvNeXt blocks; {works}")
        overlap = any(m.kernel_size != m.stride for m in model.stem.modules() if isinstance(m, nn.Conv2d))
        if needs.hide is not None and overlap:
            raise BackboneError(
                f"{self.architecture} has an overlapping stem, where hidden pixels leak into visible cells; {works}"
            )
        if needs.attention:
            raise BackboneError(
                f"{self.architecture} has no attention map; that comes with the class-attention read-out, use a ViT"
            )

    def _check_sizes(self, sizes: Sequence[int], needs: Needs) -> None:
        for size in sizes:
            near = max(1, round(size / self.cell)) * self.cell
            if size < self.cell or (needs.hide is not None and size % self.cell):
                why = "is not a multiple of" if size >= self.cell else "is smaller than"
                raise BackboneError(
                    f"image size {size} {why} the {self.cell} px that {self.architecture} shrinks to one position; "
                    f"use {near} or a smaller backbone.patch_size"
                )

    def grid(self, size: int) -> tuple[int, int]:
        return size // self.stride, size // self.stride  # every down-sampling drops the remainder

    def to_visible(self, hide: Drop | Replace | None, size: int) -> list[Tensor | None]:
        """Visibility maps, float [B, 1, h, w] per stage, fine to coarse; None where nothing is dropped."""
        if not isinstance(hide, Drop):
            return [None] * len(self.reductions)
        cells = visibility(hide.ids, self.cells(size))
        return [enlarge(cells, self.cell // reduction) for reduction in self.reductions]

    def embed(self, images: Tensor, hide: Drop | Replace | None, visible: Tensor | None) -> Tensor:
        """Stem outputs [B, c, h, w]: zero at dropped sites, the mask token at replaced ones."""
        x = self.timm.stem(images)
        if isinstance(hide, Replace):
            if self.mask_token is None:
                raise BackboneError(f"{self.architecture} was built without a mask token; pass Needs(hide=Replace)")
            mask = enlarge(hide.mask.unflatten(1, self.cells(images.shape[-1]))[:, None], self.cell // self.stem_stride)
            return torch.where(mask, self.mask_token.to(x.dtype), x)
        return x if visible is None else x * enlarge(visible, self.reductions[0] // self.stem_stride).to(x.dtype)

    @property
    def stem_stride(self) -> int:
        """Pixels per stem output; a stem of 2 is followed by a down-sampling inside the first stage."""
        down = self.timm.stages[0].downsample
        return self.reductions[0] // (1 if isinstance(down, nn.Identity) else down[1].stride[0])

    def stages(self, x: Tensor, visible: list[Tensor | None], drop_path: Tensor | None) -> list[Tensor]:
        """The walker: stem outputs to the maps of all stages, [B, c, h, w] each, zero at hidden sites."""
        maps, i = [], 0
        for stage, seen in zip(self.timm.stages, visible):
            seen = None if seen is None else seen.to(x.dtype)
            if not isinstance(stage.downsample, nn.Identity):
                x = stage.downsample(x)
                x = x if seen is None else x * seen
            for block in stage.blocks:
                drop = None if drop_path is None else drop_path[2 * i]
                x = self.block_fn(block, x, seen, drop, self.beside(i))
                i += 1
            maps.append(x)
        return maps

    def forward(
        self,
        images: Tensor,
        hide: Drop | Replace | None = None,
        *,
        focus: Tensor | None = None,
        drop_path: Tensor | None = None,
        layers: tuple[int, ...] = (),
        norm: bool = True,
        attention: bool = False,
    ) -> Tokens:
        if attention:
            raise BackboneError(f"{self.architecture} has no attention map; use a ViT")
        size = images.shape[-1]
        visible = self.to_visible(hide, size)
        maps = self.stages(self.embed(images, hide, visible[0]), visible, drop_path)
        last = self.timm.norm_pre(maps[-1])
        weight = visible[-1]
        if focus is not None:
            looked = focus_weight(focus, self.grid(size), last.shape[-2:])
            weight = looked if weight is None else looked * weight
        pooled = self.timm.forward_head(pooled_mean(last, weight)[..., None, None], pre_logits=True)
        if self.fuse is not None:
            patches = self.fuse([maps[i] for i in self.fused], norm)
        else:
            patches = self.timm.head.norm(last) if norm and hasattr(self.timm.head, "norm") else last
        patches = flat(patches)
        if isinstance(hide, Drop):
            patches = pick(patches, self.to_tokens(hide.ids, size))
        return self.read_out(Tokens(pooled, patches, pooled[:, None], tuple(maps[i] for i in layers)), focus)

    def final_norm(self) -> nn.Module | None:
        return self.fuse.norm if self.fuse is not None else getattr(self.timm.head, "norm", None)

    @staticmethod
    def taps(block: ConvNeXtBlock) -> Taps:
        return Taps(block.conv_dw.out_channels, {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2}, (), ("fc1", "fc2"))

    def freeze_pooled(self) -> None:
        self.timm.head.norm.requires_grad_(False)

    @torch.no_grad()
    def check(self) -> None:
        """Compare with timm's own forward, nothing hidden; BackboneError if they differ by more than 1e-4."""
        training = self.training
        self.eval()
        images = waves(1, 3, 2 * self.cell, like=next(self.timm.parameters()))
        features = self.timm.forward_features(images)
        mine = self(images, layers=(-1,))
        agree(self, self.timm.norm_pre(mine.maps[0]), features)
        agree(self, mine.pooled, self.timm.forward_head(features, pre_logits=True))
        for stage in self.timm.stages:
            agree_blocks(self, stage.blocks[0], lambda block, x: run_block(block, x, torch.ones_like(x[:, :1])))
        self.train(training)


def plan_fusion(backbone: Backbone, needs: Needs) -> tuple[tuple[int, ...], StageFusion | None]:
    """Which stages to fuse for the stride asked for, and the module that does; BackboneError if none is fine enough."""
    try:
        fused = stages_for(backbone.reductions, needs.stride)
    except ValueError as error:
        raise BackboneError(f"{backbone.architecture} cannot give these tokens: {error}") from None
    return fused, StageFusion([backbone.widths[i] for i in fused], backbone.embed_dim) if fused else None


def waves(batch: int, channels: int, side: int, like: Tensor) -> Tensor:
    """A fixed, structured test input [batch, channels, side, side] that draws nothing from the global generator."""
    x = torch.linspace(0, 97, batch * channels * side * side, dtype=torch.float64).sin()
    return x.view(batch, channels, side, side).to(like)


def agree(backbone: Backbone, mine: Tensor, theirs: Tensor) -> None:
    """BackboneError if the walker's numbers differ from timm's by more than 1e-4 of the largest."""
    error = ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()
    if not error < 1e-4:
        raise BackboneError(
            f"{backbone.architecture}: our forward differs from timm's by {error:.1e}; timm {timm.__version__} is not "
            "supported for this family, use backbone=timm for methods that hide nothing"
        )


def agree_blocks(backbone: Backbone, block: nn.Module, walk: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Compare one block's walker with timm's forward on a copy whose gains are not at their near-zero start values.

    Fresh residual branches are scaled by about 0, which would hide any mistake inside them.
    """
    block = copy.deepcopy(block)
    for parameter in block.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    width = next(p.shape[0] for p in block.parameters() if p.ndim == 4)
    x = waves(1, width, 4, like=next(block.parameters()))
    agree(backbone, walk(block, x), block(x))
