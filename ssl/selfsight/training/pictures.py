"""What the model sees: reconstructions and the principal components of patch tokens, as PNG files in the run folder.

Pictures are made of rows: one row of B images per name, the name written on the left. Pillow only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..probes.bank import encode, frozen

COLUMNS = 8
TILE = 112  # smallest side of a picture on paper: thumbnails of 32 px are no use to anybody
GAP, LABEL = 4, 104  # pixels between pictures, and to the left for names
PAPER, INK = (255, 255, 255), (40, 44, 52)


def grid(rows: Mapping[str, Tensor]) -> Image.Image:
    """Rows of pictures: name -> float [B, 3, H, W] in 0..1 (values outside are clipped), all of one size."""
    batch, _, height, width = next(iter(rows.values())).shape
    for name, row in rows.items():
        if row.shape != (batch, 3, height, width):
            raise ValueError(f"row '{name}' is {list(row.shape)}; every row must be {[batch, 3, height, width]}")
    zoom = max(1, -(-TILE // width))
    h, w = height * zoom, width * zoom
    sheet = Image.new("RGB", (LABEL + batch * (w + GAP) + GAP, len(rows) * (h + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for r, (name, row) in enumerate(rows.items()):
        top = GAP + r * (h + GAP)
        draw.text((GAP + 2, top + h // 2), name, fill=INK, font=font, anchor="lm")
        pixels = (row.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        for c, tile in enumerate(pixels.numpy()):
            picture = Image.fromarray(tile).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL + GAP + c * (w + GAP), top))
    return sheet


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG under its final name only when it is complete (reports may be read while training runs)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    picture.save(tmp, format="PNG", optimize=True)
    tmp.replace(path)
    return path


def pca_rgb(patches: Tensor, grid: tuple[int, int], size: int | None = None) -> Tensor:
    """First three principal components of patch tokens [B, N, D] as colours, float [B, 3, h, w] in 0..1.

    One PCA for the whole batch, so that equal colours mean similar features across images. Each component is scaled
    to its 2nd..98th percentile and its sign is fixed, so that pictures of successive steps are comparable.
    size: enlarge (nearest) to this side. ValueError if N is not h * w.
    """
    b, n, d = patches.shape
    if n != grid[0] * grid[1]:
        raise ValueError(f"{n} patch tokens do not fill a grid of {grid[0]} x {grid[1]}")
    x = patches.detach().float().cpu().flatten(0, 1)
    x = torch.nan_to_num(x - x.mean(0))
    _, vectors = torch.linalg.eigh(x.T @ x)  # D x D is small; eigenvalues ascend
    axes = vectors[:, -min(3, d) :].flip(1)
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(_thin(x @ axes), torch.tensor([0.02, 0.98]), dim=0)
    colours = ((x @ axes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - colours.shape[1])).view(b, *grid, 3).permute(0, 3, 1, 2)
    return colours if size is None else F.interpolate(colours, size=(size, size), mode="nearest")


def _thin(x: Tensor, most: int = 100_000) -> Tensor:
    """Evenly spaced rows: `torch.quantile` refuses very long inputs."""
    return x[:: max(1, len(x) // most)]


@torch.no_grad()
def write(
    objective: nn.Module,
    backbone: nn.Module,
    batch: Any,
    folder: Path,
    step: int,
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[Path]:
    """Write `<objective.pictures_show>-<step>.png` (if it has pictures) and `pca-<step>.png`; returns their paths.

    batch: prepared and drawn, of which the first 8 samples are shown. mean, std: undo the normalisation.
    """
    shift, scale = (torch.tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))

    def rgb(x: Tensor) -> Tensor:
        x = x[:COLUMNS].detach().float().cpu() * scale + shift
        return x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)  # other channel counts: the first, as grey

    paths = []
    with frozen(objective), frozen(backbone):
        if rows := objective.pictures(batch):
            sheet = grid({name: rgb(row) for name, row in rows.items()})
            paths.append(save_png(sheet, folder / f"{objective.pictures_show}-{step:07d}.png"))
        images = next(iter(batch["images"].values()))[0][:COLUMNS]
        _, patches = encode(backbone, images, patches=True)
        colours = pca_rgb(patches, backbone.grid(images.shape[-1]), images.shape[-1])
        sheet = grid({"image": rgb(images), "PCA of patches": colours})
        paths.append(save_png(sheet, folder / f"pca-{step:07d}.png"))
    return paths
