"""Means of what the objective measures, from one row of the log to the next, whoever interrupts them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Means:
    """Sums over the micro-batches of this process since the last row."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """logs: name -> number [], of one micro-batch; not waited for."""
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0) + value.to(_wide(value.device))
        self.micro_batches += 1

    def take(self, device: torch.device) -> dict[str, float]:
        """Means over micro-batches and processes, which begin anew. A collective."""
        found = {name: total / self.micro_batches for name, total in self._over_processes(device).items()}
        self.sums, self.micro_batches = {}, 0
        return found

    def state(self, per_step: int, device: torch.device) -> dict | None:
        """What a checkpoint keeps of rows that are not full: sums over steps, of which each has `per_step`
        micro-batches. A collective; None right after a row."""
        if not self.micro_batches:
            return None
        sums = {name: total / per_step for name, total in self._over_processes(device).items()}
        return {"steps": self.micro_batches // per_step, "sums": sums}

    def restore(self, state: dict | None, per_step: int, device: torch.device) -> None:
        """Continue from `state`, also in other numbers of processes and micro-batches."""
        if state is not None:
            wide = _wide(device)
            self.sums = {k: torch.tensor(v * per_step, dtype=wide, device=device) for k, v in state["sums"].items()}
            self.micro_batches = state["steps"] * per_step

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
