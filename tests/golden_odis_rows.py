"""ODIS: which patches of a crop its object token may look at, against the recorded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from selfsight.views.objects import Region, patches
from selfsight.views.spec import Cells


def check_patch_row(info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A case `patch_row_*`: (JSON, tensors) as `golden_cases.load` gives them; exact.

    input.crop_masks: float [V, 1, H, H], the ids of the object in a crop (0 = none). output.obj_row: [V, 1, 2 + P],
    whose first two entries (class and object token) are always on. output.labels: [V, 1], 0 = objectless.
    """
    config = info["config"]
    side = config["H"] // config["patch"]
    cells = Cells("global", (side, side), "box", margin=config["bb_margin"])
    assert config["bb_margin_strategy"] == "fixed" and not config["divide_to_instances"]
    for crop, row, label in zip(tensors["input.crop_masks"], tensors["output.obj_row"], tensors["output.labels"]):
        ids = crop[0].numpy().astype(np.uint8)
        found = np.unique(ids[ids > 0])
        assert found.tolist() == [v for v in label.tolist() if v]
        box = np.array([0, 0, *ids.shape], np.float32)
        mine = [patches(Region(ids, int(number)), box, *ids.shape, cells) for number in found]
        mine = mine[0] if mine else np.zeros(cells.grid, np.uint8)
        assert row[0, :2].tolist() == [1, 1]
        assert mine.flatten().tolist() == row[0, 2:].tolist()
