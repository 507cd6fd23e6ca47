"""Judging the backbone while it trains: k-NN, rank and deviation, pictures; and the backbone that is exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from ..backbones.tokens import Backbone
from ..data.source import DataError, Source
from ..nn.global_batchnorm import reestimate
from ..objectives.objective import Objective
from ..probes.bank import frozen
from ..views.photo import prepare
from ..views.spec import Batch
from . import pictures
from .module import Module
from .online import Online

PICTURE_SAMPLES = 8
BATCHNORM_IMAGES = 1024


class Judge:
    """Everything on rank 0 that looks at the backbone without changing the training state.

    measure: whether it will be asked for numbers: a bank and queries are decoded beforehand. batch_at: the micro-batch
    at a range of fixed positions of the training data, None for a stream.
    """

    def __init__(
        self,
        cfg: Any,
        module: Module,
        device: torch.device,
        *,
        train: Source | None,
        val: Source | None,
        batch_at: Callable[[range], Batch] | None,
        folder: Path,
        measure: bool,
    ):
        self.cfg, self.module, self.device, self.batch_at, self.folder = cfg, module, device, batch_at, folder
        self.online, self.describe = None, "no (a stream needs data.val for it)"
        if measure and (train or val) is not None:
            try:
                self.online = Online(cfg, train or val, val)
                self.describe = self.online.describe
            except DataError as error:  # training does not depend on it
                self.describe = f"no ({error})"

    def backbone(self, which: str | None = None) -> Backbone:
        """The backbone to judge and export (None: the default one); see `clean`. For a stream, statistics come from the
        last batch."""
        exports = self.module.objective.exports()
        backbone = exports[which or next(iter(exports))].to(self.device)  # a twin of shards: no more than is looked at
        fresh = self.module.step == 0 and has_batchnorm(backbone)  # zeros and ones are nobody's statistics
        if not fresh and not spoiled(self.module.objective, backbone):
            return backbone
        if self.batch_at is not None:
            return clean(backbone, map(self._prepared, fixed_ranges(self.cfg.batch_size)))
        return clean(backbone, (self._prepare(batch) for _, _, batch in self.module.recent))

    @torch.compiler.set_stance("force_eager")  # other batch sizes would each compile another graph
    @torch.no_grad()
    def evaluate(self, step: int, measure: bool = True, draw: bool = True) -> dict[str, float]:
        """{"knn" (with labels), "rankme", "feature_std"} of the backbone as it is now, and its pictures."""
        training = self.module.training
        self.module.eval()
        try:
            if self.batch_at is None and not self.module.recent:
                return {}
            backbone, numbers = self.backbone(), {}
            if measure and self.online is not None:
                mean, std = self.module.mean.tolist(), self.module.std.tolist()
                numbers = self.online.evaluate(backbone, mean, std, self.device)
                if step == 0 and "knn" in numbers:
                    numbers["knn_raw_pixels"] = self.online.raw_pixels()
            if draw and self.batch_at is not None:
                self._draw(backbone, step)
        finally:
            self.module.train(training)
        return numbers

    @torch.no_grad()
    def copy(self, which: str | None = None) -> Backbone:
        """The backbone as it is now, in eval mode: nothing that is done to it reaches the training."""
        with frozen(self.module):
            return copy.deepcopy(self.backbone(which)).eval()

    def _draw(self, backbone: Backbone, step: int) -> list[Path]:
        self.module.to(self.device)
        batch = self._prepared(range(min(PICTURE_SAMPLES, self.cfg.batch_size)))
        objective, mean, std = self.module.objective, self.module.mean.tolist(), self.module.std.tolist()
        batch = objective.draw(batch, step)
        return pictures.write(objective, backbone, batch, self.folder / "pictures", step, mean=mean, std=std)

    def _prepared(self, positions: range) -> Batch:
        return self._prepare(self.batch_at(positions))

    @torch.no_grad()
    def _prepare(self, batch: Batch) -> Batch:
        tensors = {k: v for k, v in batch.items() if k != "events"}
        mean, std = self.module.mean.to(self.device), self.module.std.to(self.device)
        return prepare(tree_map(lambda t: t.to(self.device), tensors), self.module.views, mean, std)


def has_batchnorm(backbone: Backbone) -> bool:
    return any(isinstance(m, _BatchNorm) for m in backbone.timm.modules())


def spoiled(objective: Objective, backbone: Backbone) -> bool:
    """Whether training on hidden cells left the backbone with BatchNorm statistics of images that nobody will show.

    A teacher sees whole views; its own running statistics are what it is judged and exported with.
    """
    taught = objective.teacher is not None and any(m is backbone for m in objective.teacher.modules())
    return objective.needs.hide is not None and not taught and has_batchnorm(backbone)


def clean(backbone: Backbone, batches: Iterable[Batch]) -> Backbone:
    """A copy with statistics re-estimated on prepared batches of unmasked images; training is not touched."""
    images = (next(iter(batch["images"].values()))[0] for batch in batches)
    with torch.compiler.set_stance("force_eager"):
        return reestimate(backbone, lambda m, x: m(x), images)


def fixed_ranges(batch_size: int) -> Iterator[range]:
    """The positions whose images statistics are re-estimated on: about a thousand, the first of the stream."""
    size = min(128, batch_size)
    return (range(i * size, (i + 1) * size) for i in range(max(1, BATCHNORM_IMAGES // size)))
