"""Means of what the objective measures, from one row of the log to the next, whoever interrupts them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Means:
    """Sums over the micro-batches of this process since the last row, each with its own count."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """logs: name -> number [], of one micro-batch; not waited for."""
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0) + value.to(_wide(value.device))
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self, device: torch.device) -> dict[str, float]:
        """Means over micro-batches and processes, which begin anew. A collective."""
        found = {name: total / self.counts[name] for name, total in self._over_processes(device).items()}
        self.sums, self.counts = {}, {}
        return found

    def state(self, per_step: int, device: torch.device) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) in steps, of which each has `per_step` micro-batches: what a checkpoint keeps of a row
        that is not full. A collective but right after a row, where it is empty: rank 0 alone saves what it found best.
        """
        sums = self._over_processes(device)
        return {name: (total / per_step, self.counts[name] / per_step) for name, total in sums.items()}

    def restore(self, state: Mapping[str, tuple[float, float]], per_step: int, device: torch.device) -> None:
        """Continue from `state`, also in other numbers of processes and micro-batches."""
        for name, (total, count) in state.items():
            self.sums[name] = torch.tensor(total * per_step, dtype=_wide(device), device=device)
            self.counts[name] = count * per_step

    def _over_processes(self, device: torch.device) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = torch.stack([self.sums[n].to(device).reshape(()) for n in names])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
            values = values / dist.get_world_size()
        return dict(zip(names, values.tolist(), strict=True))


def _wide(device: torch.device) -> torch.dtype:
    """float64, so that a row has the same digits wherever it was interrupted; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64
