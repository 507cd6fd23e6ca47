"""Objectives (= SSL methods), one file each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .objective import Objective

NAMES = {
    "mae": "mae:MAE",
    "dino": "dino:DINO",
    "ibot": "ibot:IBOT",
    "selfpatch": "selfpatch:SelfPatch",
    "odis": "odis:ODIS",
    "ijepa": "ijepa:IJEPA",
    "dmt_jepa": "dmt_jepa:DMTJEPA",
    "cim": "cim:CIM",
    "glare": "glare:GLARE",
}


def build_objective(cfg: Any, *, total_steps: int, steps_per_epoch: float) -> Objective:
    """The objective named by a resolved config, with its backbone."""
    module, cls = NAMES[cfg.objective.name].split(":")
    objective = getattr(importlib.import_module(f".{module}", __package__), cls)
    return objective.build(cfg, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
