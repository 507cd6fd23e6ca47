"""Probe heads, alone and many at once.

    head = pooling -> BatchNorm1d(affine=False, eps=1e-6) -> Linear

`Stack` holds P heads of one shape, every parameter with a leading axis of P, and computes what each would alone: all
their queries meet the tokens in one matrix product, and tokens are normalised once. As losses are summed over heads,
each gets the gradient that it would get alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..nn.pooling import PoolingError, TokenPooling, attend, build_pooling
from ..nn.pooling.attend import Query
from . import ProbeError

EPS, BN_MOMENTUM = 1e-6, 0.1


class ProbeHead(nn.Module):
    """pooling -> BatchNorm1d without affine (batch_norm=False: none, as DINOv2) -> Linear.

    Tokens [B, N, D] -> logits [B, C]. The classifier starts truncated normal of std 0.01 with PyTorch's bias, as in
    MAE; zero_bias=True: normal of std 0.01 and zero, as in DINO and DINOv2.
    """

    def __init__(self, pooling: nn.Module, num_classes: int, *, batch_norm: bool = True, zero_bias: bool = False):
        super().__init__()
        self.pooling = pooling
        width = pooling.out_dim
        self.bn = nn.BatchNorm1d(width, affine=False, eps=EPS, momentum=BN_MOMENTUM) if batch_norm else None
        self.linear = nn.Linear(width, num_classes)
        if zero_bias:
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        else:
            nn.init.trunc_normal_(self.linear.weight, std=0.01)

    def classify(self, y: Tensor) -> Tensor:
        """Pooled [B, Do] -> logits [B, C]."""
        return self.linear(y if self.bn is None else self.bn(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pooling(x)[0])


def build_head(
    name: str, dim: int, num_classes: int, *, seed: int = 0, batch_norm: bool = True, zero_bias: bool = False, **pooling
) -> ProbeHead:
    """A head with a named pooling (`build_pooling`'s arguments); its start depends on the seed alone."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ProbeHead(
                build_pooling(name, dim, **pooling), num_classes, batch_norm=batch_norm, zero_bias=zero_bias
            )
    except PoolingError as error:
        raise ProbeError(f"probe: {error}") from None


class _Step(nn.Module):
    """One method of a module as a module of its own, which `functional_call` needs."""

    def __init__(self, inner: nn.Module, method: str):
        super().__init__()
        self.inner = inner
        self.method = method

    def forward(self, *args: Tensor):
        return getattr(self.inner, self.method)(*args)


def _key(name: str) -> str:
    return name.replace(".", "__")  # a parameter's own name has no dots


def _merge(query: dict[str, Tensor]) -> Query:
    """Queries of P poolings as those of one: u [P, M, d] -> [P * M, d] or [P, G, M, d] -> [G, P * M, d], and so on."""
    u, bias, sink = query["u"], query.get("bias"), query.get("sink")
    return Query(
        u.flatten(0, 1) if u.ndim == 3 else u.transpose(0, 1).flatten(1, 2),
        None if bias is None else bias.transpose(0, 1).flatten(1, 2),
        None if sink is None else sink.flatten(),
    )


