"""Judging the backbone while it trains: k-NN, rank and deviation, pictures; and the backbone that is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from ..backbones.tokens import Backbone
from ..data.source import Source
from ..nn.global_batchnorm import reestimate
from ..views.photo import prepare
from ..views.spec import Batch
from . import pictures
from .module import Module
from .online import Online

PICTURE_SAMPLES = 8
BATCHNORM_IMAGES = 1024


class Judge:
    """Everything on rank 0 that looks at the backbone without changing the training state.

    batch_at: the micro-batch at a range of fixed positions of the training data, None for a stream.
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
        total_steps: int,
    ):
        self.cfg, self.module, self.device, self.batch_at, self.folder = cfg, module, device, batch_at, folder
        self.total_steps = total_steps
        train = train or val
        self.online = Online(cfg, train, val) if train is not None else None

    def backbone(self) -> Backbone:
        """The backbone to judge and export.

        Masked training spoils BatchNorm's running statistics: then it is a copy, re-estimated on clean images of
        fixed positions (of a stream: on the last batch). The training state is not touched.
        """
        backbone = next(iter(self.module.objective.exports().values()))
        norms = any(isinstance(m, _BatchNorm) for m in backbone.timm.modules())
        if not norms or self.module.objective.needs.hide is None:
            return backbone
        size = min(128, self.cfg.batch_size)
        if self.batch_at is not None:
            ranges = (range(i * size, (i + 1) * size) for i in range(max(1, BATCHNORM_IMAGES // size)))
            batches = map(self._prepared, ranges)
        else:
            batches = map(self._prepare, self.module.last_batches)
        return reestimate(backbone, lambda m, x: m(x), (next(iter(b["images"].values()))[0] for b in batches))

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """{"knn" (with labels), "rankme", "feature_std"} of the backbone as it is now; pictures beside them."""
        training = self.module.training
        self.module.eval()
        try:
            if self.online is None or (self.batch_at is None and not self.module.last_batches):
                return {}
            backbone = self.backbone()
            numbers = self.online.evaluate(
                backbone, self._list(self.module.mean), self._list(self.module.std), self.device
            )
            if step == 0 and "knn" in numbers:
                numbers["knn_raw_pixels"] = self.online.raw_pixels()
            self.draw(backbone, step)
        finally:
            self.module.train(training)
        return numbers

    def draw(self, backbone: Backbone, step: int) -> list[Path]:
        """Write the pictures of this step, if it has any."""
        every = self.cfg.pictures.every_n_steps
        if self.batch_at is None or every == 0 or (every and step % every and step != self.total_steps):
            return []
        batch = self._prepared(range(min(PICTURE_SAMPLES, self.cfg.batch_size)))
        objective, mean, std = self.module.objective, self._list(self.module.mean), self._list(self.module.std)
        batch = objective.draw(batch, step)
        return pictures.write(objective, backbone, batch, self.folder / "pictures", step, mean=mean, std=std)

    def _prepared(self, positions: range) -> Batch:
        return self._prepare(self.batch_at(positions))

    @torch.no_grad()
    def _prepare(self, batch: Batch) -> Batch:
        tensors = {k: v for k, v in batch.items() if k != "events"}
        module = self.module.to(self.device)
        return prepare(tree_map(lambda t: t.to(self.device), tensors), module.views, module.mean, module.std)

    @staticmethod
    def _list(values: torch.Tensor) -> list[float]:
        return values.tolist()
