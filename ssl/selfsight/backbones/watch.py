"""What passes through the blocks of a timm model, read by hooks: for analysis, never for training.

The model is not changed: hooks are removed afterwards, and attention weights are computed beside timm's own (fused)
attention, again from its queries and keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from timm.models.convnext import ConvNeXt
from timm.models.shvit import SHViT
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from .tokens import BackboneError

WEIGHTS_AT_ONCE = 2**24  # entries of attention matrices in memory: 64 MB in float32


class State(NamedTuple):
    """What leaves a block: patches [B, N, D] row-major on the grid (rows, columns), prefix [B, p, D] (class token and
    registers, p = 0 where there are none)."""

    patches: Tensor
    prefix: Tensor
    grid: tuple[int, int]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """timm's module name -> block, in forward order; empty where only whole stages can be read (`watch` does so)."""
    if isinstance(model, VisionTransformer):
        return {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    if isinstance(model, (ConvNeXt, SHViT)):
        return {f"stages.{s}.blocks.{i}": b for s, stage in enumerate(model.stages) for i, b in enumerate(stage.blocks)}
    return {}


def layers_of(model: nn.Module) -> list[str]:
    """Names of what `watch` reads: blocks, else the stages that timm's feature_info lists; BackboneError if neither."""
    if blocks := blocks_of(model):
        return list(blocks)
    if not hasattr(model, "forward_intermediates"):
        raise BackboneError(f"timm's {type(model).__name__} has no forward_intermediates, so its stages cannot be read")
    return [info["module"] for info in model.feature_info]


def attends(model: nn.Module) -> bool:
    """Whether attention weights between patches can be had: timm's plain global attention in every block."""
    found = blocks_of(model).values()
    return bool(found) and all(type(getattr(block, "attn", None)) is Attention for block in found)


def attention_weights(attn: Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of timm's attention, from its input x [B, N, D]: [B, heads, N, N]."""
    b, n, _ = x.shape
    q, k, _ = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)


@torch.no_grad()
def watch(
    model: nn.Module,
    images: Tensor,
    see: Callable[[int, State], Any],
    see_attention: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """Run a headless timm model on images [B, c, H, W] and return its pooled feature [B, D].

    see(i, state) is called once for each of `layers_of(model)`, after the block. see_attention(i, weights), weights
    [b, heads, n, n] over all tokens (prefix first), is called for each block of a model that `attends`, several times
    a batch where the matrices are large (a few images each, in order), so that memory stays bounded.
    """
    blocks, prefix = blocks_of(model), getattr(model, "num_prefix_tokens", 0)
    if not blocks:
        final, maps = model.forward_intermediates(images)
        for i, found in enumerate(maps):
            see(i, _state(found, 0, None))
        return model.forward_head(final, pre_logits=True).flatten(1)
    grid = _vit_grid(model, images)
    with _hooks() as handles:
        for i, block in enumerate(blocks.values()):
            handles.append(block.register_forward_hook(_state_reader(i, see, prefix, grid)))
            if see_attention is not None and attends(model):
                handles.append(block.attn.register_forward_pre_hook(_attention_reader(i, see_attention)))
        final = model.forward_features(images)
    return model.forward_head(final, pre_logits=True).flatten(1)


@contextlib.contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _state_reader(
    i: int, see: Callable[[int, State], Any], prefix: int, grid: tuple[int, int] | None
) -> Callable[..., None]:
    def read(_block: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:  # a result would replace the output
        see(i, _state(out, prefix, grid))

    return read


def _attention_reader(i: int, see: Callable[[int, Tensor], Any]) -> Callable[..., None]:
    def read(attn: Attention, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        for part in x.split(max(1, WEIGHTS_AT_ONCE // (attn.num_heads * x.shape[1] ** 2))):
            see(i, attention_weights(attn, part))

    return read


def _vit_grid(model: nn.Module, images: Tensor) -> tuple[int, int] | None:
    if not isinstance(model, VisionTransformer):
        return None
    (height, width), patch = images.shape[-2:], model.patch_embed.patch_size
    return -(-height // patch[0]), -(-width // patch[1])


def _state(out: Tensor, prefix: int, grid: tuple[int, int] | None) -> State:
    """Maps [B, D, h, w] or tokens [B, p + N, D] as a State."""
    if out.ndim == 4:
        return State(out.flatten(2).mT, out.new_empty(len(out), 0, out.shape[1]), tuple(out.shape[-2:]))
    return State(out[:, prefix:], out[:, :prefix], grid)
