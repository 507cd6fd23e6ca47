"""`adapt=`: a frozen timm model that learns through a few parameters, beside it or chosen from its own.

    uniadapter, adaptformer   a bottleneck in every block (`nn.adapters.Bottleneck`), not mergeable
    lora                      low-rank differences of linear layers, merged at export
    apla                      the output projection of attention, or some of its rows (Sorkhei et al., 2025)
    bitfit                    biases and norms (Ben Zaken et al., ACL 2022)

Adapters are modules beside timm, called by the walkers at taps: a tap of a linear layer (qkv, proj, fc1, fc2) takes the
layer's input and adds to its output, after_attn and parallel_mlp read and add to the residual stream. So timm keeps its
keys, and what is frozen is never touched: teachers share it, optimizers do not see it, BatchNorm keeps its statistics.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..nn.adapters import Bottleneck, LowRank, Rows
from ..nn.global_batchnorm import freeze_statistics
from ..schema import SCHEMAS
from .tokens import Backbone, BackboneError
from .watch import blocks_of

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
MERGES = ("lora", "apla", "bitfit")  # kinds whose result is a plain timm model


class Taps(NamedTuple):
    """Where one block can be adapted. dim: width of its residual stream; layers: tap -> nn.Linear or 1x1 nn.Conv2d;
    parts: how many outputs of `qkv` are queries, keys, values; lora: the layers that LoRA takes unless told otherwise.
    """

    dim: int
    layers: dict[str, nn.Module]
    parts: tuple[int, ...]
    lora: tuple[str, ...]

    def spans(self, targets: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
        """Tap -> ranges of its outputs for targets such as q, v, fc1; targets that this block lacks are left out."""
        found: dict[str, list[tuple[int, int]]] = {}
        for i, name in enumerate("qkv"):
            if name in targets and "qkv" in self.layers:
                found.setdefault("qkv", []).append((sum(self.parts[:i]), sum(self.parts[: i + 1])))
        for tap, layer in self.layers.items():
            if tap in targets and tap != "qkv":
                found[tap] = [(0, layer.weight.shape[0])]
        return found


class Adapters(nn.Module):
    """The adapters of all blocks: blocks[i] is tap -> module, empty where nothing stands beside the block."""

    def __init__(self, settings: Mapping[str, Any], taps: Iterable[Taps]):
        super().__init__()
        self.settings, taps = dict(settings), list(taps)
        self.usual = in_order(target for tap in taps for target in tap.lora)  # what adapt.targets=null stands for
        self.blocks = nn.ModuleList(nn.ModuleDict(beside(self.settings, tap)) for tap in taps)

    @property
    def kind(self) -> str:
        return self.settings["name"]

    @property
    def merges(self) -> bool:
        """Whether the adapted model is a plain timm model with other weights."""
        return self.kind in MERGES

    @property
    def trains_norms(self) -> bool:
        return self.kind == "bitfit" and self.settings["norms"]

    def of(self, block: int) -> nn.ModuleDict | None:
        """What a walker passes to a block."""
        return self.blocks[block] if len(self.blocks) and len(self.blocks[block]) else None


def added(y: Tensor, adapt: nn.ModuleDict | None, tap: str, x: Tensor) -> Tensor:
    """y, and what an adapter at this tap makes of x; both [*, C]."""
    return y + adapt[tap](x) if adapt is not None and tap in adapt else y


def added_map(y: Tensor, adapt: nn.ModuleDict | None, tap: str, x: Tensor) -> Tensor:
    """The same for maps [B, C, h, w]."""
    if adapt is None or tap not in adapt:
        return y
    return y + adapt[tap](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# --- choosing and freezing -----------------------------------------------------------------------------------------


def settings_of(adapt: str | Mapping[str, Any]) -> dict[str, Any]:
    """A kind, or a config's `adapt` group, as a dict with every key; BackboneError for an unknown kind."""
    given = {"name": adapt} if isinstance(adapt, str) else dict(adapt)
    if given["name"] not in SCHEMAS["adapt"]:
        raise BackboneError(f"adapt={given['name']} is not known; choose one of {', '.join(SCHEMAS['adapt'])}")
    return dataclasses.asdict(SCHEMAS["adapt"][given["name"]]()) | given


