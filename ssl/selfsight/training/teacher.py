"""The teacher: a copy of the student that follows it slowly (Tarvainen & Valpola, NeurIPS 2017)."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def make_teacher(student: nn.Module, share: Collection[str] = ()) -> nn.Module:
    """A deep copy without gradients. Frozen parameters, and those named in `share`, are the student's own objects:
    they are stored once, and the average has nothing to do there. Buffers (BatchNorm's statistics) are copied."""
    own = {id(p): p for name, p in student.named_parameters() if name in share or not p.requires_grad}
    teacher = copy.deepcopy(student, dict(own))
    for parameter in teacher.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return teacher


def set_mode(teacher: nn.Module, training: bool) -> None:
    """BatchNorm follows the student's mode (batch statistics make the targets); dropout and drop path never act."""
    for module in teacher.modules():
        module.training = training and isinstance(module, _BatchNorm)


class Ema:
    """The pairs of parameters of which the teacher's follows the student's."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t is not s]
        self.teacher, self.student = [t for t, _ in pairs], [s for _, s in pairs]

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in their own precision."""
        torch._foreach_mul_(self.teacher, momentum)
        torch._foreach_add_(self.teacher, self.student, alpha=1 - momentum)
