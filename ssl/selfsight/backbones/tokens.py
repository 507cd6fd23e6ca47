"""The one interface between objectives and backbones.

An objective states what it `Needs`; a family (one file each) provides `Tokens`, or refuses with one sentence.
Shapes: B images, C maskable cells, K kept cells, N patch tokens, D width. `mask`: True = hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapters import Adapters, Taps

MIN_CELLS = 16  # fewer leave next to nothing to predict from


class BackboneError(ValueError):
    """A backbone cannot give what was asked of it; the message says what would work."""


class Drop(NamedTuple):
    """Encode the visible cells only. ids: int64 [B, K], row-major cell numbers in the order to encode them."""

    ids: Tensor


class Replace(NamedTuple):
    """Keep the length; hidden cells carry the learned mask token. mask: bool [B, C], True = hidden."""

    mask: Tensor


class Needs(NamedTuple):
    """What an objective asks of a family; checked once, before data or weights are touched."""

    hide: type | None = None  # Drop | Replace
    focus: bool = False  # the pooled token may be restricted to some patches (ODIS)
    attention: bool = False  # last-block attention row of the pooled token (GLARE)
    stride: int | None = None  # dense tokens no coarser than this; hierarchical families fuse stages to get there
    class_token: bool = True  # False: ViT is built without a class token (I-JEPA, DMT-JEPA, SelfPatch)
    pooled: bool = True  # False: the loss never sees the pooled token, so what only it passes through is frozen
    init: str = (
        "timm"  # on ViT "mae": fixed sin-cos positions and Xavier weights; "jepa", "jepa_rescaled": and normal ones
    )


class Tokens(NamedTuple):
    """What every family returns.

    pooled: [B, D] class token, or mean + norm, or the class-attention read-out.
    patches: [B, N, D] row-major on grid(size); under Drop only the kept ones, in the order of the ids.
    prefix: [B, p, D] class token and registers; on families without any, pooled[:, None].
    maps: the layers asked for, [B, c, h, w] each (ViT under Drop: [B, K, D]), before the final norm.
    attention: [B, heads, N] or None.
    """

    pooled: Tensor
    patches: Tensor
    prefix: Tensor
    maps: tuple[Tensor, ...] = ()
    attention: Tensor | None = None


class Backbone(nn.Module):
    """A timm model behind `Tokens`. `timm` keeps timm's own parameter names: exporting is copying its state dict.

    Everything particular to one call (`hide`, `focus`, `drop_path` …) is an argument, never an attribute or a hook,
    so that activation checkpointing, compilation and shared teachers see a pure function.
    """

    family: str  # a word for messages and cards, not for branching
    timm: nn.Module
    embed_dim: int
    depth: int  # blocks, in forward order; drop_path tables have 2 * depth rows
    cell: int  # pixels per maskable cell
    stride: int  # pixels per patch token (<= cell)
    mask_token: nn.Parameter | None
    drop_path_rate: float
    num_heads: int | None = None  # of attention layers, where there are any
    can_attend: bool = False  # `attention=True` gives the pooled token's row, also where the objective did not ask
    readout: nn.Module | None  # trained beside it, attached where a checkpoint is judged with masks; mostly not there
    block_fn: Callable  # the walker of one block; `compile_blocks` swaps it for a compiled one
    adapters: Adapters | None  # beside a frozen timm model (`adapt=`)
    adapted_block: type[nn.Module]  # timm's block whose forward calls the adapters that it holds

    def __init__(self) -> None:
        super().__init__()
        self.adapters = None  # on the instance: a class attribute would hide a registered module of this name

    def cells(self, size: int) -> tuple[int, int]:
        """Rows and columns of maskable cells of a square image with this side."""
        return size // self.cell, size // self.cell

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of patch tokens of a square image with this side."""
        return math.ceil(size / self.stride), math.ceil(size / self.stride)

    def to_tokens(self, cell_ids: Tensor, size: int) -> Tensor:
        """Cell ids [B, K] to the ids of the patch tokens inside them, [B, K * (cell / stride) ** 2]."""
        per = self.cell // self.stride
        if per == 1:
            return cell_ids
        columns = self.cells(size)[1]
        row, column = cell_ids // columns, cell_ids % columns
        inner = torch.arange(per, device=cell_ids.device)
        rows = (row[..., None] * per + inner)[..., :, None]
        cols = (column[..., None] * per + inner)[..., None, :]
        return (rows * self.grid(size)[1] + cols).flatten(1)

    def forward(
        self,
        images: Tensor,
        hide: Drop | Replace | None = None,
        *,
        focus: Tensor | None = None,
        drop_path: Tensor | None = None,
        layers: tuple[int, ...] = (),
        norm: bool = True,
        attention: bool = False,
    ) -> Tokens:
        """Encode images.

        images: float [B, 3, H, W], normalised. hide: what to hide. focus: bool [B, N], True = the pooled token may
        look here. drop_path: [2 * depth, B] factors of the residual branches (0 or 1 / keep), None = none dropped.
        layers: blocks (ViT) or stages (others) whose maps are wanted, negative numbers count from the end.
        norm: apply the final norm to `patches` and `prefix`. attention: also return the pooled token's last row.
        """
        raise NotImplementedError

    def read_out(self, tokens: Tokens, focus: Tensor | None) -> Tokens:
        """Tokens whose pooled feature is what an attached `readout` sees of the focused patches."""
        readout = getattr(self, "readout", None)  # a class attribute would hide a registered module of this name
        if readout is None or focus is None:
            return tokens
        pooled = readout.normed(readout.pool(readout.project(tokens.patches), focus))
        return tokens._replace(pooled=pooled, prefix=pooled[:, None])

    def final_norm(self) -> nn.Module | None:
        """The norm that `norm=False` leaves out of `patches`; None where there is none."""
        return None

    def train_final_norm(self) -> None:
        """Undo `freeze_pooled` for the norm that patches pass through, too; what `adapt` froze stays frozen."""
        norm = self.final_norm()
        kept = self.adapters is not None and not self.adapters.trains_norms
        if norm is not None and not (kept and any(norm is module for module in self.timm.modules())):
            norm.requires_grad_(True)

    @staticmethod
    def taps(block: nn.Module) -> Taps | None:
        """Where a block of timm's model can be adapted; None: nowhere."""
        return None

    def beside(self, block: int) -> nn.ModuleDict | None:
        """The adapters of a block, for its walker."""
        return None if self.adapters is None else self.adapters.of(block)

    def plain(self) -> nn.Module:
        """A timm model that gives these features: `timm` itself, or a copy with the adapters merged or inside it."""
        if self.adapters is None:
            return self.timm
        from .adapters import in_timm

        return in_timm(self)

    def freeze_pooled(self) -> None:
        """Freeze what only the pooled token passes through (DDP refuses parameters that get no gradient)."""

    def freeze_patches(self) -> None:
        """Freeze the projection of pixels where that is a single linear map (ViT), as MoCo v3 does for stability."""

    def compile_blocks(self, **kwargs) -> None:
        """Compile the walker of one block (few graphs, short cold start, no state): `torch.compile(**kwargs)`."""
        allow_graphs()
        self.block_fn = torch.compile(self.block_fn, **kwargs)

    def wrap_walkers(self, wrap: Callable[[Callable], Callable]) -> list[nn.Module]:
        """Replace the walker of a block, f(block, ...), by wrap(f); the blocks that are walked."""
        from .watch import blocks_of

        self.block_fn = wrap(self.block_fn)
        return list(blocks_of(self.timm).values())


