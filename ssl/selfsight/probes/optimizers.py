"""Optimizers for many probes at once: every tensor has a leading axis of P probes, and so have rate and decay.

Each probe is stepped exactly as it would be alone; norms are taken per probe. Weight decay is never applied to biases,
gains and other vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import ProbeError

LR_BATCH = 256  # learning rates are given per so many samples of a batch
Tensors = Mapping[str, Tensor]


def _per_probe(values: Tensor, like: Tensor) -> Tensor:
    """[P] -> [P, 1, ...] with as many axes as the tensor."""
    return values.view(-1, *[1] * (like.ndim - 1))


class SGD:
    """Momentum as PyTorch has it: m <- momentum m + (g + wd w); w <- w - lr m.

    params: tensors [P, ...], changed in place. weight_decay: [P].
    """

    def __init__(self, params: Tensors, weight_decay: Tensor, *, momentum: float = 0.9):
        self.params, self.weight_decay, self.momentum = dict(params), weight_decay, momentum
        self.decayed = bool((weight_decay != 0).any())
        self.speed = {n: torch.zeros_like(p) for n, p in self.params.items()}

    def with_decay(self, weight: Tensor, grad: Tensor) -> Tensor:
        """g + wd w, [P, ...]."""
        if not self.decayed or weight.ndim <= 2:
            return grad
        return grad + _per_probe(self.weight_decay, weight) * weight

    def trust_ratio(self, weight: Tensor, grad: Tensor) -> Tensor | None:
        """Factor of each probe's gradient, [P]; None: 1."""
        return None

    @torch.no_grad()
    def step(self, grads: Tensors, lr: Tensor) -> None:
        """grads: by the names of the parameters, [P, ...]; lr: of this step, [P]."""
        for name, weight in self.params.items():
            grad = self.with_decay(weight, grads[name])
            ratio, speed = self.trust_ratio(weight, grad), self.speed[name].mul_(self.momentum)
            # Scaled while it is added: a scaled copy would take longer than all the rest.
            speed.add_(grad) if ratio is None else speed.addcmul_(grad, _per_probe(ratio, grad))
            weight.addcmul_(_per_probe(lr, weight), speed, value=-1)


class LARS(SGD):
    """LARS as in MoCo v3 and MAE (`util/lars.py`): the gradient of a matrix is scaled to `trust` of the weight's norm.

    Of tensors with more than one axis: g <- g + wd w; q = trust |w| / |g|, 1 where either norm is 0; g <- q g. Then for
    all m <- momentum m + g; w <- w - lr m: the rate acts behind the momentum, unlike in You et al., 2017.
    """

    def __init__(self, params: Tensors, weight_decay: Tensor, *, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, weight_decay, momentum=momentum)
        self.trust = trust

    def trust_ratio(self, weight: Tensor, grad: Tensor) -> Tensor | None:
        if weight.ndim <= 2:
            return None
        w, g = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (weight, grad))
        return torch.where((w > 0) & (g > 0), self.trust * w / g, 1.0)


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter, 2019), bias-corrected as PyTorch's. Arguments as `SGD`'s."""

    def __init__(
        self, params: Tensors, weight_decay: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        self.params, self.weight_decay, self.betas, self.eps = dict(params), weight_decay, betas, eps
        self.first, self.second = ({n: torch.zeros_like(p) for n, p in self.params.items()} for _ in range(2))
        self.steps = 0

    @torch.no_grad()
    def step(self, grads: Tensors, lr: Tensor) -> None:
        self.steps += 1
        (beta1, beta2), correct = self.betas, [1 - beta**self.steps for beta in self.betas]
        for name, weight in self.params.items():
            grad, rate = grads[name], _per_probe(lr, weight)
            if weight.ndim > 2:
                weight.mul_(1 - rate * _per_probe(self.weight_decay, weight))
            first = self.first[name].lerp_(grad, 1 - beta1)
            second = self.second[name].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            weight.addcmul_(rate / correct[0], first / ((second / correct[1]).sqrt_().add_(self.eps)), value=-1)


OPTIMIZERS = {"lars": LARS, "sgd": SGD, "adamw": AdamW}


def build_optimizer(name: str, params: Tensors, weight_decay: Tensor, **options: object) -> SGD | LARS | AdamW:
    """By name; options: momentum, trust; momentum; betas, eps."""
    if name not in OPTIMIZERS:
        raise ProbeError(f"no optimizer {name!r} for probes; use one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](params, weight_decay, **options)
