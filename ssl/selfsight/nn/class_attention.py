"""A query that pools a set of tokens: learned (CaiT; the head of SelfPatch; read-out of families without such a token),
or the mean of the tokens (the head of DMT-JEPA).

The tokens never change, so their keys and values are computed once per layer, for the pooled vector and for every
patch's neighbours alike; the reference projects each neighbour's copy again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from ..backbones.tokens import Backbone, allow_graphs, pick

Projected = list[tuple[Tensor, Tensor]]  # keys and values of every layer, [B, N, heads, d] each


class _Attention(nn.Module):
    """Projections with the reference's names."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """[*, D] -> [*, heads, d]."""
        return x.unflatten(-1, (self.heads, -1))


class _Layer(nn.Module):
    """One class-attention layer; the query sees itself and its set (no LayerScale, as in SelfPatch's code)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.mlp = Mlp(dim, round(mlp_ratio * dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] -> keys and values [B, N, heads, d]."""
        x = self.norm1(x)
        return self.attn.split(self.attn.k(x)), self.attn.split(self.attn.v(x))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        """query [B or 1, M or 1, D], keys and values [B, M, S, heads, d], valid bool [B, M, S] -> branch [B, M, D]."""
        attn, x = self.attn, self.norm1(query)
        weights, value = self.weights(query, keys, valid), attn.split(attn.v(x))
        pooled = weights[..., :1] * value + torch.einsum("...hs,...shd->...hd", weights[..., 1:], values)
        return attn.proj(pooled.flatten(-2))

    def weights(self, query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
        """Arguments as of `attend` -> [B, M, heads, 1 + S]: of the query itself, then of its set."""
        attn, x = self.attn, self.norm1(query)
        q, key = attn.split(attn.q(x)), attn.split(attn.k(x))
        own = (q * key).sum(-1, keepdim=True)
        scores = torch.einsum("...hd,...shd->...hs", q, keys)
        if valid is not None:
            scores = scores.masked_fill(~valid[..., None, :], float("-inf"))
        scores = torch.cat([own.expand(*scores.shape[:-1], 1), scores], -1) * q.shape[-1] ** -0.5
        return scores.softmax(-1)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        """As `attend`, with the residual and the MLP."""
        query = query + self.attend(query, keys, values, valid)
        return query + self.mlp(self.norm2(query))


class ClassAttention(nn.Module):
    """Layers of class attention, then a LayerNorm: state names are those of SelfPatch's `ca_head`.

    norm: the backbone's own final norm (see `Backbone.final_norm`), which is then exported as such; None: a new one.
    """

    def __init__(self, dim: int, heads: int, *, layers: int = 2, mlp_ratio: float = 4.0, norm: nn.Module | None = None):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_blocks = nn.ModuleList(_Layer(dim, heads, mlp_ratio) for _ in range(layers))
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm is None else norm
        self.layer_fn = run_layer

    @classmethod
    def on(cls, backbone: Backbone, dim: int | None = None, **kwargs) -> ClassAttention:
        """One that fits a backbone's patch tokens, or what is made of them, `dim` wide."""
        dim, heads = dim or backbone.embed_dim, backbone.num_heads
        if not heads or dim % heads:
            heads = max(h for h in range(1, max(1, dim // 32) + 1) if dim % h == 0)
        return cls(dim, heads, **kwargs)

    def project(self, tokens: Tensor) -> Projected:
        """Keys and values of tokens [B, N, D], before the final norm."""
        return [layer.project(tokens) for layer in self.cls_blocks]

    def pool(self, projected: Projected, focus: Tensor | None = None) -> Tensor:
        """One vector per image, [B, D]; focus bool [B, N]: where it may look (it always sees itself)."""
        x = self.cls_token
        for layer, (keys, values) in zip(self.cls_blocks, projected):
            x = self.layer_fn(layer, x, keys[:, None], values[:, None], None if focus is None else focus[:, None])
        return x[:, 0]

    def attention(self, projected: Projected, focus: Tensor | None = None) -> Tensor:
        """Where the pooled vector looks in the last layer, [B, heads, N]; what it keeps of itself is left out."""
        x, last = self.cls_token, self.cls_blocks[-1]
        masks = None if focus is None else focus[:, None]
        for layer, (keys, values) in zip(self.cls_blocks[:-1], projected):
            x = self.layer_fn(layer, x, keys[:, None], values[:, None], masks)
        return last.weights(x, projected[-1][0][:, None], masks)[:, 0, :, 1:]

    def aggregate(self, projected: Projected, ids: Tensor, valid: Tensor | None, query: Tensor | None = None) -> Tensor:
        """One vector per patch from the tokens ids int64 [B, N, k] alone, valid bool [B, N, k] -> [B, N, D].

        query: [B, N or 1, D]; None: the learned one.
        """
        x = self.cls_token if query is None else query
        for layer, both in zip(self.cls_blocks, projected):
            keys, values = (pick(part, ids.flatten(1)).unflatten(1, ids.shape[1:]) for part in both)
            x = self.layer_fn(layer, x, keys, values, valid)
        return x

    def normed(self, x: Tensor) -> Tensor:
        """The final norm of [*, D]. A norm of maps (LayerNorm2d) has the same parameters as one of tokens."""
        return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)

    def compile_blocks(self, **kwargs) -> None:
        """Compile the walker of one layer."""
        allow_graphs()
        self.layer_fn = torch.compile(self.layer_fn, **kwargs)


class MeanAttention(ClassAttention):
    """The same without a learned query: DMT-JEPA's head. `aggregate` makes its targets (the query is given),
    `mix` puts what the mean of the context attends to into every token of the context."""

    def __init__(self, dim: int, heads: int, **kwargs):
        super().__init__(dim, heads, **kwargs)
        self.cls_token = None
        self.mix_fn = mix_layer

    def mix(self, tokens: Tensor, mean: bool = True) -> Tensor:
        """tokens [B, K, D] -> [B, K, D]; mean=False: plain self-attention instead."""
        for layer in self.cls_blocks:
            tokens = self.mix_fn(layer, tokens, mean)
        return self.normed(tokens)

    def compile_blocks(self, **kwargs) -> None:
        super().compile_blocks(**kwargs)
        self.mix_fn = torch.compile(self.mix_fn, **kwargs)


def mix_layer(layer: _Layer, tokens: Tensor, mean: bool) -> Tensor:
    """One layer over tokens [B, K, D] whose query is their mean, or that has all of them as queries."""
    keys, values = layer.project(tokens)
    if mean:
        branch = layer.attend(tokens.mean(1, keepdim=True), keys[:, None], values[:, None], None)
    else:
        query = layer.attn.split(layer.attn.q(layer.norm1(tokens)))
        parts = (x.transpose(1, 2) for x in (query, keys, values))
        branch = layer.attn.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    tokens = tokens + branch
    return tokens + layer.mlp(layer.norm2(tokens))


def run_layer(layer: _Layer, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
    """One layer, with everything as an argument."""
    return layer(query, keys, values, valid)
