"""Published protocols by name, as far as features of un-augmented images can follow them.

dino_knn       DINO (Caron et al., 2021), eval_knn: k of 10, 20, 100 and 200, T = 0.07, not centred.
mae_linear     MAE (He et al., 2022), appendix A.1: batch norm without affine, LARS with base rate 0.1 for a batch of
               16,384 (at most the split), 90 epochs, 10 of warm-up; published with random crops and flips.
ep_lars        Psomas et al. (arXiv 2506.10178): efficient probing, 32 queries, LARS with base rate 0.1 for a batch of
               4096 (at most the split), 90 epochs, 10 of warm-up; published with random crops and flips.
dinov2_linear  DINOv2 (Oquab et al., 2023), linear grid: 13 rates x class tokens of 1 or 4 last blocks x with or without
               the mean of the patches, SGD, batch 128, 12,500 steps; published with crops and flips, and with the head
               chosen on the test split, which is never done here.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from .. import config
from . import ProbeError

EP_LARS = {"pooling": "ep", "queries": [32], "layers": None, "optimizer": "lars", "lrs": [0.1], "weight_decays": [0.0],
           "epochs": 90, "warmup_epochs": 10, "batch_size": 4096}  # fmt: skip
PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "attentive": {"ep_lars": EP_LARS},
    "knn": {"dino_knn": {"k": [10, 20, 100, 200], "temperature": [0.07], "center": False}},
    "linear": {
        "mae_linear": {"inputs": ["pooled"], "batch_norm": True, "optimizer": "lars", "lrs": [0.1],
                       "weight_decays": [0.0], "epochs": 90, "warmup_epochs": 10, "steps": None, "batch_size": 16384},
        "dinov2_linear": {"inputs": ["class1", "class1+mean", "class4", "class4+mean"], "batch_norm": False,
                          "optimizer": "sgd", "weight_decays": [0.0], "warmup_epochs": 0, "steps": 12500,
                          "batch_size": 128, "lrs": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2,
                                                     5e-2, 0.1]},
    },
}  # fmt: skip


def apply_protocol(settings: Any, values: dict[str, Any] | None = None) -> None:
    """Put the values of `probe.protocol` into the probe's settings; ProbeError where one of them was given as well.

    values: where they depend on the model (`finetune_published`); without them nothing is done about such a protocol.
    """
    name = settings.get("protocol")
    values = values or PROTOCOLS.get(settings.name, {}).get(name)
    if not name or values is None:
        return
    usual = config.load("probe", ["checkpoint=-", f"probe={settings.name}"]).probe
    for key, value in values.items():
        given = OmegaConf.to_container(OmegaConf.create({"v": settings[key]}))["v"]
        if given not in (value, OmegaConf.to_container(usual)[key]):
            raise ProbeError(f"probe.protocol={name} fixes probe.{key}={value}, and {given} was given; leave one out")
        settings[key] = value
