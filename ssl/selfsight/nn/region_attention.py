"""A region of an image, as one query that looks at all patches of the image (GLARE's regional consistency)."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """softmax(tau (z Wq) (Z Wk)^T) (Z Wv), one head, tau = 1 / sqrt(D) (GLARE, eqs. 5 to 7, as a port reports them).

    Starts near the identity, so that the first contexts already say something about their region.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            trunc_normal_(layer.weight, std=0.02)
            layer.weight.data += torch.eye(dim)

    def normed(self, tokens: Tensor) -> Tensor:
        """What regions are made of and what is looked at: the patches as they are."""
        return tokens

    def forward(self, tokens: Tensor, regions: Tensor) -> Tensor:
        """Patches [R, N, D] and regions [R, M, D] of the same images -> contexts [R, M, D]."""
        return nn.functional.scaled_dot_product_attention(self.q(regions), self.k(tokens), self.v(tokens))


class SampledAttention(nn.Module):
    """UDI's attention over sampled regions (Su & Ji, ECCV 2024): several heads, biases, a residual, norms around."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm1 = heads, nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim), "norm": nn.LayerNorm(dim, eps=1e-6)}
        )

    def normed(self, tokens: Tensor) -> Tensor:
        """What regions are made of and what is looked at: the patches behind a norm."""
        return self.norm1(tokens)

    def forward(self, tokens: Tensor, regions: Tensor) -> Tensor:
        """Normed patches [R, N, D] and regions, weighted means of them [R, M, D] -> contexts [R, M, D].

        A mean of projected patches, as the reference has it, is the projection of their mean.
        """
        qkv, dim = self.attn["qkv"], tokens.shape[-1]
        q = nn.functional.linear(regions, qkv.weight[:dim], qkv.bias[:dim])
        k, v = nn.functional.linear(tokens, qkv.weight[dim:], qkv.bias[dim:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attn["norm"](self.attn["proj"](y) + regions)
