"""The base of every objective: a plain `nn.Module` that works without Lightning."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, Needs
from ..nn.global_batchnorm import GlobalBatchNorm
from ..nn.recompute import recomputed
from ..views.spec import Batch, Views

Logs = dict[str, Tensor]


class Objective(nn.Module):
    """`loss, logs = objective(batch, step)`, which is `loss(draw(batch, step), step)`.

    All randomness is in `draw` (eager, on the device, from batch["key"]); `loss` is a pure function of the batch, so
    golden tests and pictures call it with masks of their own. Every hook below has a default that does nothing.
    """

    needs: ClassVar[Needs] = Needs()
    pictures_show: ClassVar[str] = "views"  # name of the files that `pictures` end in
    student: nn.Module
    teacher: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.teacher = None  # on the instance: a class attribute would hide a registered module of this name

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> Objective:
        """Build backbone and objective from a resolved config (schedules are functions of the step)."""
        raise NotImplementedError

    def views(self) -> Views:
        """The crops that a worker must cut."""
        raise NotImplementedError

    def draw(self, batch: Batch, step: int) -> Batch:
        """Add masks and geometry, drawn from batch["key"]."""
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        """The scalar to differentiate and detached scalars to log; no randomness, no host synchronisation."""
        raise NotImplementedError

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        return self.loss(self.draw(batch, step), step)

    def after_backward(self, step: int) -> None:
        """Once per optimizer step, before clipping: e.g. set the gradient of a frozen last layer to None."""

    def after_step(self, step: int) -> None:
        """Once per optimizer step, after the weights moved: centres, then EMA."""

    def compared(self) -> dict[str, str]:
        """What uses statistics over the images of a batch -> over which: "global" (all processes) or "rank".

        Under accumulation such a part sees a micro-batch instead of the batch, and the run says so.
        """
        return {"BatchNorm": "global"} if any(isinstance(m, GlobalBatchNorm) for m in self.modules()) else {}

    def exports(self) -> dict[str, Backbone]:
        """Backbones that can be exported and probed; the first is the default."""
        raise NotImplementedError

    def judged(self, name: str) -> Backbone:
        """One of `exports()`, as a loaded checkpoint is judged by k-NN with masks."""
        return self.exports()[name]

    def no_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that get no weight decay (tokens, positions)."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_token", "pos_embed", "mask_tokens"))}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of a prepared and drawn batch: name -> float [B, 3, H, W] in the units of batch["images"]."""
        return {}

    def checkpoint_blocks(self) -> None:
        """Recompute blocks of backbones, decoders and predictors in the backward pass instead of keeping what they
        computed; BackboneError where the backbone is not walked block by block."""
        for backbone in self.exports().values():
            if not backbone.wrap_walkers(lambda walker: walker):
                raise BackboneError(
                    f"trainer.checkpointing=true recomputes the blocks of ViT, ConvNeXt and SHViT, and "
                    f"{backbone.architecture} runs as a generic timm model; use trainer.checkpointing=false and a "
                    "smaller trainer.max_batch_per_device"
                )
        for module in self.modules():
            if module is not self and hasattr(module, "wrap_walkers"):
                module.wrap_walkers(recomputed)

    def compile(self, **kwargs) -> None:  # type: ignore[override]
        """Compile the hot regions (blocks of backbones and decoders); `draw` and `loss` themselves stay eager."""
        for module in self.modules():
            if module is not self and hasattr(module, "compile_blocks"):
                module.compile_blocks(**kwargs)
