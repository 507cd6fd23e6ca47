"""Where in an image does an exemplar come from: one cross-attention block and a map of two classes (CIM)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ..backbones.tokens import allow_graphs
from .losses import full_precision, upcast
from .positions import sincos_2d


class _CrossAttention(nn.Module):
    """Projections with the reference's names."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)


class _Block(nn.Module):
    """The context asks, the exemplar answers; one norm for both, as in the reference."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)


def run_block(block: _Block, context: Tensor, exemplars: Tensor) -> Tensor:
    """Context [B, N, W], which is projected once, and exemplars [E * B, n, W], exemplar-major -> [E * B, N, W]."""
    attn, count = block.attn, len(exemplars) // len(context)
    q = attn.q(block.norm1(context)).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    kv = attn.kv(block.norm1(exemplars)).unflatten(-1, (2, attn.heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q.repeat(count, 1, 1, 1), k, v)
    x = context.repeat(count, 1, 1) + attn.proj(out.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


class CorrelationDecoder(nn.Module):
    """Patches of a context and tokens of its exemplars -> logits of "elsewhere" and "here" for every context patch.

    Positions are added to the context only: an exemplar must not know where it was. Queries do not see each other, so
    the context's class token, whose output the reference drops, is left out.
    pred_init: "small" (standard deviation 0.02) or "official" (1, by the reference's rule for convolutions, which
    makes the first losses some fifty times larger).
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, width: int = 512, heads: int = 16, pred_init: str = "small"):
        super().__init__()
        self.grid, self.block_fn = grid, run_block
        self.embed = nn.Linear(dim, width)
        self.register_buffer("pos_embed", sincos_2d(width, *grid, prefix=1)[None])
        self.block = _Block(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Conv2d(width, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.pred.weight, std=1.0 if pred_init == "official" else 0.02)
        nn.init.zeros_(self.pred.bias)

    def forward(self, context: Tensor, exemplars: Tensor) -> Tensor:
        """context [B, N, D], exemplars [E * B, n, D], exemplar-major -> [E * B, 2, h, w] on the context's grid."""
        x = self.block_fn(self.block, self.embed(context) + self.pos_embed[:, 1:], self.embed(exemplars))
        return self.pred(self.norm(x).transpose(1, 2).unflatten(2, self.grid))

    def compile_blocks(self, **kwargs) -> None:
        allow_graphs()
        self.block_fn = torch.compile(self.block_fn, **kwargs)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Bilinear, corners on corners: [R, h, w] -> [R, size, size].

    As two products with a small matrix: the gradient of F.interpolate is not deterministic on GPUs.
    """

    def axis(length: int) -> Tensor:
        to = torch.arange(size, device=maps.device, dtype=maps.dtype) * ((length - 1) / max(1, size - 1))
        at = torch.arange(length, device=maps.device, dtype=maps.dtype)
        return (1 - (to[:, None] - at).abs()).clamp(min=0)

    rows, columns = maps.shape[-2:]
    return axis(rows) @ maps @ axis(columns).T


def map_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over pixels, logits [R, 2, h, w] enlarged to label bool [R, s, s] -> [R].

    Of two classes only the difference of the logits matters, and enlarging is linear: one map instead of two.
    """
    with full_precision(logits):
        here = enlarge(upcast(logits[:, 1]) - upcast(logits[:, 0]), label.shape[-1])
        return F.binary_cross_entropy_with_logits(here, label.to(here.dtype), reduction="none").mean((1, 2))