class Stack(nn.Module):
    """P heads of one shape as one module: tokens [B, N, D] -> logits [P, B, C].

    Its parameters are named as one head's and have a leading axis of P. `head(i)` gives one back.
    """

    def __init__(self, heads: Sequence[ProbeHead]):
        super().__init__()
        shapes = [{k: v.shape for k, v in h.state_dict().items()} for h in heads]
        if not heads or any(s != shapes[0] for s in shapes):
            raise ProbeError("a stack needs heads of one shape: same pooling, queries, width and classes")
        self.size, first = len(heads), heads[0]
        # The template computes with our tensors; kept in a tuple, so that it is no submodule with parameters.
        self._template = (copy.deepcopy(first),)
        self.names = [n for n, _ in first.named_parameters()]
        trained = {n for n, p in first.named_parameters() if p.requires_grad}
        stacked = [dict(h.named_parameters()) for h in heads]
        for name in self.names:
            value = torch.stack([h[name].detach() for h in stacked])
            self.register_parameter(_key(name), nn.Parameter(value, requires_grad=name in trained))
        buffers = [dict(h.named_buffers()) for h in heads]
        self.buffer_names = list(buffers[0])
        for name in self.buffer_names:
            value = torch.stack([b[name] for b in buffers])
            self.register_buffer(_key(name), value)
            if isinstance(first.pooling, TokenPooling) and name.startswith("pooling.") and (value != value[0]).any():
                raise ProbeError(f"a stack shares the statistics of its tokens, and {name} differs between the heads")

    @property
    def template(self) -> ProbeHead:
        return self._template[0]

    def stacked(self) -> dict[str, nn.Parameter]:
        """Trained parameters by a head's names, [P, ...] each."""
        found = {n: self._get(n) for n in self.names}
        return {n: p for n, p in found.items() if p.requires_grad}

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pooled(x))

    def classify(self, y: Tensor) -> Tensor:
        """Pooled features [P, B, Do] -> logits [P, B, C]."""
        if self.template.bn is not None:
            y = self._norm(y)
        weight, bias = self._get("linear.weight"), self._get("linear.bias")
        return torch.baddbmm(bias[:, None], y, weight.mT)

    @property
    def splits(self) -> bool:
        """Whether the pooling sees each sample alone, so that a batch may be pooled in parts."""
        return not any(name.startswith("pooling.") for name in self.buffer_names)

    def pooled(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] -> pooled features of all heads, [P, B, Do]."""
        pooling = self.template.pooling
        if isinstance(pooling, TokenPooling):
            return self._by_queries(pooling, x)
        tensors = self._part("pooling.")
        if not tensors:  # class token or mean: the same for all
            return pooling(x)[0].expand(self.size, -1, -1)
        # Every token is transformed by every head: there is nothing to share, and a loop needs the least memory.
        each = ({n: t[i] for n, t in tensors.items()} for i in range(self.size))
        return torch.stack([functional_call(pooling, own, (x,))[0] for own in each])

    def _by_queries(self, pooling: TokenPooling, x: Tensor) -> Tensor:
        """The three steps of `TokenPooling`, the middle one for the queries of all heads together."""
        keys, values, context = self._prepare(pooling, x)
        tensors = {f"inner.{n}": t for n, t in self._part("pooling.", buffers=False).items()}
        ask, end = _Step(pooling, "query"), _Step(pooling, "finish")

        def present(query: Query) -> dict[str, Tensor]:  # vmap returns tensors only
            return {k: v for k, v in query._asdict().items() if v is not None}

        query = vmap(lambda t: present(functional_call(ask, t, (context,))))(tensors)
        z, attention = attend(_merge(query), keys, values)
        z, attention = (t.unflatten(1, (self.size, -1)) for t in (z, attention))
        return vmap(lambda t, a, b: functional_call(end, t, (a, b))[0], in_dims=(0, 1, 1))(tensors, z, attention)

    def _prepare(self, pooling: TokenPooling, x: Tensor):
        """Tokens normalised once: statistics (AIM's) are those of the tokens, so all heads have the first one's."""
        buffers = {n: self._get(f"pooling.{n}")[0].clone() for n, _ in pooling.named_buffers()}
        if not buffers:
            return pooling.prepare(x)
        prepared = functional_call(_Step(pooling, "prepare"), {f"inner.{n}": b for n, b in buffers.items()}, (x,))
        if self.training:
            for name, value in buffers.items():
                self._get(f"pooling.{name}").copy_(value.expand(self.size, *value.shape))
        return prepared

    def _norm(self, y: Tensor) -> Tensor:
        """BatchNorm of P heads as one of P x Do channels, [P, B, Do]."""
        mean, var = self._get("bn.running_mean"), self._get("bn.running_var")
        flat = y.transpose(0, 1).flatten(1)
        if self.training:
            self._get("bn.num_batches_tracked").add_(1)
        flat = F.batch_norm(flat, mean.view(-1), var.view(-1), training=self.training, momentum=BN_MOMENTUM, eps=EPS)
        return flat.unflatten(1, (self.size, -1)).transpose(0, 1)

    def _get(self, name: str) -> Tensor:
        return getattr(self, _key(name))

    def _part(self, prefix: str, buffers: bool = True) -> dict[str, Tensor]:
        names = self.names + (self.buffer_names if buffers else [])
        return {n.removeprefix(prefix): self._get(n) for n in names if n.startswith(prefix)}

    def train(self, mode: bool = True) -> Stack:
        self.template.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def head(self, index: int) -> ProbeHead:
        """A head by its index, with its own copy of weights and statistics."""
        head = copy.deepcopy(self.template).to(self._get("linear.weight"))
        head.load_state_dict({n: self._get(n)[index] for n in self.names + self.buffer_names})
        return head.train(self.training)
