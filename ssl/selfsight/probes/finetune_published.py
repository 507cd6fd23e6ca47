"""Published fine-tuning recipes by name and size of the model, as data. Rates are per 256 images.

mae_finetune         MAE (He et al., CVPR 2022), appendix A.1: ViT-B, L, H.
convnextv2_finetune  ConvNeXt V2 (Woo et al., CVPR 2023), after FCMAE: atto, tiny, base.
spark_finetune       SparK (Tian et al., ICLR 2023), after sparse pretraining: ConvNeXt-S, B, L.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import ProbeError

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


class Published(NamedTuple):
    """prefixes: of timm's architectures. every: values of all sizes; sizes: by the width of the last feature, in rising
    order, timm's word for it and its own values."""

    prefixes: tuple[str, ...]
    every: dict[str, Any]
    sizes: dict[int, tuple[str, dict[str, Any]]]

    @property
    def keys(self) -> set[str]:
        """What it fixes, whatever the size."""
        return self.every.keys() | {key for _, own in self.sizes.values() for key in own}


_STRONG = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "erase": 0.25, "augment": RAND_AUGMENT,
           "scale": [0.08, 1.0], "flip": 0.5, "min_lr": 1e-6, "warmup_start": 0.0, "clip": None,
           "repeats": 1}  # fmt: skip


def _own(epochs: int, warmup: float, lr: float, decay: float, drop_path: float, **more: Any) -> dict[str, Any]:
    own = {"epochs": epochs, "warmup_epochs": warmup, "lrs": [lr], "layer_decays": [decay], "drop_path": drop_path}
    return own | more


PUBLISHED = {
    "mae_finetune": Published(
        ("vit_", "deit_", "deit3_"),
        _STRONG | {"pool": "avg", "batch_size": 1024, "weight_decay": 0.05, "grouping": "single", "ema": None},
        {
            768: ("base", _own(100, 5, 5e-4, 0.65, 0.1)),
            1024: ("large", _own(50, 5, 1e-3, 0.75, 0.2)),
            1280: ("huge", _own(50, 5, 1e-3, 0.75, 0.3)),
        },
    ),
    "convnextv2_finetune": Published(
        ("convnextv2_",),
        _STRONG | {"batch_size": 1024, "ema": 0.9999},
        {
            320: ("atto", _own(600, 0, 2e-4, 0.9, 0.1, weight_decay=0.3, grouping="single", mixup=0.0, cutmix=0.0,
                               smoothing=0.2)),
            768: ("tiny", _own(300, 40, 8e-4, 0.9, 0.2, weight_decay=0.05, grouping="single")),
            1024: ("base", _own(100, 20, 6.25e-4, 0.6, 0.1, weight_decay=0.05, grouping="group")),
        },
    ),
    "spark_finetune": Published(
        ("convnext_",),
        _STRONG | {"cutmix": 0.0, "augment": "trivial", "repeats": 3, "batch_size": 4096, "grouping": "group",
                   "ema": 0.9999, "warmup_start": 0.005},
        {
            768: ("small", _own(400, 20, 2e-4, 0.7, 0.3, weight_decay=0.01, min_lr=3.2e-6)),
            1024: ("base", _own(400, 20, 1e-4, 0.7, 0.4, weight_decay=0.01, min_lr=1.6e-6)),
            1536: ("large", _own(200, 10, 1e-4, 0.7, 0.5, weight_decay=0.02, min_lr=1.6e-6)),
        },
    ),
}  # fmt: skip


def published(name: str, architecture: str, width: int) -> tuple[dict[str, Any], str, bool]:
    """Values of a recipe for a model, the word for their size, and whether they were published for that very model.

    width: of the model's last feature. A size that was not published takes the values of the next smaller one that was,
    or of the smallest. ProbeError for another kind of model.
    """
    recipe = PUBLISHED[name]
    if not architecture.startswith(recipe.prefixes):
        kinds = ", ".join(f"{prefix}*" for prefix in recipe.prefixes)
        raise ProbeError(f"probe.protocol={name} is a recipe for {kinds}, and this is {architecture}; leave it out")
    below = [w for w in recipe.sizes if w <= width]
    at = max(below) if below else min(recipe.sizes)
    word, own = recipe.sizes[at]
    return recipe.every | own, word, at == width and word in architecture.split("_")
