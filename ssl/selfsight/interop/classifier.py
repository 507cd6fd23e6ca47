"""A fine-tuned classifier as a folder that timm opens, checked before it stands, as backbones are (`export.py`)."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from .card import write_card
from .export import TOLERANCE, ExportError, config_for, refuse_existing, swap


class Classifier(NamedTuple):
    """A timm model with its head, and what timm builds it from. names: of the classes, where they are known."""

    timm: nn.Module
    architecture: str
    model_args: Mapping[str, Any]
    classes: int
    names: tuple[str, ...] = ()


def export_classifier(
    model: Classifier,
    out: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    crop_pct: float,
    card: Mapping[str, Any],
) -> Path:
    """Write and verify the folder; returns `out`. An older one is replaced; ExportError if something else stands there,
    or if timm, given the folder alone, computes other logits."""
    refuse_existing(out, overwrite=True)
    config = config_for(model, mean=mean, std=std, image_size=image_size, crop_pct=crop_pct, card=card,
                        classes=model.classes)  # fmt: skip
    if len(model.names) == model.classes:
        config["pretrained_cfg"]["label_names"] = list(model.names)
    tmp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in model.timm.state_dict().items()}
        save_file(state, tmp / "model.safetensors", metadata={"format": "pt"})
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (tmp / "README.md").write_text(write_card(config, card, str(out)))
        _verify(model.timm, tmp, len(mean), image_size)
        swap(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


@torch.no_grad()
def _verify(model: nn.Module, folder: Path, channels: int, size: int) -> None:
    """ExportError unless timm gives the same logits on a fixed pattern, relative to the largest."""
    with torch.random.fork_rng(devices=[]):  # timm initialises before it loads
        opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    here = copy.deepcopy(model).cpu().eval()
    x = torch.linspace(-40, 40, 2 * channels * size**2).sin().view(2, channels, size, size)
    mine, theirs = here(x), opened(x)
    error = ((mine - theirs).abs().max() / mine.abs().max().clamp(min=1)).item()
    if not error <= TOLERANCE:  # also catches NaN
        raise ExportError(f"{folder}: timm gives other logits than the model in memory (difference {error:.1e}); "
                          "nothing was saved")  # fmt: skip
