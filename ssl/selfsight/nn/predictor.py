"""I-JEPA's predictor: a narrow ViT from context tokens to the features of one target block at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, allow_graphs
from ..backbones.vit import run_block
from .decoders import run_last_block
from .positions import sincos_2d


class Predictor(nn.Module):
    """Context tokens and mask tokens with positions, through blocks; state names are the reference's less `predictor_`.

    A block's mask tokens see the context and each other, never another block: each block is a sequence of its own, all
    of them in one batch. The last block, the norm and the projection are computed for mask tokens only. Exact.
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, width: int = 384, depth: int = 6, heads: int = 12):
        super().__init__()
        self.block_fn, self.last_block_fn = run_block, run_last_block
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(width, *grid)[None])
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def on(
        cls, backbone: Backbone, size: int, *, dim: int, width: int | None, depth: int | None, heads: int | None
    ) -> Predictor:
        """One that fits a backbone's tokens, `dim` wide, of images of this size. None: 384 wide or `dim` where that is
        less, half as deep and at most 12 (6 for ViT-B, 12 for L and H), the backbone's heads or heads of about 32.
        """
        width = width or min(384, dim)
        if heads is None:
            own = backbone.num_heads
            fitting = [h for h in range(1, max(1, width // 32) + 1) if width % h == 0]
            heads = own if own and width % own == 0 else fitting[-1]
        if width % heads or width % 4:
            raise BackboneError(
                f"objective.predictor_dim={width} must be divisible by 4 and by objective.predictor_heads={heads}"
            )
        depth = depth or max(1, min(12, backbone.depth // 2))
        return cls(dim, backbone.grid(size), width=width, depth=depth, heads=heads)

    def forward(self, context: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        """context [B, K, D] at ids int64 [B, K]; targets int64 [B, m, Kt] -> features there, [B, m, Kt, D]."""
        pos, blocks = self.pos_embed[0], targets.shape[1]
        seen = self.embed(context) + pos[ids]
        asked = (self.mask_token + pos[targets]).to(seen.dtype)
        x = torch.cat([seen[:, None].expand(-1, blocks, -1, -1), asked], dim=2).flatten(0, 1)
        for block in self.blocks[:-1]:
            x, _ = self.block_fn(block, x)
        x = self.last_block_fn(self.blocks[-1], x, targets.shape[2])
        return self.proj(self.norm(x)).unflatten(0, targets.shape[:2])

    def compile_blocks(self, **kwargs) -> None:
        allow_graphs()
        self.block_fn = torch.compile(self.block_fn, **kwargs)
        self.last_block_fn = torch.compile(self.last_block_fn, **kwargs)

    def wrap_walkers(self, wrap: Callable[[Callable], Callable]) -> list[nn.Module]:
        """See `Backbone.wrap_walkers`."""
        self.block_fn, self.last_block_fn = wrap(self.block_fn), wrap(self.last_block_fn)
        return list(self.blocks)
