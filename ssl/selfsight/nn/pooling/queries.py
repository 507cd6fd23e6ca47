"""Poolings whose queries meet the tokens once, without an MLP behind.

EP, AIM, CAPI and CoCa learn their queries; SimPool, eSimPool and CLIP make them of the image's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attend import Prepared, Query, TokenPooling, absorb, need_divisor, project, standardise


class EP(TokenPooling):
    """Efficient probing (Psomas et al., arXiv 2506.10178): M queries, no key projection, one block of values each.

        A[m, n] = softmax_n(D^-1/2 u_m . x_n);   y = concat_m W_Vm (sum_n A[m, n] x_n);   W_V [Do, D]: M blocks of rows

    x [B, N, D] -> y [B, Do], A [B, M, N]; Do = dim / d_out, and M must divide Do. Parameters M D + D Do.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1):
        super().__init__()
        self.out_dim = dim // need_divisor(d_out, dim, "d_out", "the width")
        need_divisor(num_queries, self.out_dim, "num_queries", "the pooled width")
        self.scale = dim**-0.5
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, self.out_dim, bias=False)

    def query(self, context: Tensor) -> Query:
        return Query(self.queries[0] * self.scale)

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return project(z, self.v.weight), attention


class AIM(TokenPooling):
    """Multi-head cross-attention of AIM (El-Nouby et al., 2024): a learned query that is not projected, tokens
    standardised per channel over batch and tokens (BatchNorm without affine), no output projection.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters 2 D^2 + D.
    """

    def __init__(self, dim: int, num_heads: int = 16):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def prepare(self, x: Tensor) -> Prepared:
        x = self.bn(x.flatten(0, 1)).view_as(x)
        return Prepared(x, x, x[:, 0])

    def query(self, context: Tensor) -> Query:
        scale = (self.out_dim // self.heads) ** -0.5
        return Query(absorb(self.queries[0, 0] * scale, self.k.weight, self.heads))

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return project(z, self.v.weight), attention


class CAPI(TokenPooling):
    """Attentive head of CAPI (Darcet et al., 2025): a learned query, keys and values with bias, heads of 64 channels,
    no norm and no output projection.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters 2 D^2 + 3 D.
    """

    def __init__(self, dim: int, num_heads: int | None = None):
        super().__init__()
        self.out_dim = dim
        self.heads = need_divisor(num_heads or max(1, dim // 64), dim, "num_heads", "the width")
        self.queries = nn.Parameter(torch.empty(dim))
        self.kv = nn.Linear(dim, 2 * dim)
        for weight in (self.queries, self.kv.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.kv.bias)

    def query(self, context: Tensor) -> Query:
        scale = (self.out_dim // self.heads) ** -0.5
        return Query(absorb(self.queries * scale, self.kv.weight[: self.out_dim], self.heads))

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return project(z, self.kv.weight[self.out_dim :], self.kv.bias[self.out_dim :]), attention


class CoCa(TokenPooling):
    """Attentional pooler of CoCa (Yu et al., 2022) as the reference probes with it: 8 heads of 64 channels with one key
    and one value projection for all, and of 196 learned queries only the first is read.

    x [B, N, D] -> y [B, D], attention [B, 8, N]. Parameters 1349 D; those of the unread queries get no gradient.
    """

    def __init__(self, dim: int, num_queries: int = 196, heads: int = 8, head_dim: int = 64):
        super().__init__()
        self.out_dim, self.heads, self.head_dim = dim, heads, head_dim
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def query(self, context: Tensor) -> Query:
        q = self.to_q(self.norm(self.queries[0])) * self.head_dim**-0.5
        return Query(q.unflatten(0, (self.heads, -1)) @ self.to_kv.weight[: self.head_dim])

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_out((z @ self.to_kv.weight[self.head_dim :].T).flatten(1)), attention


class SimPool(TokenPooling):
    """SimPool (Psomas et al., ICCV 2023) without its exponent: one head, the query is the projected mean of the raw
    tokens, keys the projected and values the plain normalised tokens.

    x [B, N, D] -> y [B, D], attention [B, 1, N]. Parameters 2 D^2 + 2 D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.out_dim = dim
        self.wq, self.wk = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)

    def prepare(self, x: Tensor) -> Prepared:
        flat = standardise(x, self.norm_patches.eps)
        return Prepared(flat, flat, x.mean(1))

    def query(self, context: Tensor) -> Query:
        # The query is the image's, so the key projection is absorbed once per image, not applied to N tokens.
        u = self.wq(context * self.out_dim**-0.5) @ self.wk.weight
        return Query((u * self.norm_patches.weight)[:, None])

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, 0] * self.norm_patches.weight + self.norm_patches.bias, attention


class ESimPool(TokenPooling):
    """Efficient SimPool: no projection at all. The normalised mean asks the normalised tokens, in heads, for raw ones.

    x [B, N, D] -> y [B, D], attention [B, heads, N]. Parameters 2 D.
    """

    def __init__(self, dim: int, num_heads: int = 12):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B * heads, N, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def prepare(self, x: Tensor) -> Prepared:
        eps = self.norm_patches.eps
        return Prepared(self.split(standardise(x, eps)), self.split(x), standardise(x.mean(1), eps))

    def query(self, context: Tensor) -> Query:
        gain, bias = self.norm_patches.weight, self.norm_patches.bias
        u = (context * gain + bias) * gain * (self.out_dim // self.heads) ** -0.5
        return Query(self.split(u[:, None]))

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        return z.reshape(-1, self.out_dim), attention.reshape(-1, self.heads, attention.shape[-1])


class CLIP(TokenPooling):
    """CLIP's attention pooling (Radford et al., 2021): normalised tokens behind their mean, learned positions,
    self-attention, of which only the mean's row is read, and therefore only computed.

    x [B, N, D] -> y [B, D], attention [B, heads, N] (the rest of each row stays with the mean). Parameters 4 D^2 +
    (N + 7) D: the number of tokens is fixed.
    """

    def __init__(self, dim: int, num_tokens: int, num_heads: int = 4):
        super().__init__()
        self.out_dim, self.heads = dim, need_divisor(num_heads, dim, "num_heads", "the width")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.randn(num_tokens + 1, dim) * dim**-0.5)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def prepare(self, x: Tensor) -> Prepared:
        flat = standardise(x, self.norm.eps)
        mean = flat.mean(1, keepdim=True)
        flat = torch.cat([mean, flat], 1)
        return Prepared(flat, flat, mean[:, 0])

    def query(self, context: Tensor) -> Query:
        wq, wk, _ = self.qkv.weight.chunk(3)
        first = context * self.norm.weight + self.norm.bias + self.pos_embed[0]
        q = first @ wq.T + self.qkv.bias[: self.out_dim]
        u = absorb(q * (self.out_dim // self.heads) ** -0.5, wk, self.heads)
        # Positions are added to the tokens, so their part of the scores is a table times the query.
        return Query(u * self.norm.weight, bias=u @ self.pos_embed.T)

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        z = z * self.norm.weight + self.norm.bias + attention @ self.pos_embed
        *_, wv = self.qkv.weight.chunk(3)
        return self.proj(project(z, wv, self.qkv.bias[2 * self.out_dim :])), attention[..., 1:]
