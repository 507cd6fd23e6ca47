"""DMT-JEPA: I-JEPA whose targets are neighbourhoods (Mo & Yun, 2024, arXiv 2405.17995).

    loss = mean over blocks, their patches and dimensions of  smooth_l1( predictor(h(encoder(context)), block), target )
    target of a patch = teacher's h( mean of the image | the most similar of the patches around it )

h is a small head of attention in both roles: it aggregates neighbours into targets, and mixes the context's mean into
the context. It learns in the second role alone; the teacher's, which makes the targets, follows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.tokens import pick
from ..config import ConfigError, duration
from ..nn.class_attention import MeanAttention
from ..nn.losses import upcast
from ..nn.neighbours import top_neighbours
from . import ijepa
from .ijepa import IJEPA
from .objective import Logs

OWN = ("neighbours", "window", "border", "query", "include_self", "context_attn", "target_final_ln")


class DMTJEPA(IJEPA):
    """student / teacher: {"backbone", "aggregate"} and, where the head is narrower, "project"; predictor as in I-JEPA.

    query: what a target's residual stream starts from: the mean of its image, of another image of the batch
    ("permuted", as the reference mixes up its rows), or the patch itself. plain_steps: steps with I-JEPA's targets.
    """

    def __init__(
        self,
        *args: Any,
        neighbours: int = 4,
        window: int = 3,
        border: str = "clip",
        query: str = "same_image",
        include_self: bool = False,
        context_attn: str = "cross-attn",
        target_final_ln: bool = False,
        plain_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.neighbours, self.window, self.border, self.include_self = neighbours, window, border, include_self
        self.query, self.context_attn, self.target_final_ln = query, context_attn, target_final_ln
        self.plain_steps = plain_steps

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> DMTJEPA:
        o = cfg.objective
        if o.neighbours > (most := o.window**2 - (not o.include_self)):
            raise ConfigError(
                f"objective.neighbours={o.neighbours} is more than the {most} of objective.window={o.window}"
            )
        backbone = ijepa.jepa_backbone(cfg, cls.needs)
        dim = o.head_dim or backbone.embed_dim
        head = MeanAttention.on(backbone, dim, layers=o.head_blocks, mlp_ratio=o.head_mlp_ratio)
        student = nn.ModuleDict({"backbone": backbone, "aggregate": head})
        if dim != backbone.embed_dim:
            student["project"] = nn.Linear(backbone.embed_dim, dim)
        return cls(
            student, *ijepa.parts(cfg, backbone, total_steps, dim),
            plain_steps=duration(o.target_warmup).steps(total_steps, steps_per_epoch), **{k: o[k] for k in OWN},
            **ijepa.settings(cfg),
        )  # fmt: skip

    def encode(self, images: Tensor, context: Tensor, drop: Tensor | None = None) -> Tensor:
        head: MeanAttention = self.student["aggregate"]
        tokens = projected(self.student, super().encode(images, context, drop))
        return head.mix(tokens, mean=self.context_attn == "cross-attn")

    def seen_by_teacher(self, images: Tensor) -> Tensor:
        return upcast(projected(self.teacher, super().seen_by_teacher(images)))

    def targets(self, features: Tensor, ids: Tensor, step: float = math.inf) -> Tensor:
        """Neighbourhoods of the tokens ids int64 [B, M] in the teacher's features [B, N, D]: [B, M, D].

        Keys and values are projected once per token and shared by the neighbourhoods that it is in.
        """
        if step < self.plain_steps:
            return super().targets(features, ids, step)
        head: MeanAttention = self.teacher["aggregate"]
        around, valid = top_neighbours(
            features, self.student["backbone"].grid(self.image_size), self.neighbours, window=self.window,
            border=self.border, include_self=self.include_self,
        )  # fmt: skip
        valid = pick(valid, ids) if self.border == "clip" else None
        out = head.normed(head.aggregate(head.project(features), pick(around, ids), valid, self.start(features, ids)))
        return upcast(F.layer_norm(out, out.shape[-1:]) if self.target_final_ln else out)

    def start(self, features: Tensor, ids: Tensor) -> Tensor:
        """Queries of the targets at ids [B, M]: [B, M or 1, D]."""
        if self.query == "patch":
            return pick(features, ids)
        mean = features.mean(1, keepdim=True)
        if self.query == "same_image":
            return mean
        images, tokens = features.shape[:2]
        row = torch.arange(images, device=ids.device)[:, None] * tokens + ids
        return mean[:, 0][row % images]

    def health(self, features: Tensor, target: Tensor, ids: Tensor, context: int) -> Logs:
        """Also the variance of the targets within an image, and that of I-JEPA's in their place."""
        within = {"target_variance": target.var(1).mean(), "plain_variance": pick(features, ids).var(1).mean()}
        return super().health(features, target, ids, context) | within


def projected(net: nn.ModuleDict, tokens: Tensor) -> Tensor:
    """Tokens in the head's width."""
    return net["project"](tokens) if "project" in net else tokens
