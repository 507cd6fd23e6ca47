"""From a frozen backbone to a timm classifier that fine-tuning trains: the same weights, a fresh head, drop path.

On a ViT the mean of the patch tokens goes through a fresh `fc_norm`, and the pretrained final norm is dropped, as in
MAE (He et al., 2022, appendix A.1); `token` keeps the class token and the final norm. Heads start from a truncated
normal of deviation 2e-5, as in MAE and ConvNeXt V2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from ..backbones import class_of, family_of
from ..backbones.adapters import adapt_timm, differences, typed
from ..backbones.tokens import BackboneError
from ..backbones.watch import blocks_of
from ..nn.global_batchnorm import freeze_statistics
from . import ProbeError
from .load import Loaded
from .readout import plain

HEAD_STD = 2e-5
DROP_PATH = 0.1  # where the setting is null and the model has it


def build_classifier(
    loaded: Loaded,
    classes: int,
    *,
    pool: str | None = None,
    drop_path: float | None = None,
    seed: int = 0,
    adapt: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model with the weights of `loaded` and a fresh classifier, on the CPU.

    pool: avg | token | None (avg on models with patch and class tokens, else the model's own). drop_path: timm's
    drop_path_rate; None = 0.1 where the model has it. seed: of the head. adapt: a config's group; what it freezes needs
    no gradient, and bottlenecks that `loaded` has already are kept; None = nothing is frozen. ProbeError where timm
    cannot build it, or where the bottlenecks that are there are not those of `adapt`.
    """
    headless = plain(loaded.model, loaded.image_size)
    args = _given(dict(loaded.model_args) | {"num_classes": classes} | _pooling(headless, pool, loaded.architecture))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(loaded.architecture, args, drop_path)
        held = _carry_adapters(model, headless)
        _load(model, headless, loaded.architecture)
        _init_head(model)
        if adapt and adapt["name"] != "none":
            _adapt(model, adapt, held, loaded)
    return model


def held_by(loaded: Loaded) -> dict[str, Any] | None:
    """The `adapt` group of the bottlenecks that a model holds, None where it has none."""
    return getattr(plain(loaded.model, loaded.image_size), "adapted_by", None)


def _carry_adapters(model: nn.Module, headless: nn.Module) -> list[nn.Module]:
    """Put the bottlenecks that stand in the blocks of the one into those of the other; all of them."""
    held = []
    for mine, theirs in zip(blocks_of(model).values(), blocks_of(headless).values()):
        if hasattr(theirs, "adapter"):
            mine.__class__, mine.adapter = type(theirs), copy.deepcopy(theirs.adapter)
            held.append(mine.adapter)
    return held


def _adapt(model: nn.Module, adapt: Mapping[str, Any], held: list[nn.Module], loaded: Loaded) -> None:
    """Freeze all but adapters and what is fresh: the head and the norm in front of it."""
    fresh = [*(_heads(model)), getattr(model, "fc_norm", None)]
    try:
        if held:
            if differ := differences(own := held_by(loaded), adapt):
                raise BackboneError(
                    f"the model has adapters of its own ({typed(own)}), which cannot be merged, and {differ}; leave "
                    "adapt= out to go on training these, or use adapt=none to train everything"
                )
            model.requires_grad_(False)
            freeze_statistics(model)
            for part in held:
                part.requires_grad_(True)
        else:
            adapt_timm(model, class_of(family_of(loaded.architecture)[0]), adapt, loaded.architecture)
    except BackboneError as error:
        raise ProbeError(str(error)) from error
    for module in fresh:
        if module is not None:
            module.requires_grad_(True)


def _heads(model: nn.Module) -> tuple[nn.Module, ...]:
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, (tuple, list)) else (heads,)


def used_drop_path(model: nn.Module) -> float:
    """The largest rate of the model's stochastic depth; 0 where it has none."""
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath" and m.drop_prob is not None]
    return round(max(map(float, rates), default=0.0), 6)  # timm spaces them in float32


def used_pool(model: nn.Module) -> str:
    """timm's word for how the feature is pooled."""
    pool = getattr(model, "global_pool", None)
    return pool if isinstance(pool, str) and pool else "avg"


def classifier_args(loaded: Loaded, model: nn.Module) -> dict[str, Any]:
    """timm's arguments for the classifier as it is, without stochastic depth and the number of classes."""
    return _given(dict(loaded.model_args) | _pooling(plain(loaded.model, loaded.image_size), used_pool(model), ""))


def _given(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in args.items() if v is not None}


def _has_tokens(model: nn.Module) -> bool:
    """Whether the pooling of this model is ours to choose: patch tokens, perhaps a class token, and one head."""
    own = hasattr(model, "fc_norm") and hasattr(model, "num_prefix_tokens") and not hasattr(model, "head_dist")
    return own and getattr(model, "global_pool", None) in ("token", "avg")


def _pooling(model: nn.Module, pool: str | None, architecture: str) -> dict[str, Any]:
    """Arguments of timm that choose the pooling."""
    if not _has_tokens(model):
        if pool == "token":
            raise ProbeError(f"probe.pool=token needs a ViT with a class token, and {architecture} has none; leave it "
                             "out (the mean over positions)")  # fmt: skip
        return {}
    if pool == "token" and getattr(model, "cls_token", None) is None:
        raise ProbeError(f"probe.pool=token: this {architecture} was trained without a class token; use probe.pool=avg "
                         "(the mean of the patch tokens)")  # fmt: skip
    # fc_norm=None lets timm choose: behind the mean, and none behind the class token.
    return {"global_pool": pool or "avg"} | ({"fc_norm": None} if isinstance(model, VisionTransformer) else {})


def _create(architecture: str, args: dict[str, Any], drop_path: float | None) -> nn.Module:
    rate = DROP_PATH if drop_path is None else drop_path
    try:
        return timm.create_model(architecture, pretrained=False, **args, **({"drop_path_rate": rate} if rate else {}))
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        if rate and "drop_path_rate" in str(error):
            if drop_path is None:
                return _create(architecture, args, 0.0)
            raise ProbeError(f"timm's {architecture} has no stochastic depth; use probe.drop_path=0") from error
        why = " ".join(str(error).split())[:200]
        raise ProbeError(f"timm cannot build {architecture} with a classifier of {args['num_classes']} classes "
                         f"({why})") from error  # fmt: skip


def _load(model: nn.Module, headless: nn.Module, architecture: str) -> None:
    """The weights of the headless model; only head and final norms may be missing or left over."""
    named = (model.pretrained_cfg or {}).get("classifier") or ()
    roots = {n.split(".")[0] for n in ([named] if isinstance(named, str) else named)} | {"norm", "fc_norm", "head"}
    try:
        odd = model.load_state_dict(headless.state_dict(), strict=False)
    except RuntimeError as error:  # shapes
        raise ProbeError(f"the weights do not fit timm's {architecture} as it can be built here "
                         f"({' '.join(str(error).split())[:200]})") from error  # fmt: skip
    strange = [n for n in (*odd.missing_keys, *odd.unexpected_keys) if n.split(".")[0] not in roots]
    if strange:
        raise ProbeError(f"the weights do not fit timm's {architecture} as it can be built here: {len(strange)} names "
                         f"differ, e.g. {strange[0]}")  # fmt: skip


def _init_head(model: nn.Module) -> None:
    for head in _heads(model):
        for module in head.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=HEAD_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
