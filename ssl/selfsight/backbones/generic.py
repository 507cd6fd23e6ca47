"""Any other timm model with feature maps, for everything that hides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import timm
import torch
from torch import Tensor, nn

from ..nn.fuse import flat
from ..nn.global_batchnorm import to_global
from .convnext import plan_fusion
from .tokens import Backbone, BackboneError, Drop, Needs, Replace, Tokens

_CAN_HIDE = "ViT (vit_*), ConvNeXt (convnext_*, convnextv2_*) and SHViT (shvit_*) can"


def run_model(model: nn.Module, images: Tensor, indices: list[int] | int) -> tuple[Tensor, list[Tensor]]:
    """Final features in timm's layout and the maps asked for; without a walker the whole model is what compiles."""
    return model.forward_intermediates(images, indices=indices)


class Generic(Backbone):
    """A timm model seen through `forward_intermediates`; cell = stride, since nothing can be hidden.

    pooled: timm's forward_head(pre_logits=True). patches: positions of timm's final features (their final norm is
    timm's own, so `norm` changes nothing); where `needs.stride` is finer, the fused stages. embed_dim is the width of
    pooled; a few models (MobileNetV3) widen it after pooling, there a stride of any size fuses to it.
    Stochastic depth is timm's own: `drop_path` goes to the model, and tables are refused.
    """

    family = "timm"
    mask_token = None

    def __init__(
        self, architecture: str, *, needs: Needs, image_sizes: Sequence[int], drop_path: float = 0.0, **model_args
    ):
        super().__init__()
        self._refuse(architecture, needs)
        if drop_path:
            model_args["drop_path_rate"] = drop_path
        self.architecture, self.model_args = architecture, model_args
        self.block_fn = run_model
        self.drop_path_rate = 0.0  # nothing for an objective to draw
        try:
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
        except (TypeError, RuntimeError, ValueError) as error:
            given = ", ".join(f"{k}={v}" for k, v in model_args.items()) or "no arguments"
            raise BackboneError(f"timm cannot build {architecture} with {given}: {error}") from error
        self.timm = to_global(model)
        self._measure(image_sizes[0])
        for size in image_sizes[1:]:
            self._try(size)
        self.fused, self.fuse = plan_fusion(self, needs)
        if self.fuse is None and needs.stride is not None and self.patch_dim != self.embed_dim:
            self.fused, self.fuse = plan_fusion(self, needs._replace(stride=self.reductions[-1] - 1))
        self.stride = self.reductions[self.fused[0]] if self.fused else self.stride
        self.cell = self.stride

    def _refuse(self, architecture: str, needs: Needs) -> None:
        asked = [
            word
            for word, wanted in (
                ("hide cells", needs.hide is not None),
                ("focus its pooled token", needs.focus),
                ("return an attention row", needs.attention),
            )
            if wanted
        ]
        if asked:
            raise BackboneError(f"{architecture} as a generic timm model cannot {' or '.join(asked)}; {_CAN_HIDE}")

    @torch.no_grad()
    def _measure(self, size: int) -> None:
        """Run once on a blank image: widths, strides, and which axis of the final features is the channel."""
        model = self.timm.eval()
        try:
            final, maps = model.forward_intermediates(torch.zeros(1, 3, size, size))
            pooled = model.forward_head(final, pre_logits=True)
        except Exception as error:  # timm models fail in many ways at sizes that they were not built for
            raise BackboneError(
                f"{self.architecture} gives no feature maps at image size {size} ({error}); use a timm model with "
                "forward_intermediates, or another image_size or backbone argument such as img_size"
            ) from error
        model.train()
        self.widths = tuple(m.shape[1] for m in maps)
        self.reductions = tuple(round(size / m.shape[-1]) for m in maps)
        self.prefix, self.embed_dim = getattr(model, "num_prefix_tokens", 0), pooled.shape[-1]
        # Compare with the known width, never "the longest axis"; an image with h = w = width is read as NCHW.
        self.channels_last = final.ndim == 4 and final.shape[1] != model.num_features
        tokens = self._tokens(final)
        self.patch_dim, self.depth = tokens.shape[-1], len(maps)
        self.stride = round(size / math.isqrt(tokens.shape[1]))

    @torch.no_grad()
    def _try(self, size: int) -> None:
        """BackboneError if the model takes its main size alone."""
        training = self.timm.training
        try:
            self.timm.eval().forward_intermediates(torch.zeros(1, 3, size, size))
        except Exception as error:  # as in `_measure`
            raise BackboneError(
                f"image size {size} is not one that {self.architecture} takes beside its main one ({error}); leave "
                "local views out (views.local.n=0), or use a model whose input size is free"
            ) from error
        self.timm.train(training)

    def _tokens(self, final: Tensor) -> Tensor:
        """Final features in timm's layout -> patch tokens [B, N, D]."""
        if final.ndim == 3:
            return final[:, self.prefix :]
        return final.flatten(1, 2) if self.channels_last else flat(final)

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
        if hide is not None or focus is not None or attention:
            raise BackboneError(
                f"{self.architecture} as a generic timm model cannot hide, focus or attend; {_CAN_HIDE}"
            )
        if drop_path is not None:
            raise BackboneError(f"{self.architecture} draws its own stochastic depth; set backbone.drop_path instead")
        wanted = sorted({i % self.depth for i in (*layers, *self.fused)})
        final, found = self.block_fn(self.timm, images, wanted or 1)
        maps = dict(zip(wanted, found))
        pooled = self.timm.forward_head(final, pre_logits=True)
        if self.fuse is not None:
            patches = flat(self.fuse([maps[i] for i in self.fused], norm))
        else:
            patches = self._tokens(final)
        prefix = final[:, : self.prefix] if self.prefix else pooled[:, None]
        return Tokens(pooled, patches, prefix, tuple(maps[i % self.depth] for i in layers))

    def wrap_walkers(self, wrap: Callable[[Callable], Callable]) -> list[nn.Module]:
        return []  # timm runs its own blocks

    def final_norm(self) -> nn.Module | None:
        return self.fuse.norm if self.fuse is not None else None

    def check(self) -> None:
        """Nothing to compare: this family runs timm's own forward."""
