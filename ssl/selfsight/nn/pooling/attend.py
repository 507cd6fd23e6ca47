"""Attention by a few queries over raw tokens, and the pooling modules' three steps around it.

As commonly written, cross-attention projects every token to a key and a value: 2 N D^2 multiplications per image for a
handful of queries. Both projections commute with what surrounds them, exactly and with the same parameters:

    (W_K x_n) . q  =  x_n . (W_K^T q)                      the key projection is absorbed by the query
    sum_n a_n (W_V x_n + b)  =  W_V (sum_n a_n x_n) + b    the value projection is applied to the pooled token

A key bias, or a LayerNorm's bias in front, adds the same number to all scores of a query and drops out of the softmax;
a LayerNorm's gain g in front becomes part of the query (g u) and of the pooled token (g z). What is left for all tokens
is 2 N M D for M queries, plus a normalisation without parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PoolingError(ValueError):
    """A pooling cannot be built as asked; one sentence names what would work."""


class Prepared(NamedTuple):
    """What a pooling sees of a batch, by no parameter of it: keys and values [G, N, d] (G: images, or images x heads),
    and what data-dependent queries are made of, [B, D]."""

    keys: Tensor
    values: Tensor
    context: Tensor


class Query(NamedTuple):
    """u [M, d], or [G, M, d] if it depends on the image: scaled, with the key projection absorbed.

    bias [G, M, N]: added to the scores. sink [M]: score of one more token, which takes its share and gives no value.
    """

    u: Tensor
    bias: Tensor | None = None
    sink: Tensor | None = None


def attend(query: Query, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens pooled by softmax(u keys^T): z [G, M, d] and the attention [G, M, N]."""
    # For queries that all images share this is one matrix product over all tokens of the batch.
    scores = (
        query.u @ keys.mT if query.u.ndim == 3 else (keys.flatten(0, 1) @ query.u.T).unflatten(0, keys.shape[:2]).mT
    )
    if query.bias is not None:
        scores = scores + query.bias
    if query.sink is not None:
        scores = torch.cat([scores, query.sink[:, None].expand(*scores.shape[:-1], 1)], -1)
    attention = scores.softmax(-1)[..., : keys.shape[1]]
    return attention @ values, attention


class TokenPooling(nn.Module):
    """Tokens [B, N, D] -> (pooled [B, Do], attention [B, M, N]) in three steps, of which `attend` is the middle one.

    `prepare` has no parameters, so that many poolings trained on the same tokens share it, and share `attend` as one
    pooling with all their queries (`probes.heads.Stack`).
    """

    def prepare(self, x: Tensor) -> Prepared:
        return Prepared(x, x, x[:, 0])

    def query(self, context: Tensor) -> Query:
        raise NotImplementedError

    def finish(self, z: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled tokens z [G, M, d] and attention [G, M, N] -> (y [B, Do], attention [B, M, N] for display)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, context = self.prepare(x)
        return self.finish(*attend(self.query(context), keys, values))


def absorb(q: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Projected query [*, I] and key projection [I, D] -> one query per head for raw tokens, [*, heads, D]."""
    return torch.einsum("...he,hed->...hd", q.unflatten(-1, (heads, -1)), weight.unflatten(0, (heads, -1)))


def project(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pooled raw tokens [B, M, D] by the rows of the value projection [Do, D] that belong to them -> [B, Do]."""
    y = torch.einsum("bmd,med->bme", z, weight.unflatten(0, (z.shape[1], -1))).flatten(1)
    return y if bias is None else y + bias


def standardise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without gain and bias over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def need_divisor(count: int, of: int, what: str, of_what: str) -> int:
    """`count` if it divides `of`, else a sentence with all numbers that do."""
    if count < 1 or of % count:
        legal = [n for n in range(1, of + 1) if of % n == 0]
        raise PoolingError(f"{what}={count} does not divide {of_what} {of}; use one of {', '.join(map(str, legal))}")
    return count


class MLP(nn.Module):
    """Linear(D, 4D), exact GELU, Linear(4D, D)."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def init_linears(module: nn.Module, std: float = 0.02) -> None:
    """Linear weights truncated normal, biases zero, as in ViT."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
