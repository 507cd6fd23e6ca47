"""Pixel decoders for convolutional families, one signature:

`decoder(tokens, ids_keep [B, K], ids_hidden [B, M]) -> [B, M, cell * cell * 3]`, each cell row by row, channel last.
`layers` names the stage maps wanted from the backbone, `mask_ratio` is the recipe's default, `keep(cells, ratio)` its
rule for the number of kept cells. All weights start at N(0, 0.02) truncated; the released FCMAE code sets some of
them to a standard deviation of 1 by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, Tokens, patchify, pick
from .fuse import StageFusion, enlarge, flat, visibility
from .global_batchnorm import GlobalBatchNorm2d


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(1, width, 1, 1) * 0.02)


def _fill(x: Tensor, seen: Tensor, token: Tensor) -> Tensor:
    """The mask token at hidden positions: x [B, c, h, w], seen float [B, 1, h, w], token [1, c, 1, 1]."""
    return torch.where(seen.bool(), x, token.to(x.dtype))


class BlockDecoder(nn.Module):
    """FCMAE's decoder (Woo et al. 2023, section 3.1): projection, mask token, dense V2 block(s), prediction.

    Only hidden cells are predicted, which is exact because the prediction is pointwise.
    """

    layers: tuple[int, ...] = (-1,)
    mask_ratio = 0.6

    def __init__(self, dim: int, cell: int, *, width: int = 512, depth: int = 1):
        super().__init__()
        self.proj = nn.Conv2d(dim, width, 1)
        self.mask_token = _token(width)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(depth)))
        self.pred = nn.Linear(width, cell * cell * 3)
        self.apply(_init)

    @staticmethod
    def keep(cells: int, ratio: float) -> int:
        """Kept cells as in the reference: int(49 * (1 - 0.6)) = 19."""
        return int(cells * (1 - ratio))

    def forward(self, tokens: Tokens, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """tokens.maps[0]: the last stage's dense map [B, D, h, w] -> [B, M, cell * cell * 3]."""
        x = self.proj(tokens.maps[0])
        x = self.blocks(_fill(x, visibility(ids_keep, x.shape[-2:]), self.mask_token))
        return self.pred(pick(flat(x), ids_hidden))


class Densify(nn.Module):
    """SparK's bridge from a sparse stage map to the decoder: LayerNorm, mask token at hidden sites, projection."""

    def __init__(self, width: int, out: int, deepest: bool):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.mask_token = _token(width)
        if deepest:
            self.proj = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        else:
            self.proj = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [B, c, h, w], seen [B, 1, h, w] -> [B, out, h, w], dense."""
        return self.proj(_fill(self.norm(x), seen, self.mask_token))


class UpBlock(nn.Module):
    """Twice the resolution, then two 3x3 convolutions with batch norm: [B, c, h, w] -> [B, out, 2h, 2w]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            GlobalBatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, out, 3, padding=1, bias=False),
            GlobalBatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up(x))


class UNetDecoder(nn.Module):
    """SparK's light U-Net (Tian et al. 2023, section 3.2): all stages, densified, added on the way up to pixels.

    widths and reductions: of the stages, fine to coarse; the coarsest reduction (a power of two) is the cell.
    BackboneError if `width` cannot be halved per up-sampling.
    """

    mask_ratio = 0.6

    def __init__(self, widths: Sequence[int], reductions: Sequence[int], *, width: int = 768):
        super().__init__()
        self.cell = reductions[-1]
        ups = int(math.log2(self.cell))
        if width % 2**ups:
            raise BackboneError(f"objective.decoder_dim={width} must be divisible by {2**ups}, halved per up-sampling")
        # The last stage of each resolution that an up-block follows; a stage at full resolution is left out.
        last = {reduction: stage for stage, reduction in enumerate(reductions)}
        self.layers = tuple(last[self.cell >> i] for i in range(ups) if self.cell >> i in last)
        channels = [width >> i for i in range(ups + 1)]
        self.densify = nn.ModuleList(
            Densify(widths[stage], channels[i], deepest=i == 0) for i, stage in enumerate(self.layers)
        )
        self.blocks = nn.ModuleList(UpBlock(channels[i], channels[i + 1]) for i in range(ups))
        self.proj = nn.Conv2d(channels[-1], 3, 1)
        self.apply(_init)

    @staticmethod
    def keep(cells: int, ratio: float) -> int:
        """Kept cells as in the reference: round(49 * (1 - 0.6)) = 20."""
        return round(cells * (1 - ratio))

    def forward(self, tokens: Tokens, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """tokens.maps: dense stage maps, coarse to fine -> [B, M, cell * cell * 3]."""
        seen = visibility(ids_keep, tokens.maps[0].shape[-2:])
        x = None
        for i, block in enumerate(self.blocks):
            if i < len(self.densify):
                skip = self.densify[i](tokens.maps[i], enlarge(seen, 2**i))
                x = skip if x is None else x + skip
            x = block(x)
        return pick(patchify(self.proj(x), self.cell), ids_hidden)


class FusedDecoder(nn.Module):
    """For backbones that run densely on painted images (SHViT): fuse all stages, V2 block(s), prediction.

    widths: stage widths, fine to coarse; stride: pixels of the finest; cell: pixels per hidden cell, a multiple of it.
    """

    mask_ratio = 0.6

    def __init__(self, widths: Sequence[int], stride: int, cell: int, *, width: int = 512, depth: int = 1):
        super().__init__()
        self.layers = tuple(range(len(widths)))
        self.stride, self.per = stride, cell // stride
        self.fuse = StageFusion(widths, width)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(depth)))
        self.pred = nn.Linear(width, stride * stride * 3)
        self.apply(_init)

    keep = staticmethod(BlockDecoder.keep)

    def forward(self, tokens: Tokens, ids_keep: Tensor, ids_hidden: Tensor) -> Tensor:
        """tokens.maps: dense stage maps, fine to coarse -> [B, M, cell * cell * 3]."""
        x = self.blocks(self.fuse(tokens.maps))
        # [B, c, rows, columns] -> cells of per x per positions [B, C, per * per * c]; predict the hidden ones only.
        cells = pick(patchify(x, self.per), ids_hidden).unflatten(-1, (self.per, self.per, x.shape[1]))
        pixels = self.pred(cells).unflatten(-1, (self.stride, self.stride, 3))
        return pixels.transpose(3, 4).flatten(2)


def build(kind: str, backbone: Backbone, image_size: int, *, width: int | None, depth: int | None) -> nn.Module:
    """The decoder `kind` (block, unet or fused) for this backbone; None takes the recipe's width and depth."""
    given = {key: value for key, value in (("width", width), ("depth", depth)) if value is not None}
    if kind == "block":
        return BlockDecoder(backbone.embed_dim, backbone.cell, **given)
    if kind == "unet":
        given.pop("depth", None)  # its depth follows from the stride
        return UNetDecoder(backbone.widths, backbone.reductions, **given)
    return FusedDecoder(backbone.widths, backbone.reductions[0], backbone.cell, **given)
