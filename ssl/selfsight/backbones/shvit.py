"""timm's SHViT (Yun & Ro, CVPR 2024, arXiv 2401.16456): hidden before the overlapping stem, then run densely.

A stem token sees its own 16 px and the 15 px before them, so masking its output would leak: hidden pixels are painted
with the channel mean first, and hidden stem outputs become a learned token plus fixed sin-cos positions. No masked
pretraining recipe was published for this family; this one follows SimMIM and A2MIM.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.models.shvit import FFN, SHSA, BasicBlock, Conv2dNorm
from timm.models.shvit import SHViT as TimmSHViT
from torch import Tensor, nn

from ..nn.fuse import enlarge, flat, focus_weight, pooled_mean, visibility
from ..nn.global_batchnorm import to_global
from ..nn.positions import sincos_2d
from .adapters import Taps, added_map
from .convnext import agree, agree_blocks, plan_fusion, waves
from .tokens import Backbone, BackboneError, Drop, Needs, Replace, Tokens, pick

CELL, STEM, TOTAL = 32, 16, 64  # pixels per maskable cell, stem output, and position of the last stage


def run_block(block: BasicBlock, x: Tensor, drop: Tensor | None = None, adapt: nn.ModuleDict | None = None) -> Tensor:
    """Depthwise convolution, single-head attention (not in every stage), FFN; x [B, C, h, w].

    drop: [2, B] factors of the residual branches: spatial ones (convolution, attention), FFN. adapt: adapters by tap;
    after_attn is after the FFN where there is no attention.
    """
    attends = not isinstance(block.mixer, nn.Identity)
    for part, row in ((block.conv, 0), (block.mixer, 0), (block.ffn, 1)):
        if part is block.mixer and not attends:
            continue
        y, before = branch(part, x, adapt), x
        x = x + (y if drop is None else y * drop[row].view(-1, 1, 1, 1).to(y.dtype))
        if part is block.ffn:
            x = added_map(x, adapt, "parallel_mlp", before)
        if part is (block.mixer if attends else block.ffn):
            x = added_map(x, adapt, "after_attn", x)
    return x


def branch(part: nn.Module, x: Tensor, adapt: nn.ModuleDict | None) -> Tensor:
    """One residual branch of a block; opened up only where its layers are adapted."""
    if adapt is None or isinstance(part.m, Conv2dNorm):
        return part.m(x)
    return attend(part.m, x, adapt) if isinstance(part.m, SHSA) else feed(part.m, x, adapt)


def attend(mixer: SHSA, x: Tensor, adapt: nn.ModuleDict) -> Tensor:
    """timm's attention of one head over the first `pdim` channels, with adapters."""
    x, rest = x.split([mixer.pdim, mixer.dim - mixer.pdim], 1)
    qkv = normed(mixer.qkv, mixer.pre_norm(x), adapt, "qkv")
    q, k, v = (part.flatten(2) for part in qkv.split([mixer.qk_dim, mixer.qk_dim, mixer.pdim], 1))
    weights = (q.mT @ k * mixer.scale).softmax(-1)
    act, proj = mixer.proj
    return normed(proj, act(torch.cat([(v @ weights.mT).view_as(x), rest], 1)), adapt, "proj")


def feed(ffn: FFN, x: Tensor, adapt: nn.ModuleDict) -> Tensor:
    """timm's FFN with adapters."""
    return normed(ffn.pw2, ffn.act(normed(ffn.pw1, x, adapt, "fc1")), adapt, "fc2")


def normed(layer: Conv2dNorm, x: Tensor, adapt: nn.ModuleDict, tap: str) -> Tensor:
    """1x1 convolution, what is added to it, BatchNorm."""
    return layer.bn(added_map(layer.c(x), adapt, tap, x))


class AdaptedBlock(BasicBlock):
    """timm's block with bottleneck adapters in it, for models that leave this package."""

    adapter: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self, x, adapt=self.adapter)


