"""Names of backbones, and the one place that builds (or refuses) them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tokens import Backbone, Needs

__all__ = ["NAMES", "backbone_args", "build_backbone"]

_NANO = {"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 8}
# A dilated last stage: cells of 16 px, 16 of them at 64 px (patch_size=1: cells of 8 px, for 32 px images).
_LITE = {"depths": [1, 1, 2, 1], "dims": [24, 48, 96, 192], "patch_size": 2, "output_stride": 16}

# name -> (family, timm architecture, timm keyword arguments)
NAMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit_nano": ("vit", "vit_tiny_patch16_224", _NANO),
    "vit_ti": ("vit", "vit_tiny_patch16_224", {}),
    "vit_s": ("vit", "vit_small_patch16_224", {}),
    "vit_b": ("vit", "vit_base_patch16_224", {}),
    "vit_l": ("vit", "vit_large_patch16_224", {}),
    "vit_h": ("vit", "vit_huge_patch14_224", {}),
    **{f"convnext_{size}": ("convnext", f"convnext_{size}", {}) for size in ("tiny", "small", "base", "large")},
    **{
        f"convnextv2_{size}": ("convnext", f"convnextv2_{size}", {})
        for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
    },
    "convnext_nano_lite": ("convnext", "convnext_atto", _LITE),
    "convnextv2_nano_lite": ("convnext", "convnextv2_atto", _LITE),
    **{f"shvit_s{i}": ("shvit", f"shvit_s{i}", {}) for i in range(1, 5)},
    "shvit_nano_lite": (
        "shvit", "shvit_s1",
        {"embed_dim": [64, 112, 160], "partial_dim": [16, 24, 34], "depth": [1, 2, 2], "types": ["i", "s", "s"]},
    ),
}  # fmt: skip
_CLASSES = {"vit": "vit:ViT", "convnext": "convnext:ConvNeXt", "shvit": "shvit:SHViT", "timm": "generic:Generic"}
_MODULES = {"vision_transformer": "vit", "deit": "vit", "convnext": "convnext", "shvit": "shvit"}
_VIT_ONLY = ("embed_dim", "depth", "num_heads", "registers", "pos_resize")


def family_of(name: str) -> tuple[str, str, dict[str, Any]]:
    """(family, timm architecture, keyword arguments) of one of our names or of any timm model."""
    from .tokens import BackboneError

    if name in NAMES:
        return NAMES[name]
    import timm

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        import difflib

        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise BackboneError(f"timm has no model called '{name}'; {hint}")
    module = timm.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    return _MODULES.get(module, "timm"), architecture, {}


def backbone_args(node: Any) -> dict[str, Any]:
    """The keyword arguments of `build_backbone` in a config's `backbone` group."""
    other = ("family", "image_size", "local_size", "context_size", "exemplar_size", "decoder")
    return {k: v for k, v in node.items() if v is not None and k not in other}


def build_backbone(
    name: str,
    needs: Needs,
    *,
    image_sizes: Sequence[int],
    adapt: str | Mapping[str, Any] = "none",
    patch_size: int | None = None,
    drop_path: float = 0.0,
    **kwargs: Any,
) -> Backbone:
    """Build a backbone by one of our names or any timm name; BackboneError in one sentence if it cannot serve.

    image_sizes: the sides it will see, main size first. kwargs (None = the model's own): embed_dim, depth, num_heads,
    registers, pos_resize for ViT. The result is checked against timm's own forward. adapt: a kind of adapter, or a
    mapping of the keys of `conf/adapt` (see `adapters`): timm's weights are frozen but for what that kind trains.
    """
    from .adapters import adapt_backbone
    from .tokens import BackboneError

    family, architecture, model_args = family_of(name)
    given = {k: v for k, v in kwargs.items() if v is not None and (k, v) != ("registers", 0)}
    # SHViT's own embed_dim and depth are lists.
    plain = [k for k, v in given.items() if k in _VIT_ONLY and not isinstance(v, (list, tuple))]
    wrong = [k for k in plain if family != "vit" and (k, given[k]) != ("pos_resize", "timm")]
    if wrong:
        raise BackboneError(f"backbone.{wrong[0]} is for ViT; {name} is of the family {family}")
    if family != "vit":
        given.pop("pos_resize", None)
    if patch_size is not None:
        if family not in ("vit", "convnext"):
            raise BackboneError(f"backbone.patch_size is for ViT and ConvNeXt; {name} is of the family {family}")
        given["patch_size"] = patch_size
    if "registers" in given:
        given["reg_tokens"] = given.pop("registers")
    common = {"needs": needs, "image_sizes": image_sizes, "drop_path": drop_path}
    try:
        backbone = _build(family, architecture, **common, **model_args | given)
    except BackboneError:
        # Relatives of a family (distilled tokens, other blocks) still serve objectives that hide nothing.
        if name in NAMES or family == "timm" or given or needs.hide or needs.focus or needs.attention:
            raise
        backbone = _build("timm", architecture, **common)
    adapt_backbone(backbone, adapt)
    return backbone


def class_of(family: str) -> type[Backbone]:
    """The class of a family (`family_of`)."""
    module, cls = _CLASSES[family].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), cls)


def _build(family: str, architecture: str, **kwargs: Any) -> Backbone:
    from .tokens import BackboneError

    try:
        backbone = class_of(family)(architecture, **kwargs)
    except AssertionError as error:  # how some timm models refuse an argument
        raise BackboneError(
            f"timm cannot build {architecture} in the way that this objective needs: {error}"
        ) from error
    if not kwargs["needs"].pooled:
        backbone.freeze_pooled()
    if not next(backbone.parameters()).is_meta:  # there it is only asked whether it can be built
        backbone.check()
    return backbone
