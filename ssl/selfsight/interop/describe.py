"""What a backbone's state is, told from its names and shapes: for messages, and to build a model that fits it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

# (blocks per stage, width of the first stage or of all) -> our name. ViT's heads are not in a state: (name, heads).
VITS = {(4, 128): ("vit_nano", 4), (12, 192): ("vit_ti", 3), (12, 384): ("vit_s", 6), (12, 768): ("vit_b", 12),
        (24, 1024): ("vit_l", 16), (32, 1280): ("vit_h", 16),
        (40, 1408): ("vit_giant_patch16_gap_224", 16)}  # fmt: skip
CONVNEXTS = {((3, 3, 9, 3), 96): "tiny", ((3, 3, 27, 3), 96): "small", ((3, 3, 27, 3), 128): "base",
             ((3, 3, 27, 3), 192): "large", ((1, 1, 2, 1), 24): "nano_lite"}  # fmt: skip
CONVNEXTS_V2 = CONVNEXTS | {((2, 2, 6, 2), 40): "atto", ((2, 2, 6, 2), 48): "femto", ((2, 2, 6, 2), 64): "pico",
                            ((2, 2, 8, 2), 80): "nano", ((3, 3, 27, 3), 352): "huge"}  # fmt: skip
SHVITS = {((2, 4, 5), (128, 224)): "s1", ((2, 4, 5), (128, 308)): "s2", ((3, 5, 5), (192, 352)): "s3",
          ((4, 7, 6), (224, 336)): "s4", ((1, 2, 2), (64, 112)): "nano_lite"}  # fmt: skip
SWIGLU = "vit_giant_patch14_dinov2"  # timm's name of the one official model with gated MLPs


class Shape(NamedTuple):
    """A backbone in words, our name for it (None: none fits), and arguments that timm cannot guess from the name."""

    words: str
    name: str | None
    args: dict[str, Any]
    image_size: int | None = None  # that its positions are for


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """Of a state in timm's names."""
    if "blocks.0.attn.qkv.weight" in state and getattr(state.get("patch_embed.proj.weight"), "ndim", 0) == 4:
        return _vit(state)
    if "stages.0.blocks.0.conv_dw.weight" in state:
        return _convnext(state)
    if "patch_embed.0.c.weight" in state and "stages.0.blocks.0.conv.m.c.weight" in state:
        widths = _widths(state, "stages.{}.blocks.0.conv.m.c")
        depths = tuple(_count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(len(widths)))
        size = SHVITS.get((depths, tuple(widths[:2])))
        return Shape(
            f"an SHViT with {_listed(depths)} blocks of widths {_listed(widths)}", size and f"shvit_{size}", {}
        )
    some = ", ".join(sorted(state)[:3])
    return Shape(f"a model of {len(state)} tensors such as {some}", None, {})


def _vit(state: Mapping[str, Tensor]) -> Shape:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    name, heads = VITS.get((depth, width), (None, None))
    args: dict[str, Any] = {"patch_size": patch}
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": True}
    if "blocks.0.ls1.gamma" in state:
        args["init_values"] = 1.0
    gated = "blocks.0.mlp.fc2.weight" in state and _gated(state)
    if gated:
        name, heads = (SWIGLU, 24) if (depth, width) == (40, 1536) else (None, None)
    if heads:
        args["num_heads"] = heads
    extra = f", {registers} registers" * bool(registers) + ", gated MLPs" * gated
    side, rows = 0, state["pos_embed"].shape[1] if "pos_embed" in state else 0
    if rows:
        side = grid_of(rows, prefix_counts(state))[0]
    words = f"a ViT with {depth} blocks of width {width} and patches of {patch} px{extra}"
    return Shape(words, name, args, side * patch or None)


def _gated(state: Mapping[str, Tensor]) -> bool:
    return state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]


def _convnext(state: Mapping[str, Tensor]) -> Shape:
    widths = _widths(state, "stages.{}.blocks.0.conv_dw")
    depths = tuple(_count(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(len(widths)))
    second = any(".mlp.grn." in key for key in state)
    size = (CONVNEXTS_V2 if second else CONVNEXTS).get((depths, widths[0]))
    name = size and f"convnext{'v2' * second}_{size}"
    stem = state["stem.0.weight"].shape[-1] if "stem.0.weight" in state else 4
    words = f"a ConvNeXt V{1 + second} with {_listed(depths)} blocks of widths {_listed(widths)}"
    return Shape(words, name, {"patch_size": stem})


def prefix_counts(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many rows of a position table may belong to class token and registers, the likeliest first."""
    classes, registers = int("cls_token" in state), state["reg_token"].shape[1] if "reg_token" in state else 0
    return tuple(dict.fromkeys((0, classes, classes + registers) if registers else (classes, 0)))


def grid_of(rows: int, prefixes: tuple[int, ...]) -> tuple[int, int]:
    """(side of the square grid, rows of prefix tokens) of a position table; (0, 0) where no side fits."""
    for prefix in prefixes:
        side = round((rows - prefix) ** 0.5)
        if side * side == rows - prefix:
            return side, prefix
    return 0, 0


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for key in state if (m := re.match(pattern, key)))


def _widths(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    found, name = [], f"{pattern}.weight"
    while name.format(len(found)) in state:
        found.append(state[name.format(len(found))].shape[0])
    return found


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