class SHViT(Backbone):
    """A timm SHViT; cell 32 px, stages at strides 16, 32, 64.

    Sizes: any from 64 px where nothing is hidden, multiples of 64 where something is. pooled: mean of the last map
    (timm's head without the classifier and its BatchNorm). patches: the last map, which has no final norm; with
    `needs.stride` the fused stages. Where cells are hidden and no stride is asked for, each position of the last map
    stands for its 2 x 2 cells, so that tokens are never coarser than cells. maps are dense, also under Drop.
    BatchNorm runs over all processes; state dict and forward stay timm's.
    """

    family = "shvit"
    adapted_block = AdaptedBlock

    def __init__(
        self, architecture: str, *, needs: Needs, image_sizes: Sequence[int], drop_path: float = 0.0, **model_args
    ):
        super().__init__()
        self.architecture, self.model_args = architecture, model_args
        self.timm = to_global(timm.create_model(architecture, pretrained=False, num_classes=0, **model_args))
        self._refuse_other_kinds(needs)
        self.widths = tuple(info["num_chs"] for info in self.timm.feature_info)
        self.reductions = tuple(info["reduction"] for info in self.timm.feature_info)
        self.embed_dim, self.depth = self.timm.num_features, sum(len(stage.blocks) for stage in self.timm.stages)
        self.cell, self.drop_path_rate, self.block_fn = CELL, drop_path, run_block
        self.fused, self.fuse = plan_fusion(self, needs)
        native = TOTAL if needs.hide is None else CELL
        self.stride = self.reductions[self.fused[0]] if self.fused else native
        self._check_sizes(image_sizes, needs)
        self.mask_token = nn.Parameter(torch.zeros(1, self.widths[0], 1, 1)) if needs.hide is not None else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
            for size in image_sizes:
                self.register_buffer(f"positions_{size // STEM}", self._table(size // STEM), persistent=False)

    def _refuse_other_kinds(self, needs: Needs) -> None:
        model = self.timm
        plain = isinstance(model, TimmSHViT) and [i["reduction"] for i in model.feature_info] == [STEM, CELL, TOTAL]
        if not plain or any(type(b) is not BasicBlock for stage in model.stages for b in stage.blocks):
            raise BackboneError(f"{self.architecture} is not a timm SHViT; shvit_s1, s2, s3 and s4 work")
        if needs.attention:
            raise BackboneError(
                f"{self.architecture} has no pooled token with an attention row; that comes with the class-attention "
                "read-out, use a ViT"
            )

    def _check_sizes(self, sizes: Sequence[int], needs: Needs) -> None:
        for size in sizes:
            below = max(TOTAL, size // TOTAL * TOTAL)
            if size < TOTAL:
                raise BackboneError(f"image size {size} is smaller than SHViT's stride of {TOTAL}; use {TOTAL} or more")
            if needs.hide is not None and size % TOTAL:
                raise BackboneError(
                    f"image size {size} is not a multiple of SHViT's stride of {TOTAL}, which hiding cells needs; "
                    f"use {below} or {below + TOTAL}"
                )

    def _table(self, side: int) -> Tensor:
        """Fixed positions of the stem outputs, float32 [1, c, side, side]."""
        return sincos_2d(self.widths[0], side, side).T.reshape(1, -1, side, side).contiguous()

    def embed(self, images: Tensor, hide: Drop | Replace | None) -> Tensor:
        """Stem outputs [B, c, h, w]; nothing of a hidden cell's pixels reaches them.

        0 is the channel mean of normalised images.
        """
        if hide is None:
            return self.timm.patch_embed(images)
        if self.mask_token is None:
            raise BackboneError(f"{self.architecture} was built without a mask token; pass Needs(hide=Drop or Replace)")
        size = images.shape[-1]
        if isinstance(hide, Drop):
            seen = visibility(hide.ids, self.cells(size))
        else:
            seen = (~hide.mask).unflatten(1, self.cells(size))[:, None].float()
        x = self.timm.patch_embed(images * enlarge(seen, CELL).to(images.dtype))
        table = getattr(self, f"positions_{size // STEM}", None)
        table = self._table(size // STEM).to(x.device) if table is None else table
        return torch.where(enlarge(seen, CELL // STEM).bool(), x, (self.mask_token + table).to(x.dtype))

    def stages(self, x: Tensor, drop_path: Tensor | None) -> list[Tensor]:
        """The walker: stem outputs to the maps of all stages, [B, c, h, w] each."""
        maps, i = [], 0
        for stage in self.timm.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                drop = None if drop_path is None else drop_path[2 * i : 2 * i + 2]
                x = self.block_fn(block, x, drop, self.beside(i))
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
            raise BackboneError(f"{self.architecture} has no attention row of a pooled token; use a ViT")
        size = images.shape[-1]
        maps = self.stages(self.embed(images, hide), drop_path)
        last = maps[-1]
        weight = None if focus is None else focus_weight(focus, self.grid(size), last.shape[-2:])
        pooled = self.timm.forward_head(pooled_mean(last, weight)[..., None, None], pre_logits=True)
        if self.fuse is not None:
            last = self.fuse([maps[i] for i in self.fused], norm)
        elif self.stride < TOTAL:
            last = F.interpolate(last, size=self.grid(size))
        patches = flat(last)
        if isinstance(hide, Drop):
            patches = pick(patches, self.to_tokens(hide.ids, size))
        return self.read_out(Tokens(pooled, patches, pooled[:, None], tuple(maps[i] for i in layers)), focus)

    @staticmethod
    def taps(block: BasicBlock) -> Taps:
        layers, parts = {"fc1": block.ffn.m.pw1.c, "fc2": block.ffn.m.pw2.c}, ()
        if not isinstance(block.mixer, nn.Identity):
            mixer = block.mixer.m
            layers |= {"qkv": mixer.qkv.c, "proj": mixer.proj[1].c}
            parts = (mixer.qk_dim, mixer.qk_dim, mixer.pdim)
        return Taps(block.conv.m.c.out_channels, layers, parts, ("fc1", "fc2"))

    def final_norm(self) -> nn.Module | None:
        return self.fuse.norm if self.fuse is not None else None

    @torch.no_grad()
    def check(self) -> None:
        """Compare with timm's own forward, nothing hidden; BackboneError if they differ by more than 1e-4."""
        training = self.training
        self.eval()
        images = waves(1, 3, 2 * TOTAL, like=next(self.timm.parameters()))
        features = self.timm.forward_features(images)
        mine = self(images, layers=(-1,))
        agree(self, mine.maps[0], features)
        agree(self, mine.pooled, self.timm.forward_head(features, pre_logits=True))
        for stage in self.timm.stages:
            agree_blocks(self, stage.blocks[0], run_block)
        self.train(training)
