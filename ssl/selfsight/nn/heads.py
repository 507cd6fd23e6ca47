"""Heads: from a feature to logits over learned prototypes (DINO, iBOT, SelfPatch, ODIS); MLPs of MoCo v3 (CIM)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..backbones.tokens import allow_graphs
from .global_batchnorm import GlobalBatchNorm1d


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: [*, b] -> [*, K], rows g * v / |v| (Salimans & Kingma, 2016).

    learn_scale: g is trained; else it is fixed at 1 and the logits of unit vectors are cosines. Names are those of
    torch's old `weight_norm`, in which the reference checkpoints are stored.
    """

    def __init__(self, dim: int, num_prototypes: int, learn_scale: bool = False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=learn_scale)
        # PyTorch's default start of a linear layer, as in the reference, which initialises before it adds this one.
        self.weight_v = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        # What torch's own weight norm calls: one pass forward and one backward over the largest matrix of a step.
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PrototypeHead(nn.Module):
    """MLP with GELU to a bottleneck, length 1, prototypes: [*, D] -> [*, K] (DINO, section 3.1; iBOT).

    patch_prototypes: a second layer of prototypes on the same MLP (iBOT's unshared head); None: patches use the
    first. batch_norm: before each GELU, over all processes. weight_norm: False for a plain linear last layer (DINOv3).
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        learn_scale: bool = False,
        weight_norm: bool = True,
        patch_prototypes: int | None = None,
    ):
        super().__init__()
        self.num_prototypes = num_prototypes
        self.num_patch_prototypes = patch_prototypes or num_prototypes
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths), 1):
            parts.append(nn.Linear(a, b))
            if i < layers:
                parts += [GlobalBatchNorm1d(b)] * batch_norm + [nn.GELU()]
        self.mlp = nn.Sequential(*parts)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        def prototypes(count: int) -> nn.Module:
            plain = nn.Linear(bottleneck, count, bias=False)
            return Prototypes(bottleneck, count, learn_scale) if weight_norm else plain

        self.last_layer = prototypes(num_prototypes)
        self.last_layer2 = prototypes(patch_prototypes) if patch_prototypes else None
        self.embed_fn, self.score_fn = run_mlp, run_prototypes

    def embed(self, x: Tensor) -> Tensor:
        """Features [*, D] -> unit vectors at the bottleneck, [*, b]."""
        return self.embed_fn(self.mlp, x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def score(self, z: Tensor, patch: bool = False) -> Tensor:
        """Vectors at the bottleneck [*, b] -> logits [*, K]; patch: over the prototypes of patches."""
        last = self.last_layer2 if patch and self.last_layer2 is not None else self.last_layer
        return self.score_fn(last, z)

    def forward(self, x: Tensor, patch: bool = False) -> Tensor:
        """Features [*, D] -> logits [*, K]."""
        return self.score(self.embed(x), patch)

    def freeze_last(self) -> None:
        """Drop the prototypes' gradients: with None (not zero) AdamW touches neither weights nor moments."""
        for layer in (self.last_layer, self.last_layer2):
            if layer is not None:
                layer.zero_grad(set_to_none=True)

    def compile_blocks(self, **kwargs) -> None:
        """Compile the two halves of the head."""
        allow_graphs()
        self.embed_fn = torch.compile(self.embed_fn, **kwargs)
        self.score_fn = torch.compile(self.score_fn, **kwargs)


def run_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """[R, D] -> unit vectors [R, b]. The reference divides by max(norm, 1e-12), which half precision cannot hold."""
    return F.normalize(mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)


def run_prototypes(last: nn.Module, z: Tensor) -> Tensor:
    """[*, b] -> [*, K]."""
    return last(z)


def batch_norm_mlp(widths: Sequence[int]) -> nn.Sequential:
    """MoCo v3's projector and predictor (Chen et al., ICCV 2021): linear layers without bias, a BatchNorm over all
    processes behind each, ReLU between; the last norm has no gain."""
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths), 2):
        last = i == len(widths)
        parts += [nn.Linear(a, b, bias=False), GlobalBatchNorm1d(b, affine=not last)] + [nn.ReLU()] * (not last)
        nn.init.xavier_uniform_(parts[3 * (i - 2)].weight)
    return nn.Sequential(*parts)
