"""One object of an image as patches of the evaluation crop: what the pooled feature of a masked probe may look at.

ODIS (Hizli et al., 2025, arXiv 2506.05409, evaluation by k-NN with masked attention at inference): the feature is
`backbone(images, focus=rows).pooled`, with rows by the rule of training (`views.objects.patches`). On a ViT the class
token's attention row is restricted in every block; families without such a token average the object's positions, or ask
the read-out that was trained beside them (`Backbone.read_out`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError
from ..data.objects import object_map
from ..data.source import Raw, Source
from ..views.objects import TOUCH, Region, patches
from ..views.spec import Cells
from . import ProbeError

WHICH = {"largest": "the largest in the crop", "first": "the one with the smallest id in the crop"}
THRESHOLD = 0.25  # share of a patch that the object must cover, as in training


class ObjectRows(NamedTuple):
    """Patches of one object per image. choice: "largest" (by area in the crop) or "first" (smallest id there)."""

    choice: str
    grid: tuple[int, int]

    def __call__(self, raw: Raw, box: np.ndarray, height: int, width: int) -> Tensor | None:
        """bool [N], row-major, for the crop `box` (y0 x0 y1 x1 in pixels of the height x width image).

        None if the crop shows no object. SampleError if the sample's object map or boxes cannot be used.
        """
        ids = object_map(raw)
        region = None if ids is None else self._choose(ids, box, height, width)
        if region is None:
            return None
        on = patches(region, box, height, width, Cells("probe", self.grid, threshold=THRESHOLD))
        return torch.from_numpy(on.astype(bool)).flatten() if on.any() else None

    def _choose(self, ids: np.ndarray, box: np.ndarray, height: int, width: int) -> Region | None:
        rows, columns = ids.shape
        y0, x0, y1, x1 = box.tolist()
        # Whole pixels of the map that the crop touches: a small superset of what it shows; exact areas decide.
        seen = ids[int(y0 * rows / height) : math.ceil(y1 * rows / height),
                   int(x0 * columns / width) : math.ceil(x1 * columns / width)]  # fmt: skip
        numbers = np.flatnonzero(np.bincount(seen.ravel()))
        regions = [Region(ids, int(number)) for number in numbers if number]
        shown = [(region.area(box, height, width), region) for region in regions]
        shown = [(area, region) for area, region in shown if area > TOUCH]
        if not shown:
            return None
        return shown[0][1] if self.choice == "first" else max(shown, key=lambda pair: pair[0])[1]


@torch.no_grad()
def object_rows(model: nn.Module, choice: str, size: int, channels: int = 3) -> ObjectRows | None:
    """The rule for images of this side, None for choice "none". `model` is in eval mode, where it will run.

    ProbeError where the pooled feature cannot be restricted to patches; asked of the backbone itself, by one call.
    """
    if choice == "none":
        return None
    if not isinstance(model, Backbone):
        raise ProbeError(f"probe.masks={choice} needs the checkpoint of a run folder: a plain timm model cannot "
                         "restrict its pooled feature to some patches; use checkpoint=<run folder>")  # fmt: skip
    if size % model.cell:
        near = max(1, round(size / model.cell)) * model.cell
        raise ProbeError(f"probe.masks={choice} needs an image_size that cells of {model.cell} px fill, and {size} is "
                         f"no multiple of it; use image_size={near}")  # fmt: skip
    grid = model.grid(size)
    image = next(model.parameters()).new_zeros(1, channels, size, size)
    try:
        tokens = model(image, focus=torch.ones(1, math.prod(grid), dtype=torch.bool, device=image.device))
    except BackboneError as error:
        raise ProbeError(f"probe.masks={choice} cannot be had: {error}") from error
    if not tokens.prefix.shape[1] or not torch.equal(tokens.prefix[:, 0], tokens.pooled):
        raise ProbeError(f"probe.masks={choice} restricts the class token, and this backbone's pooled feature is the "
                         "mean of its patch tokens instead; use a run whose objective trains the class token (dino, "
                         "ibot, odis), or probe.masks=none")  # fmt: skip
    return ObjectRows(choice, grid)


def need_objects(choice: str, train: Source, test: Source) -> None:
    """ProbeError if masks are wanted and bank or queries come without any."""
    for source in (train, test) if choice != "none" else ():
        if not source.has_objects:
            hint = "" if source is train else "; without data.val a fifth of data.train is held out and tested on"
            raise ProbeError(
                f"probe.masks={choice} needs object masks, and {source.describe} has none: shards hold them as "
                f"<key>.objects.png or <key>.boxes.json, and data.objects names side-cars of data.train{hint}"
            )