def need_cells(backbone: Backbone, size: int, what: str) -> None:
    """BackboneError where images of `size` have too few cells for hiding some; `what` names the key."""
    cells = math.prod(backbone.cells(size))
    if cells < MIN_CELLS:
        side = math.isqrt(MIN_CELLS - 1) + 1
        smaller = "" if backbone.family == "shvit" else " or a smaller backbone.patch_size"
        raise BackboneError(
            f"{what} gives {cells} maskable cells of {backbone.cell} px, and masked objectives need {MIN_CELLS}; "
            f"use image_size={side * backbone.cell}{smaller}"
        )


def allow_graphs() -> None:
    """Raise torch's limit on graphs per function: a walker needs one per stage (shapes) and kind of call.

    Training, evaluation and the teacher are three kinds, global and local views have two sizes, and at the default
    limit of 8 graphs four stages would stop (fullgraph) or silently fall back to eager.
    """
    import torch._dynamo.config as config  # not loaded by `import torch`, and only compiled runs need it

    config.recompile_limit = max(config.recompile_limit, 64)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """Gather tokens: x [B, N, ...], ids int64 [B, K] -> [B, K, ...]."""
    index = ids.reshape(*ids.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, c, H, W] -> [B, (H/p)(W/p), p*p*c], inner order (row, column, channel): MAE's `patchify`."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, channels: int = 3) -> Tensor:
    """Inverse of `patchify` for a square grid: [B, N, p*p*c] -> [B, c, H, W]."""
    b, n, _ = patches.shape
    side = math.isqrt(n)
    x = patches.reshape(b, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, side * patch, side * patch)
