"""Poolings by a transformer block with a learned query: V-JEPA, SigLIP, CAE, CaiT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attend import MLP, Prepared, Query, TokenPooling, absorb, init_linears, need_divisor, project, standardise


class _CrossAttention(nn.Module):
    """Projections of V-JEPA's cross-attention; without `proj` for V-JEPA 2."""

    def __init__(self, dim: int, proj: bool = True):
        super().__init__()
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim) if proj else nn.Identity()


class JEPA(TokenPooling):
    """Attentive probe of V-JEPA (Bardes et al., 2024): a pre-norm cross-attention block with a learned query u.

        y = u + proj(attention(W_q u, LN(x)));   out = y + MLP(LN(y))

    x [B, N, D] -> out [B, D], attention [B, heads, N]. Parameters 12 D^2 + 14 D. proj=False is V-JEPA 2's block.
    """

    def __init__(self, dim: int, num_heads: int = 16, proj: bool = True):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.xattn, self.mlp = _CrossAttention(dim, proj), MLP(dim)
        nn.init.trunc_normal_(self.queries, std=0.02)
        init_linears(self)

    def prepare(self, x: Tensor) -> Prepared:
        flat = standardise(x, self.norm1.eps)
        return Prepared(flat, flat, flat[:, 0])

    def query(self, context: Tensor) -> Query:
        q = self.xattn.q(self.queries[0, 0]) * (self.out_dim // self.heads) ** -0.5
        return Query(absorb(q, self.xattn.kv.weight[: self.out_dim], self.heads) * self.norm1.weight)

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        z = z * self.norm1.weight + self.norm1.bias
        values = project(z, self.xattn.kv.weight[self.out_dim :], self.xattn.kv.bias[self.out_dim :])
        y = self.queries[0] + self.xattn.proj(values)
        return y + self.mlp(self.norm2(y)), attention


class SigLIP(TokenPooling):
    """MAP head of SigLIP (Zhai et al., 2023), big_vision's multi-head attention pooling: a learned query, cross-
    attention on the tokens as they are, an MLP with a residual and without a norm in front.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters 12 D^2 + 10 D.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.empty(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = MLP(dim)
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)

    def query(self, context: Tensor) -> Query:
        q = self.q(self.queries[0, 0]) * (self.out_dim // self.heads) ** -0.5
        return Query(absorb(q, self.kv.weight[: self.out_dim], self.heads))

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        y = self.proj(project(z, self.kv.weight[self.out_dim :], self.kv.bias[self.out_dim :]))
        return y + self.mlp(y), attention


class _CAEAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)


class CAE(TokenPooling):
    """Attentive probe of CAE (Chen et al., 2022): cross-attention with a LayerNorm each for query, keys and values, no
    residual and no MLP. The query starts at zero.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters 4 D^2 + 10 D, of which `norm2_cross` is never used: it
    stands in the reference's checkpoints.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (nn.LayerNorm(dim) for _ in range(4))
        self.cross_attn = _CAEAttention(dim)
        init_linears(self)

    def prepare(self, x: Tensor) -> Prepared:
        flat = standardise(x, self.norm1_k.eps)  # the two norms of tokens differ by their affine parts alone
        return Prepared(flat, flat, flat[:, 0])

    def query(self, context: Tensor) -> Query:
        q = self.cross_attn.q(self.norm1_q(self.queries[0, 0])) * (self.out_dim // self.heads) ** -0.5
        return Query(absorb(q, self.cross_attn.k.weight, self.heads) * self.norm1_k.weight)

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        z = z * self.norm1_v.weight + self.norm1_v.bias
        return self.cross_attn.proj(project(z, self.cross_attn.v.weight)), attention


class _ClassAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))


class CaiT(TokenPooling):
    """Class-attention block of CaiT (Touvron et al., ICCV 2021), LayerScale 1e-5, then a LayerNorm. The query token
    attends to itself, too.

        c = u + g1 proj(attention(LN(u), LN([u; x])));   c = c + g2 MLP(LN(c));   out = LN(c)

    x [B, N, D] -> out [B, D], attention [B, heads, N] (the rest of each row stays with the query token). Parameters
    12 D^2 + 18 D.
    """

    def __init__(self, dim: int, num_heads: int = 4):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim)
        self.attn, self.mlp = _ClassAttention(dim), MLP(dim)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), 1e-5)) for _ in range(2))
        nn.init.trunc_normal_(self.queries, std=0.02)
        init_linears(self)

    def prepare(self, x: Tensor) -> Prepared:
        flat = standardise(x, self.norm1.eps)
        return Prepared(flat, flat, flat[:, 0])

    def query(self, context: Tensor) -> Query:
        own = self.queries[0, 0]
        q = self.attn.q(self.norm1(own)) * (self.out_dim // self.heads) ** -0.5
        u = absorb(q, self.attn.k.weight, self.heads) * self.norm1.weight
        return Query(u, sink=u @ standardise(own, self.norm1.eps))

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        own = self.queries[0]
        z = z + (1 - attention.sum(-1, keepdim=True)) * standardise(own, self.norm1.eps)
        values = project(z * self.norm1.weight + self.norm1.bias, self.attn.v.weight, self.attn.v.bias)
        c = own + self.gamma_1 * self.attn.proj(values)
        return self.norm(c + self.gamma_2 * self.mlp(self.norm2(c))), attention
