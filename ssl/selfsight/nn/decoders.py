"""Decoders from tokens to the pixels of hidden cells, one signature, and the table of which family takes which.

`decoder(tokens, keep, hidden) -> [B, M, cell * cell * 3]`; `layers` names the maps it wants from the backbone,
`mask_ratio` is its recipe's default, `keep` turns a ratio into a count of kept cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, Tokens
from ..backbones.vit import run_block
from .positions import sincos_2d


def run_last_block(block: Block, x: Tensor, count: int) -> Tensor:
    """A block of which only the last `count` tokens are wanted: x [B, N, D] -> [B, count, D].

    Keys and values come from all tokens; queries, projection and MLP are computed for the wanted ones only. Exact.
    """
    attn, wanted = block.attn, x[:, -count:]
    normed = block.norm1(x)
    dim = x.shape[-1]
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(normed[:, -count:], weight[:dim], bias[:dim]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    kv = F.linear(normed, weight[dim:], bias[dim:]).unflatten(-1, (2, attn.num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v)
    wanted = wanted + attn.proj(out.transpose(1, 2).flatten(2))
    return wanted + block.mlp(block.norm2(wanted))


class PixelTransformer(nn.Module):
    """MAE's decoder (He et al. 2022, section 3): light blocks over visible and mask tokens.

    Mask tokens are appended with their positions and nothing is put back in order, because attention does not care
    about order; the last block, the norm and the prediction are computed for hidden positions only. All exact.
    """

    layers: tuple[int, ...] = ()
    mask_ratio = 0.75

    def __init__(self, dim: int, grid: tuple[int, int], cell: int, *, width: int, depth: int, heads: int, prefix: int):
        super().__init__()
        self.prefix, self.block_fn, self.last_block_fn = prefix, run_block, run_last_block
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(width, *grid, prefix=prefix)[None])
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, cell * cell * 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def keep(cells: int, ratio: float) -> int:
        """Kept cells; float arithmetic as in the reference (L = 400, r = .8 gives 79)."""
        return int(cells * (1 - ratio))

    def forward(self, tokens: Tokens, keep: Tensor, hidden: Tensor) -> Tensor:
        """tokens of the kept cells, keep [B, K], hidden [B, M] -> [B, M, cell * cell * 3]."""
        pos = self.pos_embed[0, self.prefix :]
        x = self.embed(torch.cat([tokens.prefix[:, : self.prefix], tokens.patches], dim=1))
        prefix = x[:, : self.prefix] + self.pos_embed[:, : self.prefix]
        visible = x[:, self.prefix :] + pos[keep]
        x = torch.cat([prefix, visible, (self.mask_token + pos[hidden]).to(x.dtype)], dim=1)
        for block in self.blocks[:-1]:
            x, _ = self.block_fn(block, x)
        return self.pred(self.norm(self.last_block_fn(self.blocks[-1], x, hidden.shape[1])))

    def compile_blocks(self, **kwargs) -> None:
        self.block_fn = torch.compile(self.block_fn, **kwargs)
        self.last_block_fn = torch.compile(self.last_block_fn, **kwargs)

    def wrap_walkers(self, wrap: Callable[[Callable], Callable]) -> list[nn.Module]:
        """See `Backbone.wrap_walkers`."""
        self.block_fn, self.last_block_fn = wrap(self.block_fn), wrap(self.last_block_fn)
        return list(self.blocks)


# Which decoders a family can feed; the first is `decoder=auto`.
DECODERS = {
    "vit": ("transformer",),
    "convnext": ("unet", "block"),
    "convnextv2": ("block", "unet"),
    "shvit": ("fused",),
}


def build_decoder(
    backbone: Backbone, kind: str, image_size: int, *, width: int | None, depth: int | None, heads: int | None
) -> nn.Module:
    """The pixel decoder of this name for this backbone; BackboneError names those that fit."""
    fitting = DECODERS.get(backbone.family, ())
    kind = fitting[0] if kind == "auto" and fitting else kind
    if kind not in fitting:
        known = f"decoders of {backbone.family}: {', '.join(fitting)}" if fitting else "it takes no pixel decoder"
        raise BackboneError(f"objective.decoder={kind} does not fit {backbone.architecture}; {known}")
    if kind == "transformer":
        width = width or 512
        heads = heads or 16
        if width % heads or width % 4:
            raise BackboneError(
                f"objective.decoder_dim={width} must be divisible by 4 and by objective.decoder_heads={heads}"
            )
        return PixelTransformer(
            backbone.embed_dim, backbone.cells(image_size), backbone.cell,
            width=width, depth=depth or 8, heads=heads, prefix=backbone.prefix,
        )  # fmt: skip
    from . import pixel_conv

    return pixel_conv.build(kind, backbone, image_size, width=width, depth=depth)
