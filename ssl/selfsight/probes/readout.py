"""What is read out of a frozen timm model in one forward: pooled feature, class token, patch tokens, of chosen layers.

Layers are blocks (ViT) or stages (ConvNeXt, SHViT, …), counted as timm's `forward_intermediates` counts them; negative
numbers count from the end. The final norm is a choice that is always said, because it changes what a layer says: k-NN
on MAE's last block is twice as good without it, and applied to early blocks it distorts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone
from . import ProbeError

KINDS = ("pooled", "class", "mean", "patches")


class Want(NamedTuple):
    """One array of a bank.

    kind: "pooled" (the model's own feature; of a layer: pooled in the same way), "class" (class token), "mean" (of the
    patch tokens) or "patches".
    layer: None = the model's output, after its final norm; else a block or stage.
    norm: apply the final norm to that layer, where timm can (on hierarchical models only to the last one, if at all).
    Of the model's output it says nothing: `of` turns an output without the norm into the last layer without it.
    """

    kind: str
    layer: int | None = None
    norm: bool = True

    @classmethod
    def of(cls, kind: str, layer: int | None, norm: bool) -> Want:
        """What the settings `layer` and `norm` of a probe ask for; null is the output, or the last layer as it is."""
        return cls(kind, layer if layer is not None or norm else -1, norm)

    @property
    def name(self) -> str:
        """File name of the array, without suffix."""
        return self.kind if self.layer is None else f"{self.kind}-{self.layer}-{'norm' if self.norm else 'raw'}"


class Layout(NamedTuple):
    """depth: blocks or stages of the model. shapes: of one row of every array, by `Want.name`."""

    depth: int
    shapes: dict[str, tuple[int, ...]]


def plain(model: nn.Module, size: int) -> nn.Module:
    """The timm model that an export would hold, at this image size: what is probed is what a user gets."""
    if not isinstance(model, Backbone):
        return model
    inner = model.plain()
    if getattr(getattr(inner, "patch_embed", None), "img_size", None) not in (None, (size, size)):
        inner.set_input_size(img_size=size)
    return inner


def resolve(want: Want, depth: int) -> Want:
    """The same with a layer counted from the start; ProbeError if there is no such layer."""
    if want.kind not in KINDS:
        raise ProbeError(f"{want} cannot be read out: choose one of {', '.join(KINDS)}")
    if want.layer is None:
        return want
    if not -depth <= want.layer < depth:
        raise ProbeError(f"layer {want.layer} of a backbone with {depth}: choose 0 to {depth - 1} or -{depth} to -1")
    want = want._replace(layer=want.layer % depth)
    # Pooled and normed, the last layer is the output, in whichever order the model does the two.
    return Want("pooled") if want == ("pooled", depth - 1, True) else want


@torch.no_grad()
def layout(model: nn.Module, wants: Sequence[Want], size: int, channels: int = 3) -> Layout:
    """What the model gives for these wants, by running it on one blank image (eval mode is the caller's)."""
    blank = next(model.parameters()).new_zeros(1, channels, size, size)
    layers = any(want.layer is not None for want in wants)
    depth = len(_intermediates(model, blank, None, False)[1]) if layers else 0
    found = read_out(model, blank, [resolve(want, depth) for want in wants])
    return Layout(depth, {name: tuple(x.shape[1:]) for name, x in found.items()})


@torch.no_grad()
def read_out(model: nn.Module, x: Tensor, wants: Sequence[Want]) -> dict[str, Tensor]:
    """Images [B, c, s, s] to the arrays wanted, by name: [B, D], or [B, N, D] for patches (row-major).

    wants: with layers counted from the start (`resolve`). One forward, or two where layers are wanted with and
    without the norm.
    """
    out, final = {}, None
    for norm in (True, False):
        layers = sorted({w.layer for w in wants if w.layer is not None and w.norm == norm})
        if layers:
            final, tokens = _intermediates(model, x, layers, norm)
            for number, (patches, prefix) in zip(layers, tokens):
                chosen = [w for w in wants if w.layer == number and w.norm == norm]
                out |= {want.name: _pooled(model, patches, prefix, norm) if want.kind == "pooled" else _pick(
                    want, patches, prefix) for want in chosen}  # fmt: skip
    own = [want for want in wants if want.layer is None]
    if own:
        final = model.forward_features(x) if final is None else final
        patches, prefix = _split(model, final)
        for want in own:
            pooled = want.kind == "pooled"
            out[want.name] = model.forward_head(final, pre_logits=True).flatten(1) if pooled else _pick(
                want, patches, prefix)  # fmt: skip
    return out


def _pooled(model: nn.Module, patches: Tensor, prefix: Tensor | None, norm: bool) -> Tensor:
    """A layer pooled as the model pools its output: the class token, or the mean of the patches and its own norm."""
    how = getattr(model, "global_pool", "avg")
    how = getattr(how, "pool_type", how)  # a word, or a module of timm's
    if how == "token" and prefix is not None and prefix.shape[1]:
        return prefix[:, 0]
    if how != "avg":
        raise ProbeError(f"this backbone pools its output by {how!r}, which cannot be done to a single layer; use "
                         "probe=linear probe.inputs=[mean], or leave probe.layer and probe.norm out")  # fmt: skip
    pooled = patches.mean(1)
    return model.fc_norm(pooled) if norm and hasattr(model, "fc_norm") else pooled


@torch.no_grad()
def norm_acts(model: nn.Module, want: Want, size: int, channels: int = 3) -> bool:
    """Whether the final norm changes this array: hierarchical models have none that an earlier stage could take, and
    some apply theirs only after pooling, so that their patches are without it."""
    noise = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    raw = want._replace(norm=False, layer=-1 if want.layer is None else want.layer)
    depth = layout(model, [raw], size, channels).depth
    with_norm, without = resolve(want._replace(norm=True), depth), resolve(raw, depth)
    found = read_out(model, noise.to(next(model.parameters())), [with_norm, without])
    return not torch.equal(found[with_norm.name], found[without.name])


def _pick(want: Want, patches: Tensor, prefix: Tensor | None) -> Tensor:
    if want.kind == "class":
        if prefix is None or not prefix.shape[1]:
            raise ProbeError("this backbone has no class token; use its pooled feature or the mean of its patches")
        return prefix[:, 0]
    return patches.mean(1) if want.kind == "mean" else patches


def _split(model: nn.Module, final: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patch tokens [B, N, D] and prefix [B, p, D] of timm's final features; some families keep channels last."""
    if final.ndim == 4:
        last = final.shape[1] != model.num_features
        return final.flatten(1, 2) if last else final.flatten(2).mT, None
    prefix = getattr(model, "num_prefix_tokens", 0)
    return final[:, prefix:], final[:, :prefix]


def _intermediates(
    model: nn.Module, x: Tensor, layers: list[int] | None, norm: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """timm's final features, and (patches [B, N, D], prefix [B, p, D] or None) of each layer."""
    if not hasattr(model, "forward_intermediates"):
        raise ProbeError(f"{type(model).__name__} has no forward_intermediates: only its output can be read, no layer")
    takes_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    options = {"return_prefix_tokens": True} if takes_prefix else {}
    final, found = model.forward_intermediates(x, indices=layers, norm=norm, output_fmt="NCHW", **options)
    pairs = [item if isinstance(item, tuple) else (item, None) for item in found]
    return final, [(maps.flatten(2).mT, prefix) for maps, prefix in pairs]
