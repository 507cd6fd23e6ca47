"""The glue between an objective and Lightning's loop; nothing here knows about resuming or files."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError
from ..faults import fault
from ..nn.losses import world_size
from ..objectives.objective import Objective
from ..views.photo import prepare
from ..views.spec import Batch
from .optim import build_adamw, clip_per_tensor, load_optimizer_state, param_groups
from .schedules import Schedule
from .sharded import norms_of_all, shard
from .teacher import local


class Module(pl.LightningModule):
    """objective + schedules + one integer, `step`: the number of optimizer steps that this run has taken."""

    def __init__(
        self,
        objective: Objective,
        optim: Any,
        lr: Schedule,
        *,
        weight_decay: Schedule | None = None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        step: int = 0,
        optimizer_state: dict[str, Tensor] | None = None,
        scaler_state: dict | None = None,
    ):
        super().__init__()
        self.objective, self.optim, self.step = objective, optim, step
        self.lr, self.weight_decay = lr, weight_decay or (lambda step: optim.weight_decay)
        self.views = objective.views()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self._optimizer_state, self._scaler_state = optimizer_state, scaler_state
        self.recent: deque[tuple[int, Tensor, Batch]] = deque(maxlen=4)  # (step, finite loss, batch), for reports
        self.last_logs: dict[str, Tensor] = {}
        self.finite: Tensor | None = None  # all steps so far, on all processes; on the device, read one step later
        self.checks: deque[tuple[int, Tensor]] = deque(maxlen=2)  # what `_guard` found in the last steps
        self.sharded = False

    def configure_model(self) -> None:
        """Cut the objective into shards where the strategy has prepared a mesh of processes for them."""
        if self._device_mesh is not None and not self.sharded:
            shard(self.objective, self._device_mesh["data_parallel"])
            self.sharded = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.sharded and hasattr(self.objective, "ema"):  # its parameters are others now
            self.objective.ema.bind()
        groups = param_groups(self.objective, self.optim.weight_decay, self.optim.decay_rule)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # One kernel per step, on CPUs too, where torch would loop over parameters. Not with a scaler: a fused optimizer
        # unscales float16 gradients itself, after we would have clipped them.
        fused = self.device.type in ("cpu", "cuda") and scaler is None
        optimizer = build_adamw(groups, self.optim.lr, self.optim.betas, self.optim.eps, fused=fused)
        if self._optimizer_state is not None:
            load_optimizer_state(optimizer, self._optimizer_state)
            self._optimizer_state = None
        if scaler is not None and self._scaler_state is not None:
            scaler.load_state_dict(self._scaler_state)
        return optimizer

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        events = batch.pop("events", [])
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved | {"events": events}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            ready = prepare(batch, self.views, self.mean, self.std)
            ready = self.objective.draw(ready, self.step)
        loss, logs = self.objective.loss(ready, self.step)
        finite = torch.isfinite(loss.detach())
        self.recent.append((self.step, finite, batch))
        self.last_logs = logs
        fault("step.forward", self.step)
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.objective.after_backward(self.step)
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        if not parameters:
            return
        norms = torch._foreach_norm([local(p.grad) for p in parameters])
        if self.sharded:
            norms = norms_of_all(norms)
        total = torch.linalg.vector_norm(torch.stack(norms))
        self._guard(optimizer, total)
        if not self.optim.clip:  # 0: off, whatever the recipe says
            return
        if self.optim.clip_mode == "per_tensor":
            clip_per_tensor(parameters, self.optim.clip, norms)
        else:
            scale = torch.clamp(self.optim.clip / (total + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([local(p.grad) for p in parameters], scale)

    def _guard(self, optimizer: Any, norm: Tensor) -> None:
        """Nothing that is not finite reaches the weights: a fused optimizer skips its step by a flag on the device, so
        that the host need not wait for it. With a scaler infinite gradients are usual, and it does this itself.

        All processes decide alike: a sum may overflow in the loss of one whose gradients are finite.
        """
        fused = optimizer.param_groups[0].get("fused")
        loss = torch.stack([finite for step, finite, _ in self.recent if step == self.step]).all()
        finite = loss & torch.isfinite(norm) if fused else loss
        found = torch.stack([finite.long(), torch.where(loss, world_size(), self.global_rank)])
        if world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        self.checks.append((self.step, found))  # [1 if all is finite, the first process with a loss that is not]
        finite = found[0].bool()
        self.finite = finite if self.finite is None else self.finite & finite
        if fused:
            optimizer.found_inf = (~self.finite).float()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        lr, decay = self.lr(self.step), self.weight_decay(self.step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            group["weight_decay"] = decay if group["decayed"] else 0.0
        optimizer.step(closure=optimizer_closure)
        fault("step.update", self.step)
        if self.finite is None or self.finite.device.type == "cuda" or bool(self.finite):
            self.objective.after_step(self.step)
        self.step += 1


def micro_batches(batch_size: int, world: int, max_per_device: int | None) -> int:
    """Micro-batches per optimizer step; ConfigError says which numbers would divide."""
    if batch_size % world:
        fits = [n for n in range(1, world + 1) if batch_size % n == 0]
        raise ConfigError(
            f"batch_size={batch_size} does not divide by {world} processes; use a multiple of {world}, "
            f"or {', '.join(map(str, fits[-3:]))} processes"
        )
    local = batch_size // world
    count = 1 if not max_per_device else math.ceil(local / max_per_device)
    while local % count:
        count += 1
    return count
