"""Parameter groups, AdamW, and optimizer state that is saved by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..objectives.objective import Objective
from .sharded import part_of
from .teacher import is_sharded, local


def decays(name: str, parameter: Tensor, no_decay: Iterable[str], rule: str) -> bool:
    """Whether weight decay applies. rule `default`: not to biases, norms (1-D), tokens and positions.

    rule `official` is timm 0.3.2's, which MAE, FCMAE and others were published with: only 1-D tensors and biases are
    exempt, so class and mask tokens are decayed.
    """
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return rule == "official" or name not in no_decay


def param_groups(objective: Objective, weight_decay: float, rule: str = "default") -> list[dict]:
    """Two groups, decayed and not, of all parameters that require a gradient; `names` stand beside `params`."""
    no_decay = objective.no_decay()
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    groups = []
    for decayed in (True, False):
        members = [(n, p) for n, p in named if decays(n, p, no_decay, rule) is decayed]
        if members:
            groups.append(
                {
                    "params": [p for _, p in members],
                    "names": [n for n, _ in members],
                    "weight_decay": weight_decay if decayed else 0.0,
                    "decayed": decayed,
                }
            )
    return groups


def build_adamw(
    groups: list[dict], lr: float, betas: tuple[float, float], eps: float, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW; `fused` takes the one-kernel form (CPU, CUDA), else torch chooses: a loop on CPUs, foreach on GPUs."""
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused or None)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors by `<parameter name>//<slot>`; a parameter that never stepped has no entry."""
    flat = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                flat[f"{name}//{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def load_optimizer_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_state`; KeyError names a parameter that does not exist here."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, slot = key.rsplit("//", 1)
        slots.setdefault(name, {})[slot] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name not in slots:
                continue
            state = {}
            for slot, value in slots.pop(name).items():
                # AdamW keeps its step count on the CPU unless it is fused.
                keep = slot == "step" and not group.get("fused")
                state[slot] = value.clone() if keep else value.to(parameter.device, copy=True)
                if is_sharded(parameter) and value.ndim:
                    state[slot] = part_of(value, parameter)
            optimizer.state[parameter] = state
    if slots:
        raise KeyError(f"the checkpoint's optimizer state names parameters that do not exist here: {sorted(slots)[:3]}")


def clip_per_tensor(parameters: Iterable[nn.Parameter], max_norm: float, norms: Sequence[Tensor] | None = None) -> None:
    """Scale each gradient to at most `max_norm` on its own (the DINO reference's way), without a host sync.

    norms: of the gradients that are there, where they are known."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if grads:
        norms = torch._foreach_norm(grads) if norms is None else norms
        torch._foreach_mul_(grads, [(max_norm / (n + 1e-6)).clamp(max=1.0) for n in norms])