def typed(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed: adapt=lora adapt.rank=8 …"""
    return " ".join(f"{_key(k)}={_word(v)}" for k, v in _comparable(settings).items())


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], usual: Sequence[str] = ()) -> str:
    """Which keys of two settings differ, with both values; "" where they mean the same. usual: targets of this family
    where none are named."""
    theirs, mine = _comparable(theirs, usual), _comparable(mine, usual)
    keys = ["name"] if theirs["name"] != mine["name"] else [k for k in theirs if theirs[k] != mine[k]]
    return ", ".join(f"{_key(k)} is {_word(theirs[k])} there and {_word(mine[k])} here" for k in keys)


def _comparable(settings: Mapping[str, Any], usual: Sequence[str] = ()) -> dict[str, Any]:
    """With lists as lists, whatever a config made of them, and targets in one order, also where none are named."""
    found = {k: v if isinstance(v, str) or not isinstance(v, Sequence) else list(v) for k, v in settings.items()}
    targets = "targets" in found and (found["targets"] or usual)
    return found | ({"targets": in_order(targets)} if targets else {})


def in_order(targets: Iterable[str]) -> list[str]:
    """Targets of LoRA as the model has them, each once: their order means nothing."""
    return sorted(set(targets), key=TARGETS.index)


def _key(name: str) -> str:
    return "adapt" if name == "name" else f"adapt.{name}"


def _word(value: Any) -> str:
    return json.dumps(value).replace('"', "").replace(", ", ",")


def adapt_backbone(backbone: Backbone, adapt: str | Mapping[str, Any]) -> None:
    """Freeze the timm model of a backbone but for what this kind trains, and put the adapters beside it.

    What is not timm's (mask token, fused stages) is new and trains. BackboneError in one sentence where it makes no
    sense on this family.
    """
    settings = settings_of(adapt)
    if settings["name"] == "none":
        return
    taps = freeze(backbone.timm, type(backbone), settings, backbone.architecture)
    with torch.random.fork_rng(devices=[]):  # so that what is drawn later (heads) is that of a run without adapters
        torch.default_generator.manual_seed(torch.initial_seed() + 1)
        backbone.adapters = Adapters(settings, taps)


def freeze(model: nn.Module, family: type[Backbone], settings: Mapping[str, Any], name: str) -> list[Taps]:
    """Freeze a timm model but for what this kind trains of it; the taps of its blocks. BackboneError where it makes no
    sense; name: of the model in messages."""
    taps = [tap for block in blocks_of(model).values() if (tap := family.taps(block)) is not None]
    refuse(name, settings, taps)
    chosen = [p for p in own(model, settings, taps) if p.requires_grad]  # not what the loss never sees
    model.requires_grad_(False)
    try:
        freeze_statistics(model)
    except ValueError as error:
        raise BackboneError(f"adapt={settings['name']} on {name}: {error}; use adapt=none") from None
    for parameter in chosen:
        parameter.requires_grad_(True)
    return taps


def beside(settings: Mapping[str, Any], taps: Taps) -> dict[str, nn.Module]:
    """New modules of one block."""
    kind, rank = settings["name"], settings.get("rank")
    if kind in ("uniadapter", "adaptformer"):
        how = {k: settings[k] for k in ("scale", "learn_scale", "norm")}
        return {settings["placement"]: Bottleneck(taps.dim, rank, **how)}
    if kind == "apla" and rank != "full" and "proj" in taps.layers:
        layer = taps.layers["proj"]
        return {"proj": Rows(layer.weight.shape[1], layer.weight.shape[0], rank, bias=layer.bias is not None)}
    if kind != "lora":
        return {}
    found = {}
    for tap, spans in taps.spans(settings["targets"] or taps.lora).items():
        outputs, width = taps.layers[tap].weight.shape[:2]
        found[tap] = LowRank(width, outputs, rank, alpha=settings["alpha"], spans=spans)
    return found


def own(model: nn.Module, settings: Mapping[str, Any], taps: Sequence[Taps]) -> list[nn.Parameter]:
    """Parameters of the timm model itself that train."""
    if settings["name"] == "apla" and settings["rank"] == "full":
        return [p for tap in taps if "proj" in tap.layers for p in tap.layers["proj"].parameters()]
    if settings["name"] != "bitfit":
        return []
    found = {}
    for module in model.modules():
        norm = "Norm" in type(module).__name__  # LayerNorm2d, GroupNorm1, GlobalResponseNorm … have no common base
        for name, parameter in module.named_parameters(recurse=False):
            if (norm and settings["norms"]) or (name == "bias" and settings["biases"]):
                found[id(parameter)] = parameter
    return list(found.values())


def refuse(name: str, settings: Mapping[str, Any], taps: Sequence[Taps]) -> None:
    """BackboneError where a kind or its options make no sense on this model."""
    kind = settings["name"]
    if kind == "bitfit":
        if not (settings["biases"] or settings["norms"]):
            raise BackboneError("adapt.biases=false and adapt.norms=false leave nothing to train; set one of them")
        return
    if not taps:
        raise BackboneError(
            f"adapt={kind} needs the blocks of ViT, ConvNeXt or SHViT, and {name} is a generic timm model; use "
            "adapt=bitfit or adapt=none"
        )
    has = [target for target in TARGETS if any(tap.spans([target]) for tap in taps)]
    if kind == "apla":
        if "proj" not in has:
            raise BackboneError(
                f"adapt=apla trains the output projection of attention, and {name} has no attention; use adapt=lora, "
                "uniadapter, adaptformer or bitfit"
            )
        rows = min(tap.layers["proj"].weight.shape[0] for tap in taps if "proj" in tap.layers)
        if settings["rank"] != "full" and settings["rank"] > rows:
            raise BackboneError(
                f"adapt.rank={settings['rank']} is more than the {rows} rows of an output projection of {name}; use "
                "fewer or adapt.rank=full"
            )
    wrong = [target for target in settings.get("targets") or () if target not in has]
    if wrong:
        raise BackboneError(f"adapt.targets: {name} has no {wrong[0]}; choose from {', '.join(has)}")


# --- leaving: one timm model ---------------------------------------------------------------------------------------


def in_timm(backbone: Backbone) -> nn.Module:
    """A copy of the timm model that gives the adapted features: merged where that is possible, else with the adapters
    inside its blocks (another forward, and keys that plain timm does not have)."""
    model = copy.deepcopy(backbone.timm)
    if not backbone.adapters.merges:
        return attach(model, copy.deepcopy(backbone.adapters), type(backbone))
    blocks = blocks_of(model).values() if len(backbone.adapters.blocks) else ()
    for block, parts in zip(blocks, backbone.adapters.blocks, strict=True):
        for tap, part in parts.items():
            merge(backbone.taps(block).layers[tap], part)
    return model


@torch.no_grad()
def merge(layer: nn.Module, part: LowRank | Rows) -> None:
    """Add an adapter's difference to the layer that it adapts."""
    weight, bias = part.difference()
    layer.weight += weight.view_as(layer.weight)
    if bias is not None:
        layer.bias += bias


class _Added(nn.Module):
    """A weight or bias of a frozen layer plus an adapter's difference."""

    def __init__(self, part: LowRank | Rows, which: int):
        super().__init__()
        self.which, self.given = which, (part,)  # a tuple, as a module may be registered only once:
        if which == 0:
            self.part = part  # by the weight

    def forward(self, frozen: Tensor) -> Tensor:
        return frozen + self.given[0].difference()[self.which].view_as(frozen)


def adapt_timm(model: nn.Module, family: type[Backbone], adapt: str | Mapping[str, Any], name: str) -> nn.Module:
    """A timm model frozen but for what this kind trains, with its adapters inside (in place), to train it as it is.

    What can be merged stands as a parametrization of its layer, `merged` makes a plain model of it.
    """
    settings = settings_of(adapt)
    adapters = Adapters(settings, freeze(model, family, settings, name))
    if not adapters.merges:
        return attach(model, adapters, family)
    for block, parts in zip(blocks_of(model).values(), adapters.blocks):
        for tap, part in parts.items():
            layer = family.taps(block).layers[tap]
            for which, kind in enumerate(("weight", "bias")):
                if part.difference()[which] is not None:
                    parametrize.register_parametrization(layer, kind, _Added(part, which))
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy of a model of `adapt_timm` with its differences in the weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name in list(getattr(module, "parametrizations", ())):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def attach(model: nn.Module, adapters: Adapters, family: type[Backbone]) -> nn.Module:
    """Put adapters into the blocks of a timm model (in place); hooks on its layers still work.

    The model says by `adapted_by` what they were made with."""
    for block, parts in zip(blocks_of(model).values(), adapters.blocks, strict=True):
        block.__class__ = family.adapted_block  # the module object, its parameters and hooks stay the very same
        block.adapter = parts
    model.adapted_by = dict(adapters.settings)
    return model
