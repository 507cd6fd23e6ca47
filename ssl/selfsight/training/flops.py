"""Model FLOPs of one training step and what share of the device's peak they are (MFU)."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..objectives.objective import Objective

# Dense peak, FLOP/s, of half-precision matrix products (vendor data sheets, without sparsity).
# Longer names first: the first one that is part of the device's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device at a precision; None where it is not known (never a guess)."""
    if not precision.startswith(("bf16", "16")):
        return None
    return next((v for k, v in PEAKS.items() if k in device_name), None)


def step_flops_per_image(objective: Objective, batch: int = 2) -> float:
    """FLOPs of forward and backward per image, counted on the meta device (where fused attention counts too).

    Recomputation, augmentation and the optimizer are not counted; cells that are dropped are not either.
    """
    memo = {
        id(t): torch.empty_like(t, device="meta").requires_grad_(t.requires_grad)
        for t in [*objective.parameters(), *objective.buffers()]
    }
    for old, new in list(zip(objective.parameters(), [memo[id(p)] for p in objective.parameters()], strict=True)):
        memo[id(old)] = torch.nn.Parameter(new.detach(), requires_grad=old.requires_grad)
    ghost = copy.deepcopy(objective, memo)
    views = objective.views()
    images = {c.name: torch.empty(c.count, batch, 3, c.size, c.size, device="meta") for c in views.crops}
    drawn = {"key": torch.zeros(batch, dtype=torch.int64, device="meta"), "images": images}
    drawn |= {name: torch.zeros(3, device="meta") for name in ("mean", "std")}
    drawn["boxes"] = {c.name: torch.zeros(c.count, batch, 4, device="meta") for c in views.crops}
    if views.cells:
        counts = {c.name: c.count for c in views.crops}
        drawn["cells"] = {c.name: torch.zeros(counts[c.name], batch, *c.grid, device="meta") for c in views.cells}
        drawn["has_object"] = torch.zeros(batch, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        loss, _ = ghost(drawn, 0)
        loss.backward()
    return counter.get_total_flops() / batch
