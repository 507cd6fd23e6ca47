"""The teacher: a copy of the student that follows it slowly (Tarvainen & Valpola, NeurIPS 2017)."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
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


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it (a DTensor, whose module only runs of several processes load)."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor (the same memory), without a gradient; other tensors as they are."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


class Ema:
    """The pairs of parameters of which the teacher's follows the student's."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        self.networks = teacher, student
        self.bind()

    def bind(self) -> None:
        """Find the parameters; again after they were replaced (sharded), where each process averages its own shards."""
        pairs = [(t, s) for t, s in zip(*(net.parameters() for net in self.networks), strict=True) if t is not s]
        self.teacher, self.student = ([local(p) for p in side] for side in (zip(*pairs) if pairs else ((), ())))

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in their own precision."""
        torch._foreach_mul_(self.teacher, momentum)
        torch._foreach_add_(self.teacher, self.student, alpha=1 - momentum)
