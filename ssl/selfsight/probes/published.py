"""Published probing protocols as data. Rates are per 256 samples of a batch.

Two things differ from all of them here and are part of the words: tokens are cached, so images are not augmented; and
heads are chosen on held-out rows of the training split, where the references choose on the split they report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attentive import Recipe, TokenSource


class Published(NamedTuple):
    """words: the protocol in a sentence. The rest are arguments of `attentive`."""

    words: str
    pooling: str
    recipe: Recipe
    lrs: tuple[float, ...] = (0.1,)
    weight_decays: tuple[float, ...] = (0.0,)
    num_queries: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)


_DINOV2_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_HERE = "on cached features without augmentation, chosen on a held-out tenth of the training split"

PROTOCOLS = {
    # Psomas et al., arXiv 2506.10178, and the benchmark of its repository.
    "ep_lars": Published(
        "efficient probing, 32 queries: batch norm without affine, linear; LARS (momentum 0.9, trust 0.001), rate 0.1 "
        f"per 256, batch 4096, 90 epochs, 10 of warm-up, cosine to 0, {_HERE}",
        "ep", Recipe("lars", 90, 10, 4096), num_queries=(32,),
    ),
    # He et al., CVPR 2022, appendix A.1.
    "mae_linear": Published(
        "linear probe of MAE on the class token: batch norm without affine, linear; LARS (momentum 0.9, trust 0.001), "
        f"rate 0.1 per 256, batch 16384, 90 epochs, 10 of warm-up, cosine to 0, {_HERE}",
        "cls", Recipe("lars", 90, 10, 16384),
    ),
    # Oquab et al., 2023, eval/linear.py; the sources are `dinov2_inputs`.
    "dinov2_linear": Published(
        "linear probe of DINOv2: 52 heads, 13 rates x last 1 or 4 class tokens x with or without the mean of the last "
        "patch tokens; SGD (momentum 0.9), batch 1024, 10 epochs (there: of 1250 iterations), cosine to 0, no warm-up, "
        f"{_HERE}",
        "cls", Recipe("sgd", 10, 0, 1024, batch_norm=False, zero_bias=True), lrs=_DINOV2_LRS,
    ),
}  # fmt: skip


class DINOv2Input:
    """Class tokens of the last n blocks, oldest first, and if asked the mean of the last block's patch tokens.

    cls: features [B, 1, D] of the last blocks, oldest first; patches: tokens of the last one, without prefix tokens.
    """

    def __init__(self, cls: Sequence[TokenSource], patches: TokenSource, blocks: int, average: bool):
        self.parts, self.patches, self.average = list(cls[-blocks:]), patches, average

    def __len__(self) -> int:
        return len(self.patches)

    def tokens(self, rows: Tensor) -> Tensor:
        """[B, 1, n D] or [B, 1, (n + 1) D]."""
        parts = [source.tokens(rows)[:, 0] for source in self.parts]
        if self.average:
            parts.append(self.patches.tokens(rows).mean(1))
        return torch.cat(parts, -1)[:, None]


def dinov2_inputs(
    cls: Sequence[TokenSource], patches: TokenSource, blocks: Sequence[int] = (1, 4)
) -> dict[str, DINOv2Input]:
    """The inputs of the grid by name; heads are keyed by it and their index, never by a rounded rate (two of DINOv2's
    names collide at a batch of 128)."""
    return {
        f"blocks{n}{'_mean' if average else ''}": DINOv2Input(cls, patches, n, average)
        for n in blocks
        for average in (False, True)
    }
