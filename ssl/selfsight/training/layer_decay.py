"""Layer-wise learning rates for fine-tuning: a parameter of layer i of L + 1 learns at decay^(L + 1 - i) of the rate.

As in BEiT and MAE (`util/lr_decay.py`) for ViT, and in ConvNeXt (`optim_factory.py`) for ConvNeXt V1 and V2: there
either one layer per block ("single") or the published 12 groups ("group"), which take the blocks of the third stage
three at a time. Names are timm's or those of the ConvNeXt reference. Any other timm model is cut into layers by timm's
own `group_matcher`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_STEM = re.compile(r"(cls_token|pos_embed|reg_token|mask_token|obj_token)$|patch_embed\.")
_TOKENS = re.compile(r"(^|\.)(cls_token|pos_embed|reg_token|dist_token)$")
_REFERENCE = ((r"^downsample_layers\.0\.", "stem."), (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."))


def vit_layer(name: str, depth: int) -> int:
    """0 for patch embedding, tokens and positions; i + 1 for block i; depth + 1 for final norm and head."""
    if _STEM.match(name):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def convnext_layer(name: str, depths: Sequence[int], mode: str = "single") -> int:
    """Layer of a ConvNeXt parameter; the last one (norm, head) is sum(depths) + 1, or 13 in mode "group".

    A downsampling layer belongs to the first block behind it, in mode "group" the stem comes before it.
    """
    if mode not in ("single", "group"):
        raise ValueError(f"layer decay mode {mode!r} of ConvNeXt; use single (a layer per block) or group (12 groups)")
    for pattern, new in _REFERENCE:
        name = re.sub(pattern, new, name)
    found = re.match(r"stages\.(\d)\.(?:downsample|(?:blocks\.)?(\d+))\.", name)
    if name.startswith("stem."):
        return 0 if mode == "group" else 1
    if not found:
        return 13 if mode == "group" else sum(depths) + 1
    stage, block = int(found[1]), int(found[2] or 0)
    if mode == "single":
        return sum(depths[:stage]) + block + 1
    return (1, 2, 3 + block // 3, 12)[stage]


def layer_scale(layer: int, last: int, decay: float) -> float:
    """Factor of the learning rate; 1 for the last layer."""
    return decay ** (last - layer)


def lr_scales(
    names: Iterable[str], decay: float, *, depth: int | None = None, depths: Sequence[int] = (), mode: str = "single"
) -> dict[str, float]:
    """Factor of the learning rate of every parameter name. depth: of a ViT; depths: of a ConvNeXt's stages."""
    if depth is not None:
        return {n: layer_scale(vit_layer(n, depth), depth + 1, decay) for n in names}
    last = 13 if mode == "group" else sum(depths) + 1
    return {n: layer_scale(convnext_layer(n, depths, mode), last, decay) for n in names}


def layers_of(model: nn.Module, mode: str = "single") -> tuple[dict[str, int], int]:
    """Layer of every parameter of a timm model, and the last layer. mode "group": ConvNeXt, else ValueError."""
    from timm.models import ConvNeXt, VisionTransformer, group_parameters

    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ConvNeXt):
        depths = [len(stage.blocks) for stage in model.stages]
        return {n: convnext_layer(n, depths, mode) for n in names}, 13 if mode == "group" else sum(depths) + 1
    if mode == "group":
        raise ValueError("the 12 groups of layers are those of ConvNeXt")
    if isinstance(model, VisionTransformer):
        return {n: vit_layer(n, len(model.blocks)) for n in names}, len(model.blocks) + 1
    found = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(found.values())
    return {n: found.get(n, last) for n in names}, last


def layered_groups(model: nn.Module, weight_decay: float, decay: float, mode: str = "single") -> list[dict[str, Any]]:
    """Parameter groups of a timm model with `lr_scale` by layer and `names` beside `params`.

    No weight decay for 1-D tensors, biases, tokens and positions, and what timm's `no_weight_decay` names.
    """
    from .optim import decays

    layers, last = layers_of(model, mode)
    patterns = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = [name] if _TOKENS.search(name) or any(fnmatch.fnmatch(name, p) for p in patterns) else []
        decayed, layer = decays(name, parameter, exempt, "default"), layers[name]
        group = groups.setdefault((layer, decayed), {
            "params": [], "names": [], "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": layer_scale(layer, last, decay),
        })  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
