"""Pictures of a few images: principal components of the patch tokens, and what the heads of a block look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.watch import State, attends, layers_of, watch
from ..training.pictures import grid, pca_rgb, save_png
from .attention import among_patches

SHOWN, SIDE = 6, 112  # images per sheet, and the side they are shown at
# Black through violet and orange to pale yellow, even in lightness, so that weak attention is not lost.
RAMP = torch.tensor([(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21),
                     (250, 193, 39), (252, 255, 164)]) / 255  # fmt: skip


class Picture(NamedTuple):
    """A PNG file and what it shows, in words."""

    path: Path
    words: str


def short(layer: str) -> str:
    """blocks.3 -> 3; stages.1.blocks.2 -> 1.2; other names stay."""
    return layer.replace("stages.", "").replace(".blocks.", ".").removeprefix("blocks.")


def heat(values: Tensor) -> Tensor:
    """Values in 0..1, [...], as colours [..., 3]."""
    place = values.clamp(0, 1) * (len(RAMP) - 1)
    low = place.floor().long().clamp(max=len(RAMP) - 2)
    return torch.lerp(RAMP[low], RAMP[low + 1], (place - low)[..., None])


def chosen(layers: int, blocks: Sequence[int] | None, parts: int) -> list[int]:
    """Layers to draw: those asked for (negative numbers from the end) as far as they exist, else the ends of `parts`
    equal parts of the depth."""
    if blocks:
        return sorted({i % layers for i in blocks if -layers <= i < layers})
    return sorted({max(0, round(layers * (p + 1) / parts) - 1) for p in range(parts)})


def draw(
    model: nn.Module, images: Tensor, pixels: Tensor, folder: Path, name: str, blocks: Sequence[int] | None
) -> list[Picture]:
    """Write `<name>-pca.png`, and `<name>-attention-<block>.png` for each chosen block of a model that attends.

    images: float [B, c, s, s], normalised, on the model's device; pixels: uint8 [B, c, s, s], the same images.
    """
    layers, heads = layers_of(model), attends(model)
    components, maps = chosen(len(layers), blocks, 4), chosen(len(layers), blocks, 2) if heads else []
    states, rows = _read(model, images, components, maps)
    photo = _photo(pixels)
    sheet = {"image": photo}
    for i in components:
        name_of = f"block {short(layers[i])}" if "blocks." in layers[i] else layers[i]
        sheet[name_of] = _tile(pca_rgb(states[i].patches, states[i].grid))
    pictures = [Picture(save_png(grid(sheet), folder / f"{name}-pca.png"),
                        "First three principal components of the patch tokens of all pictures together, per layer: "
                        "equal colours in a row mean similar features.")]  # fmt: skip
    source = "the class token" if getattr(model, "num_prefix_tokens", 0) else "the average patch"
    for i in maps:
        path = folder / f"{name}-attention-{layers[i]}.png"
        words = (f"{layers[i]}: where {source} looks, per head; from nothing (black) to the strongest patch of each "
                 "picture (yellow).")  # fmt: skip
        pictures.append(Picture(save_png(grid({"image": photo} | _heads(rows[i], states[i].grid)), path), words))
    return pictures


def _read(
    model: nn.Module, images: Tensor, components: Sequence[int], maps: Sequence[int]
) -> tuple[dict[int, State], dict[int, Tensor]]:
    """States of the layers that are drawn, and attention rows [B, h, N] of those in `maps`."""
    states: dict[int, State] = {}
    parts: dict[int, list[Tensor]] = {i: [] for i in maps}
    prefix = getattr(model, "num_prefix_tokens", 0)

    def see(i: int, state: State) -> None:
        if i in components or i in parts:
            states[i] = state

    def see_attention(i: int, weights: Tensor) -> None:
        if i in parts:
            row = weights[:, :, 0, prefix:] if prefix else among_patches(weights, 0)[0].mean(-2)
            parts[i].append(row.float().cpu())

    watch(model, images, see, see_attention if maps else None)
    return states, {i: torch.cat(rows) for i, rows in parts.items()}


def _heads(rows: Tensor, places: tuple[int, int]) -> dict[str, Tensor]:
    """Attention [B, h, N] as rows of pictures, the mean of all heads first."""
    named = {"mean": rows.mean(1)} | {f"head {h}": rows[:, h] for h in range(rows.shape[1])}
    out = {}
    for name, values in named.items():
        scaled = values / values.amax(1, keepdim=True).clamp(min=1e-12)
        out[name] = _tile(heat(scaled.unflatten(1, places)).permute(0, 3, 1, 2))
    return out


def _photo(pixels: Tensor) -> Tensor:
    x = pixels.float() / 255
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    return F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def _tile(x: Tensor) -> Tensor:
    return F.interpolate(x.float().cpu(), size=(SIDE, SIDE), mode="nearest")
