"""Somebody's backbone state to a given backbone: the same function, or one sentence that says what does not fit.

What differs without harm is converted: positions of another image size, class tokens and registers that one side
lacks, LayerScale, linear against 1x1-convolution weights. Another depth, width, patch size or kind is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..backbones.tokens import Backbone
from ..backbones.vit import resample_as_dino
from .describe import grid_of, prefix_counts, shape_of
from .layouts import fit
from .safe import WeightsError

# What one side may have alone: tokens, final norms (methods that never train them leave them out), classifiers.
ALONE = re.compile(r"(cls_token|reg_token|pos_embed|(head\.|fc_)?norm\..*|.*\.num_batches_tracked)$")


class Fitted(NamedTuple):
    """state: in the backbone's names and shapes. The rest says how it came about, for the report."""

    state: dict[str, Tensor]
    changed: list[str]  # one remark per conversion
    left: list[str]  # keys of the file without a place
    fresh: list[str]  # keys of the backbone that keep their initial values


def fit_backbone(state: Mapping[str, Tensor], backbone: Backbone, *, source: str) -> Fitted:
    """A state in timm's names, made to fit; WeightsError names `source` and says what it is and what would fit."""
    own = backbone.timm.state_dict()
    state, changed = dict(state), []
    if "pos_embed" in own and "pos_embed" in state:
        state = _fit_tokens(state, own, backbone, changed)
    state = _fit_layer_scale(state, own, changed)
    state = fit(state, backbone.timm)
    left, fresh = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    classifier = backbone.timm.pretrained_cfg.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    idle = [k for k in left if any(k.startswith(f"{name}.") for name in names)]
    wrong = [k for k in sorted(state.keys() & own.keys()) if state[k].shape != own[k].shape]
    wrong += [k for k in (*left, *fresh) if not ALONE.match(k) and k not in idle]
    if wrong or not state.keys() & own.keys():
        raise WeightsError(_refusal(state, own, wrong, backbone, source))
    return Fitted({k: state[k] for k in state.keys() & own.keys()}, changed, left, fresh)


def _refusal(state: Mapping[str, Tensor], own: Mapping[str, Tensor], wrong: list[str], backbone: Backbone,
             source: str) -> str:  # fmt: skip
    theirs, mine = shape_of(state), shape_of(own)
    if theirs.words != mine.words:
        patch = theirs.args.get("patch_size")
        fitting = []
        if theirs.name and theirs.name != mine.name:
            known = theirs.name.startswith("vit_giant")
            fitting.append(f"backbone=timm backbone.name={theirs.name}" if known else f"backbone={theirs.name}")
        if patch and patch != mine.args.get("patch_size"):
            fitting.append(f"backbone.patch_size={patch}")
        registers = theirs.args.get("reg_tokens")
        if registers and "reg_token" in own and registers != mine.args.get("reg_tokens"):
            fitting.append(f"backbone.registers={registers}")
        use = f"; use {' '.join(fitting)}" if fitting else ""
        return f"{source} is {theirs.words}, and the backbone ({backbone.architecture}) is {mine.words}{use}"
    some = ", ".join(f"{k} {_size(state, k)} against {_size(own, k)}" for k in wrong[:3])
    return f"{source} does not fit the backbone ({backbone.architecture}): {some}"


def _size(state: Mapping[str, Tensor], key: str) -> str:
    return " x ".join(map(str, state[key].shape)) or "scalar" if key in state else "nothing"


# --- ViT -----------------------------------------------------------------------------------------------------------


def _fit_tokens(state: dict[str, Tensor], own: Mapping[str, Tensor], backbone: Backbone, changed: list[str]) -> dict:
    """Class token, registers and positions for the backbone's prefix and grid.

    A prefix token enters as its value plus its row of positions. Where the two sides do not have the same rows, the
    sum moves into the token and its row becomes zero, which is exact.
    """
    table, grid = state["pos_embed"], tuple(backbone.timm.patch_embed.grid_size)
    rows = own["pos_embed"].shape[1] - grid[0] * grid[1]
    names = [k for k in ("cls_token", "reg_token") if k in own]
    side, prefix = grid_of(table.shape[1], prefix_counts(state))
    if not side or table.shape[-1] != own["pos_embed"].shape[-1]:
        return state  # refused later, by its shape
    patches = table[:, prefix:]
    if (side, side) != grid:
        patches = _resized(patches, (side, side), grid, backbone.pos_resize)
        changed.append(f"positions from {side} x {side} to {grid[0]} x {grid[1]} ({backbone.pos_resize} rule)")
    theirs = [k for k in ("cls_token", "reg_token") if k in state]
    if (rows, names) == (prefix, theirs):
        head = table[:, :prefix]
    else:
        state = state | _with_positions(state, theirs, table[:, :prefix])
        head = _own_rows(own, names, rows, theirs)
    return state | {"pos_embed": torch.cat([head, patches], 1)}


def _own_rows(own: Mapping[str, Tensor], names: list[str], rows: int, given: list[str]) -> Tensor:
    """The backbone's positions of its prefix tokens, zero for tokens that come from the file."""
    table = own["pos_embed"][:, :rows]
    table = torch.zeros(table.shape) if table.is_meta else table.clone()  # meta: it is only asked whether it fits
    start = 0
    for name in names:
        stop = start + own[name].shape[1]
        if name in given:
            table[:, start:stop] = 0
        start = stop
    return table


def _with_positions(state: Mapping[str, Tensor], names: list[str], rows: Tensor) -> dict[str, Tensor]:
    """Prefix tokens with their rows of positions, as many as there are, added in."""
    tokens, start = {}, 0
    for name in names:
        own = rows[:, start : start + state[name].shape[1]]
        tokens[name] = state[name] + own if own.shape[1] else state[name]
        start += state[name].shape[1]
    return tokens


def _resized(patches: Tensor, old: tuple[int, int], new: tuple[int, int], rule: str) -> Tensor:
    if rule == "official":
        return resample_as_dino(patches, new, old, 0)
    return resample_abs_pos_embed(patches, new_size=list(new), old_size=list(old), num_prefix_tokens=0)


GAIN = re.compile(r"(?P<block>.*?)\.(?P<kind>ls1\.gamma|ls2\.gamma|gamma)$")


def _fit_layer_scale(state: dict[str, Tensor], own: Mapping[str, Tensor], changed: list[str]) -> dict[str, Tensor]:
    """A gain per channel behind each branch: folded into the branch's last layer, or set to one, whichever is exact."""
    folded = 0
    for key in [k for k in state if GAIN.match(k) and k not in own]:
        found = GAIN.match(key)
        last = f"{found['block']}.{'attn.proj' if found['kind'].startswith('ls1') else 'mlp.fc2'}"
        if f"{last}.weight" in state and f"{last}.bias" in state:
            gain, weight = state.pop(key), state[f"{last}.weight"]
            state[f"{last}.weight"] = weight * gain.view(-1, *[1] * (weight.ndim - 1))
            state[f"{last}.bias"] = state[f"{last}.bias"] * gain
            folded += 1
    missing = [k for k in own if GAIN.match(k) and k not in state]
    state |= {k: torch.ones(own[k].shape) for k in missing}
    changed += [f"LayerScale folded into {folded} layers"] * bool(folded)
    changed += [f"LayerScale of {len(missing)} branches set to 1, as the file has none"] * bool(missing)
    return state


def put(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module's parameters and buffers of the same names and shapes."""
    own = module.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)
