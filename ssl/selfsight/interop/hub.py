"""timm models with their pretrained weights, from the hub or its cache."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from .safe import WeightsError


def pretrained(name: str, **kwargs: Any) -> nn.Module:
    """timm's model of this name, headless, in eval mode; WeightsError where it or its weights cannot be had."""
    return _create(name, pretrained=True, **kwargs).eval()


def is_fixed(name: str) -> bool:
    """Whether the model of this name takes images of one size, to be said when it is built."""
    return bool(_create(name, pretrained=False).pretrained_cfg.get("fixed_input_size"))


def _create(name: str, **kwargs: Any) -> nn.Module:
    if "/" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise WeightsError(
            f"{name} is neither a file, a folder nor a timm model (nearest: {', '.join(near) or 'none'})"
        )
    try:
        return timm.create_model(name, num_classes=0, **kwargs)
    except Exception as error:  # timm, the hub client and the network each raise their own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"the pretrained weights of timm's {name} cannot be had here ({why})") from error
