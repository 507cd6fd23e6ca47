"""`selfsight import`: weights from elsewhere to a folder that timm opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..backbones import backbone_args, build_backbone
from ..backbones.tokens import Backbone, Needs
from .describe import shape_of
from .export import export_backbone, refuse_existing
from .fit import put
from .initialise import extras_of, fit_network, report_of
from .load import Network, Weights, open_weights
from .report import Report
from .safe import WeightsError

SIZES = {"shvit": 256}  # of families whose states have no positions to tell it


def convert(cfg: DictConfig) -> dict[str, Any]:
    """`selfsight import source=<weights> out=<folder>`: writes the folder; returns {"out", "report"}."""
    args = backbone_args(cfg.backbone) if cfg.backbone is not None else {}
    args.pop("registers", None)  # the file says how many
    report = import_folder(
        cfg.source,
        Path(cfg.out),
        image_size=cfg.image_size,
        mean=cfg.mean,
        std=cfg.std,
        overwrite=cfg.overwrite,
        **args,
    )
    print(f"{report.text()}\n{cfg.out}: timm.create_model('local-dir:{cfg.out}', pretrained=True) opens it", flush=True)
    return {"out": cfg.out, "report": report.as_dict()}


def import_folder(
    source: str,
    out: Path,
    *,
    name: str | None = None,
    image_size: int | None = None,
    mean: Any = None,
    std: Any = None,
    overwrite: bool = False,
    **args: Any,
) -> Report:
    """Open weights, build the backbone that they are of, fill it and export it to `out`.

    name and args: of `build_backbone`; what is left out is told from the file. image_size: None = that of its
    positions. mean, std: None = what the weights have seen. WeightsError where it does not fit.
    """
    refuse_existing(out, overwrite)
    weights = open_weights(source)
    if weights.layout == "selfsight":
        raise WeightsError(f"{weights.what} is our own: selfsight export checkpoint=… out=… writes its backbone")
    net = weights.chosen
    backbone = backbone_for(net, weights, name, image_size, **args)
    fitted = fit_network(net, backbone, weights)
    put(backbone.timm, fitted.state)
    put(backbone, extras_of(net, backbone))
    report = report_of(weights, net, fitted, backbone, {})
    method = weights.layout if len(weights.fits) == 1 else None  # an encoder alone does not say whose it is
    card = {"objective": method, "backbone": backbone.architecture, "source": source, "import": report.as_dict()}
    size = image_size_for(net, backbone, image_size)
    export_backbone(backbone, out, mean=mean or weights.mean, std=std or weights.std, image_size=size, card=card)
    return report


def backbone_for(net: Network, weights: Weights, name: str | None, image_size: int | None, **args: Any) -> Backbone:
    """The backbone that a network is of. A ViT is read out at its class token where it has one."""
    shape = shape_of(net.backbone)
    if (name or shape.name) is None:
        raise WeightsError(
            f"{weights.what} is {shape.words}, which is none of our names: add backbone=, with backbone.embed_dim=, "
            "backbone.depth= and backbone.num_heads= for a ViT"
        )
    told = shape.args if name is None else {k: v for k, v in shape.args.items() if k not in ("patch_size", "num_heads")}
    if weights.num_heads and shape.image_size:
        told = told | {"num_heads": weights.num_heads}
    needs = Needs(class_token="cls_token" in net.backbone or shape.image_size is None)
    size = image_size or shape.image_size or SIZES.get(str(name or shape.name).partition("_")[0], 224)
    return build_backbone(name or shape.name, needs, image_sizes=(size,), **told | args)


def image_size_for(net: Network, backbone: Backbone, image_size: int | None) -> int:
    return image_size or shape_of(net.backbone).image_size or SIZES.get(backbone.family, 224)
