"""Poolings that transform every token before they pool, or none at all: nothing to re-associate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import MLP, PoolingError, init_linears, need_divisor
from .blocks import JEPA


class ClassToken(nn.Module):
    """The first token: x [B, N, D] -> [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x[:, 0], None


class Mean(nn.Module):
    """Global average: x [B, N, D] -> [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.mean(1), None


class GeM(nn.Module):
    """Generalised mean (Radenović et al., 2018), (mean_n max(x, 1e-6)^p)^(1/p) per channel, p learned from 3.

    x [B, N, D] -> [B, D]. Parameters 1.
    """

    def __init__(self, dim: int, p: float = 3.0, learn: bool = True):
        super().__init__()
        self.out_dim = dim
        self.p = nn.Parameter(torch.tensor([p]), requires_grad=learn)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.clamp(min=1e-6).pow(self.p).mean(1).pow(1 / self.p), None


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False):
        super().__init__()
        self.heads = need_divisor(heads, dim, "num_heads", "the width")
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block, [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SelfAttention(dim, heads, qkv_bias), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ABMILP(nn.Module):
    """Attention-based multiple-instance pooling (Ilse et al., 2018) behind self-attention (Przewięźlikowski et al.,
    "Beyond [cls]", 2025): a weight per token by an MLP, softmax over tokens, weighted sum.

    self_attention: "none", "map" (only the weights see its output) or "both" (values, too). act: "tanh" or "relu".
    depth: linear layers of the MLP. x [B, N, D] -> y [B, D], weights [B, 1, N]. Parameters 5 D^2 + 3 D + 1 by default,
    D + 1 without self-attention at depth 1.
    """

    def __init__(self, dim: int, self_attention: str = "both", act: str = "tanh", depth: int = 2):
        super().__init__()
        acts = {"tanh": nn.Tanh, "relu": nn.ReLU}
        if self_attention not in ("none", "map", "both") or act not in acts or depth < 1:
            raise PoolingError(
                f"abmilp with self_attention={self_attention}, act={act}, depth={depth}; use self_attention=none, map "
                "or both, act=tanh or relu, depth=1 or more"
            )
        self.out_dim, self.values = dim, self_attention == "both"
        self.self_attn = None if self_attention == "none" else SelfAttention(dim, 1)
        hidden = [part for _ in range(depth - 1) for part in (nn.Linear(dim, dim), acts[act]())]
        self.attention_predictor = nn.Sequential(*hidden, nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed = x if self.self_attn is None else self.self_attn(x)
        weights = self.attention_predictor(mixed).mT.softmax(-1)
        return (weights @ (mixed if self.values else x))[:, 0], weights


class DINOBlock(nn.Module):
    """One more ViT block, then the mean: x [B, N, D] -> [B, D]. Parameters 12 D^2 + 10 D."""

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.out_dim = dim
        self.block = Block(dim, num_heads)
        init_linears(self)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.block(x).mean(1), None


class DOLG(nn.Module):
    """Attention of DELF (Noh et al., 2017) as the local branch of DOLG (Yang et al., 2021) has it.

        f = BN(W x);   w = softplus(v . relu(f));   y = mean_n w f / |f|

    x [B, N, D] -> y [B, D], weights [B, 1, N] (positive, no softmax). Parameters D^2 + 4 D + 1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim
        self.conv1, self.bn, self.conv2 = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.Conv2d(dim, 1, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # 1 x 1 convolutions of a one-row image: the grid plays no part.
        f = self.bn(self.conv1(x.mT[:, :, None]))
        weights = F.softplus(self.conv2(F.relu(f)))[:, :, 0]
        return (F.normalize(f, dim=1)[:, :, 0] * weights).mean(-1), weights


class _Channel(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = max(1, dim // 16)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1, bias=False), nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        both = (self.fc2(F.relu(self.fc1(pooled))) for pooled in (maps.mean((2, 3), True), maps.amax((2, 3), True)))
        return maps * sum(both).sigmoid()


class _Spatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.bn(self.conv(torch.cat([maps.mean(1, True), maps.amax(1, True)], 1))).sigmoid()


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., ECCV 2018) with a residual, then the mean.

    x [B, N, D] on a square grid -> y [B, D], the spatial gate [B, 1, N]. Parameters D^2 / 8 + 100.
    """

    def __init__(self, dim: int, num_tokens: int | None = None):
        super().__init__()
        if num_tokens is not None:
            square(num_tokens)
        self.out_dim = dim
        self.channel, self.spatial = _Channel(dim), _Spatial()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side = square(x.shape[1])
        maps = x.mT.unflatten(-1, (side, side))
        gated = self.channel(maps)
        gate = self.spatial(gated)
        return F.relu(gated * gate + maps).mean((2, 3)), gate.flatten(2)


class VJEPA2(nn.Module):
    """Attentive probe of V-JEPA 2 (Assran et al., 2025): depth - 1 self-attention blocks over the tokens, then V-JEPA's
    cross-attention block without the output projection.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters (depth - 1) (12 D^2 + 13 D) + 11 D^2 + 13 D.
    """

    def __init__(self, dim: int, num_heads: int = 16, depth: int = 4):
        super().__init__()
        self.out_dim = dim
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True) for _ in range(depth - 1)))
        init_linears(self)
        self.pooler = JEPA(dim, num_heads, proj=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pooler(self.blocks(x))


def square(tokens: int) -> int:
    """Side of a square grid of so many tokens."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise PoolingError(
            f"cbam needs a square grid of patch tokens and was given {tokens}; give {side**2} or {(side + 1) ** 2} "
            "(without class and register tokens), or use another pooling"
        )
    return side
