"""What the features of a block are like: spectrum, uniformity, frequencies and norms, over a stream of batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.watch import State
from ..training.online import effective_rank

ALPHA_FROM, ALPHA_TO, ALPHA_POINTS = 11, 100, 8  # the fit's eigenvalues, numbered from 1, and how few are too few
NORMS = 500_000  # tokens whose norms are kept per block; the images come in random order, so the first will do
BINS = 40


class Moments:
    """Sum and second moments of rows [n, D], float64 on the CPU: D x D numbers, however many rows."""

    def __init__(self) -> None:
        self.n, self.total, self.square = 0, None, None

    def update(self, rows: Tensor) -> None:
        """rows: [n, D]."""
        rows = rows.detach().cpu().double()
        if self.total is None:
            width = rows.shape[1]
            self.total, self.square = rows.new_zeros(width), rows.new_zeros(width, width)
        self.n += len(rows)
        self.total += rows.sum(0)
        self.square.addmm_(rows.T, rows)

    def eigenvalues(self, centred: bool) -> Tensor:
        """Of Z^T Z (centred: of the rows minus their mean), descending, [D]; rounding below zero is cut off."""
        mean = self.total / self.n
        matrix = self.square - self.n * torch.outer(mean, mean) if centred else self.square
        values = torch.linalg.eigvalsh(matrix).flip(0)
        # What lies below the rounding of the largest is no direction of the data.
        return torch.where(values > 1e-14 * len(values) * values[0], values, values.new_zeros(()))


def alpha_req(eigenvalues: Tensor) -> tuple[float, float] | None:
    """(alpha, R^2) of eigenvalues ~ i^-alpha, descending [D]: least squares of ln on ln, i = 11 ... min(100, D - 1).

    Agrawal et al., NeurIPS 2022. None where fewer than 8 eigenvalues above zero are left to fit.
    """
    last = min(ALPHA_TO, len(eigenvalues) - 1, int((eigenvalues > 0).sum()))
    if last - ALPHA_FROM + 1 < ALPHA_POINTS:
        return None
    x = torch.arange(ALPHA_FROM, last + 1, dtype=torch.float64).log()
    y = eigenvalues[ALPHA_FROM - 1 : last].double().log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    residual = ((y - slope * x) ** 2).sum()
    return float(-slope), float(1 - residual / (y @ y).clamp(min=1e-300))


def spectrum(moments: Moments) -> dict[str, Any]:
    """RankMe and alpha-ReQ of rows, as they are and centred, with the n and D that they are comparable at."""
    out: dict[str, Any] = {"n": moments.n, "width": len(moments.total)}
    for end, centred in (("", False), ("_centred", True)):
        values = moments.eigenvalues(centred)
        fit = alpha_req(values)
        out["rankme" + end] = effective_rank(values.sqrt())  # of singular values, never of eigenvalues
        out["alpha" + end], out["alpha_r2" + end] = fit if fit else (None, None)
    return out


def token_cosine(patches: Tensor) -> Tensor:
    """Mean cosine between different tokens of an image, [B, N, D] -> [B]; 1: all point the same way."""
    unit, n = F.normalize(patches, dim=-1), patches.shape[1]
    return ((unit.sum(1) ** 2).sum(-1) - (unit**2).sum((-2, -1))) / (n * (n - 1)) if n > 1 else unit[:, 0, 0] * math.nan


def relative_residual(patches: Tensor) -> Tensor:
    """|X - 1 mean(X)|_F / |X|_F of the tokens of an image, [B, N, D] -> [B]; 0: all tokens are the same."""
    apart = torch.linalg.vector_norm(patches - patches.mean(1, keepdim=True), dim=(1, 2))
    return apart / torch.linalg.vector_norm(patches, dim=(1, 2)).clamp(min=1e-12)


def log_amplitude(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """ln |FFT| of the token map along the diagonal, from frequency 0 to the highest, summed over images and averaged
    over channels: [B, N, D] -> [side // 2 + 1] (Park & Kim, ICLR 2022)."""
    side = min(grid)
    maps = patches.mT.unflatten(2, grid)[..., :side, :side]
    diagonal = torch.fft.fft2(maps).abs().diagonal(dim1=-2, dim2=-1)[..., : side // 2 + 1]
    return diagonal.clamp(min=1e-12).log().mean(1).sum(0)


def audit(norms: Tensor) -> dict[str, Any]:
    """High-norm tokens among norms [m]: those above tau = median + 6 MAD, as a share, and a histogram.

    MAD: median distance to the median, not rescaled; for a normal distribution tau lies 4 deviations above it. Norms
    that are all equal up to rounding have no outliers.
    """
    norms = norms.double()
    median = norms.median()
    mad = (norms - median).abs().median()
    tau = median + torch.maximum(6 * mad, 1e-3 * median)
    low, high = float(norms.min()), float(norms.max())
    counts, _ = np.histogram(norms.numpy(), bins=BINS, range=(low, high if high > low else low + 1))
    return {"median": float(median), "mad": float(mad), "tau": float(tau), "max": high, "min": low,
            "outliers": float((norms > tau).double().mean()), "histogram": counts.tolist()}  # fmt: skip


class LayerStats:
    """Everything about the features of one layer, over the images seen so far."""

    def __init__(self) -> None:
        self.images, self.kept, self.grid = 0, 0, (0, 0)
        self.cosine = self.residual = self.frequencies = 0.0
        self.mean, self.token = Moments(), Moments()
        self.norms: list[Tensor] = []

    def update(self, state: State) -> None:
        """One batch; on the device of its tensors until a few numbers per image are left."""
        patches = state.patches.detach().float()
        self.images, self.grid = self.images + len(patches), state.grid
        self.cosine += float(token_cosine(patches).sum())
        self.residual += float(relative_residual(patches).sum())
        self.frequencies = self.frequencies + log_amplitude(patches, state.grid).cpu().double()
        self.mean.update(patches.mean(1))
        if state.prefix.shape[1]:
            self.token.update(state.prefix[:, 0])
        if self.kept < NORMS:
            found = torch.linalg.vector_norm(patches, dim=-1).flatten()[: NORMS - self.kept].cpu()
            self.norms.append(found)
            self.kept += len(found)

    def result(self) -> dict[str, Any]:
        """The numbers of one layer, ready for JSON."""
        amplitudes = self.frequencies / self.images
        return {
            "grid": list(self.grid),
            "patch_mean": spectrum(self.mean),
            "class_token": spectrum(self.token) if self.token.n else None,
            "token_cosine": self.cosine / self.images,
            "relative_residual": self.residual / self.images,
            "fourier": (amplitudes - amplitudes[0]).tolist() if len(amplitudes) > 1 else None,
            "norms": audit(torch.cat(self.norms)),
        }
